"""Compares a converted model's numbers with the unconverted model's, up to rounding."""

from dataclasses import dataclass

import torch
from torch import Tensor

EPS = torch.finfo(torch.float32).eps

Named = dict[str, Tensor]

# An error may be this many times the unconverted model's own error, or this many times the change from weights that are
# changed by some ulps, plus this many ulps of the tensor.
_TIMES = 1.5
_SHAKEN_TIMES = 3
_ULPS = 32
# The error may also be this fraction of the largest tensor's: a gradient that is zero up to rounding has no digits.
_SHARE = 0.05
# The allowed error without a float64 result, as a fraction of a tensor's norm. The float64 result does not count either
# if the unconverted model differs from it by more than the second fraction, because a choice of experts differs, say.
_CLOSE = 1e-4
_LOST = 1e-2


@dataclass(frozen=True)
class Reference:
    """The results of the unconverted model, the results in float64 if the model runs in float64, and the results with
    weights changed by some ulps, which show the precision of the numbers."""

    eager: Named
    truth: Named | None
    shaken: tuple[Named, ...]

    def wrong(self, ours: Named) -> list[str]:
        """Descriptions of the tensors of `ours` that are wrong by more than rounding explains, the worst first."""
        problems = [f"{name}: is missing" for name in self.eager if name not in ours]
        problems += [f"{name}: was not there" for name in ours if name not in self.eager]
        floats = []
        for name, value in self.eager.items():
            if name not in ours:
                continue
            if not _alike(value, ours[name]):
                problems.append(f"{name}: has another shape or dtype")
            elif value.is_floating_point():
                floats.append(name)
            elif not torch.equal(value, ours[name]) and all(torch.equal(value, _of(s, name)) for s in self.shaken):
                problems.append(f"{name}: is another")
        largest = max((_norm(self.eager[name]) for name in floats), default=0.0)
        excesses = sorted(((self._excess(name, ours[name], largest), name) for name in floats), reverse=True)
        return problems + [f"{name}: {excess:.1f}x what is allowed" for excess, name in excesses if excess > 1]

    def _excess(self, name: str, ours: Tensor, largest: float) -> float:
        """The error as a multiple of the allowed error."""
        eager = self.eager[name]
        if not torch.equal(eager.isfinite(), ours.isfinite()):
            return float("inf")
        shaken = [_of(s, name) for s in self.shaken if _alike(_of(s, name), eager)]
        scale = max(_norm(eager), _SHARE * largest)
        truth = None if self.truth is None else self.truth.get(name)
        if truth is not None and truth.shape == eager.shape and _error(eager, truth) <= _LOST * scale:
            own = [_TIMES * _error(eager, truth), *(_SHAKEN_TIMES * _error(value, truth) for value in shaken)]
            return _error(ours, truth) / (max(own) + _ULPS * EPS * scale + 1e-30)
        own = [_CLOSE * scale, *(_SHAKEN_TIMES * _error(value, eager) for value in shaken)]
        return _error(ours, eager) / (max(own) + 1e-12)


def _of(named: Named, name: str) -> Tensor:
    return named.get(name, torch.empty(0))


def _alike(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and left.dtype == right.dtype


def _norm(tensor: Tensor) -> float:
    return float(_finite(tensor).norm())


def _error(left: Tensor, right: Tensor) -> float:
    return float((_finite(left) - _finite(right)).norm())


def _finite(tensor: Tensor) -> Tensor:
    return tensor.double().nan_to_num(0, 0, 0)

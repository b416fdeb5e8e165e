"""Whether a converted model's numbers are as good as the model's own."""

from dataclasses import dataclass

import torch
from torch import Tensor

EPS = torch.finfo(torch.float32).eps

Named = dict[str, Tensor]

# How many times the error that a model makes by itself is allowed, or that with its weights moved, and how many ulps of
# the tensor beside.
_TIMES = 1.5
_SHAKEN_TIMES = 3
_ULPS = 32
# A tensor may be as wrong as this part of the largest: a gradient that is zero but for rounding has no digits.
_SHARE = 0.05
# Where there is no truth, as a part of a tensor's norm. There is none either where the model itself is further from it
# than the second: a choice of experts, say, went the other way.
_CLOSE = 1e-4
_LOST = 1e-2


@dataclass(frozen=True)
class Reference:
    """What a model does as it is; what it would do in float64, if it runs in that; and what it does with its weights
    moved by some ulps, which is how much its numbers mean."""

    eager: Named
    truth: Named | None
    shaken: tuple[Named, ...]

    def wrong(self, ours: Named) -> list[str]:
        """In words, the worst first: which tensors of `ours` are wrong by more than rounding explains."""
        told = [f"{name}: is missing" for name in self.eager if name not in ours]
        told += [f"{name}: was not there" for name in ours if name not in self.eager]
        floats = []
        for name, value in self.eager.items():
            if name not in ours:
                continue
            if not _alike(value, ours[name]):
                told.append(f"{name}: has another shape or dtype")
            elif value.is_floating_point():
                floats.append(name)
            elif not torch.equal(value, ours[name]) and all(torch.equal(value, _of(s, name)) for s in self.shaken):
                told.append(f"{name}: is another")
        largest = max((_norm(self.eager[name]) for name in floats), default=0.0)
        excesses = sorted(((self._excess(name, ours[name], largest), name) for name in floats), reverse=True)
        return told + [f"{name}: {excess:.1f}x what is allowed" for excess, name in excesses if excess > 1]

    def _excess(self, name: str, ours: Tensor, largest: float) -> float:
        """The error as a multiple of what is allowed."""
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

"""Which of our norms a module computes.

torch.nn's own are known by their forward. Any other module with vectors for parameters and no modules of its own is
tried out: what it computes of a small random input, with random parameters, is held against what our norms compute. A
class's name does not count; where eps stands and what is rounded when does.
"""

import abc
import inspect
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from .. import nn as ours
from ..nn.channel_norm import batch_norm_of, group_of, instance_norm_of
from .swap import Unary

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_OURS = (
    ours.LayerNorm,
    ours.RMSNorm,
    *(getattr(ours, kind.__name__) for kind in (*_BATCH_NORMS, *_INSTANCE_NORMS, nn.GroupNorm)),
)
_WEIGHTS, _BIASES = ("weight", "gamma", "scale", "g"), ("bias", "beta", "shift", "b")


class Norm(Unary):
    """A norm, for what fuses with it: `compute(module, input, activation)`."""

    def of(self, module: nn.Module, input: Tensor) -> Tensor:
        return self.compute(module, input, "identity")

    @abc.abstractmethod
    def compute(self, module: nn.Module, input: Tensor, activation: str) -> Tensor: ...


@dataclass(frozen=True)
class RowNorm(Norm):
    """A norm over the last dimension, or over the channels of (N, C, *space) where `channels_first`.

    `weight`, `bias` and `eps` name attributes; "" for none. `promotes`: of an input that is narrower than the weight
    the output has the weight's dtype, as a product of the two would.
    """

    centered: bool
    weight: str
    bias: str
    eps: str
    weight_offset: float = 0.0
    cast_before_weight: bool = False
    promotes: bool = False
    channels_first: bool = False

    def operands(self, module: nn.Module, input: Tensor) -> tuple[Tensor, Any, Tensor | None, Tensor | None, float]:
        """What the functions of row norms take first: input, normalized_shape, weight, bias, eps."""
        weight = getattr(module, self.weight) if self.weight else None
        bias = getattr(module, self.bias) if self.bias else None
        eps = getattr(module, self.eps) if self.eps else 1e-5 if self.centered else None
        if self.promotes and weight is not None and weight.dtype != input.dtype:
            input = input.to(torch.promote_types(input.dtype, weight.dtype))
        shape = input.shape[-1:] if weight is None else weight.shape
        return input, getattr(module, "normalized_shape", shape), weight, bias, eps

    def compute(self, module: nn.Module, input: Tensor, activation: str) -> Tensor:
        if self.channels_first:
            last = self._compute(module, input.movedim(1, -1), activation)
            return last.movedim(-1, 1)
        return self._compute(module, input, activation)

    def _compute(self, module: nn.Module, input: Tensor, activation: str) -> Tensor:
        input, shape, weight, bias, eps = self.operands(module, input)
        if self.centered:
            return F.layer_norm(input, shape, weight, bias, eps, activation=activation)
        return F.rms_norm(input, shape, weight, eps, activation=activation, **self.rms_options())

    def rms_options(self) -> dict[str, Any]:
        return {"weight_offset": self.weight_offset, "cast_before_weight": self.cast_before_weight}

    def __str__(self) -> str:
        settings = [f"weight_offset={self.weight_offset:g}"] if self.weight_offset else []
        settings += ["cast_before_weight"] if self.cast_before_weight else []
        settings += ["channels first"] if self.channels_first else []
        name = "layer_norm" if self.centered else "rms_norm"
        return name + (f" ({', '.join(settings)})" if settings else "")


@dataclass(frozen=True)
class BatchNorm(Norm):
    """torch.nn's batch norms, synchronised or not."""

    def compute(self, module: nn.Module, input: Tensor, activation: str) -> Tensor:
        return self.compute_with_residual(module, input, None, activation)

    def compute_with_residual(
        self, module: nn.Module, input: Tensor, residual: Tensor | None, activation: str
    ) -> Tensor:
        group = group_of(module) if isinstance(module, nn.SyncBatchNorm) and module.training else None
        return batch_norm_of(module, input, residual, activation, group)

    def __str__(self) -> str:
        return "batch_norm"


@dataclass(frozen=True)
class GroupNorm(Norm):
    """`torch.nn.GroupNorm`."""

    def compute(self, module: nn.Module, input: Tensor, activation: str) -> Tensor:
        return F.group_norm(input, module.num_groups, module.weight, module.bias, module.eps, activation=activation)

    def __str__(self) -> str:
        return "group_norm"


@dataclass(frozen=True)
class InstanceNorm(Norm):
    """torch.nn's instance norms, whose inputs may lack the dimension of samples."""

    def compute(self, module: nn.Module, input: Tensor, activation: str) -> Tensor:
        module._check_input_dim(input)
        if input.dim() == module._get_no_batch_dim():
            return instance_norm_of(module, input.unsqueeze(0), activation).squeeze(0)
        return instance_norm_of(module, input, activation)

    def __str__(self) -> str:
        return "instance_norm"


def norm_of(module: nn.Module) -> tuple[Norm | None, str]:
    """The norm that a module computes, and where it computes none of ours but looks like a norm, why it does not."""
    if isinstance(module, _OURS):
        return None, ""
    forward = type(module).forward
    if isinstance(module, nn.LayerNorm) and forward is nn.LayerNorm.forward:
        return RowNorm(True, _named(module, "weight"), _named(module, "bias"), "eps"), ""
    if isinstance(module, nn.RMSNorm) and forward is nn.RMSNorm.forward:
        return RowNorm(False, _named(module, "weight"), "", "eps"), ""
    if isinstance(module, nn.GroupNorm) and forward is nn.GroupNorm.forward:
        return GroupNorm(), ""
    if isinstance(module, _BATCH_NORMS) and forward in [kind.forward for kind in _BATCH_NORMS]:
        return BatchNorm(), ""
    if isinstance(module, _INSTANCE_NORMS) and forward in [kind.forward for kind in _INSTANCE_NORMS]:
        return InstanceNorm(), ""
    if not _may_be_row_norm(module):
        return None, ""
    found, reason = _tried_out(module)
    return found, reason if "norm" in type(module).__name__.lower() else ""


def _named(module: nn.Module, name: str) -> str:
    return name if getattr(module, name) is not None else ""


def _may_be_row_norm(module: nn.Module) -> bool:
    own = dict(module.named_parameters(recurse=False))
    if next(module.children(), None) is not None or len(own) > 2 or any(p.dim() != 1 for p in own.values()):
        return False
    from_torch = type(module).__module__.startswith("torch.nn.modules.")
    looks = own or "norm" in type(module).__name__.lower()
    required = [p for p in inspect.signature(module.forward).parameters.values() if p.default is p.empty]
    return bool(looks) and not from_torch and len({p.numel() for p in own.values()}) <= 1 and len(required) == 1


# Trying out


def _tried_out(module: nn.Module) -> tuple[RowNorm | None, str]:
    """By float32 which norm it is, by bfloat16 when it rounds, by bfloat16 with float32 weights what comes out."""
    try:
        with torch.no_grad():
            candidates = [rule for rule in _candidates(module) if _agrees(module, rule, torch.float32, torch.float32)]
            if not candidates:
                return None, "computes what none of our row norms computes"
            for rule in _roundings(candidates[0]):
                if _agrees(module, rule, torch.bfloat16, torch.bfloat16):
                    break
            else:
                return None, "rounds bfloat16 where none of our row norms does"
            for promotes in (False, True):
                mixed = replace(rule, promotes=promotes)
                if _agrees(module, mixed, torch.bfloat16, torch.float32):
                    return mixed, ""
            return None, "of bfloat16 inputs with float32 weights it makes what none of our row norms makes"
    except Exception as error:
        return None, f"cannot be tried out: {type(error).__name__}: {error}"


def _candidates(module: nn.Module) -> Iterator[RowNorm]:
    names = [name for name, _ in module.named_parameters(recurse=False)]
    weight = next((n for n in names if n in _WEIGHTS), "")
    bias = next((n for n in names if n in _BIASES), "")
    if len(names) != bool(weight) + bool(bias):
        return
    epsilons = [name for name, value in vars(module).items() if type(value) is float and 0 < value < 0.1]
    for eps, centered, first in itertools.product([*epsilons, ""], (False, True), (False, True)):
        if bias and not centered:
            continue
        for offset in (0.0, 1.0) if weight and not centered else (0.0,):
            yield RowNorm(centered, weight, bias, eps, weight_offset=offset, channels_first=first)


def _roundings(rule: RowNorm) -> Iterator[RowNorm]:
    yield rule
    if not rule.centered:
        yield replace(rule, cast_before_weight=True)


def _agrees(module: nn.Module, rule: RowNorm, dtype: torch.dtype, weight_dtype: torch.dtype) -> bool:
    """Whether rule and module compute the same of the same. Inputs are large and so small that eps decides."""
    generator = torch.Generator().manual_seed(0)
    shadow = shadow_of(module, weight_dtype, generator)
    columns = next((p.numel() for p in shadow._parameters.values()), _columns(module))
    for scale in (1.0, 1e-3):
        shape = (2, columns, 6, 5) if rule.channels_first else (2, 60, columns)
        input = ((torch.randn(shape, generator=generator) + 0.5) * scale).to(dtype)
        try:
            theirs = shadow.forward(input.clone())
        except (RuntimeError, ValueError, IndexError):
            return False
        result = rule.compute(shadow, input, "identity")
        if not isinstance(theirs, Tensor) or theirs.shape != result.shape or theirs.dtype != result.dtype:
            return False
        # Where two roundings fall elsewhere, a tenth of all results and more do.
        # Of narrow inputs and wide weights ours may be more exact; there the dtype is what is in question.
        rtol = 1e-5 if dtype == weight_dtype == torch.float32 else 0.0 if dtype == weight_dtype else 0.02
        differ = ~torch.isclose(theirs.double(), result.double(), rtol=rtol, atol=1e-6 * scale)
        if differ.double().mean() > 0.01:
            return False
    return True


def _columns(module: nn.Module) -> int:
    shape = getattr(module, "normalized_shape", 48)
    return math.prod(shape) if isinstance(shape, tuple | list | torch.Size) else int(shape)


def shadow_of(module: nn.Module, dtype: torch.dtype, generator: torch.Generator) -> nn.Module:
    """The module on the CPU with random parameters of that dtype, without hooks. The module itself is not touched."""
    shadow = object.__new__(type(module))
    shadow.__dict__.update(nn.Module().__dict__ | {k: v for k, v in vars(module).items() if not k.endswith("_hooks")})
    shadow.__dict__["_parameters"] = {
        name: p if p is None else nn.Parameter((torch.rand(p.shape, generator=generator) + 0.5).to(dtype))
        for name, p in module._parameters.items()
    }
    return shadow

"""Norms as rules: what a converted norm computes, and of which inputs; here those of rows, in `channel_norms` torch's
others. How a module is known as one: `norm_trials`."""

import abc
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import functional as F
from ..code.reachability import CodeSnapshot, Settings, is_unchanged
from ..operands import is_ordinary
from .rule import Unary

# Of the input and of the weight. Each is tried.
Dtypes = tuple[torch.dtype, torch.dtype]
# What the functions of row norms take first: input, normalized_shape, weight, bias, eps.
Operands = tuple[Tensor, Any, Tensor | None, Tensor | None, float]


class Case(NamedTuple):
    """Dtypes in which a norm computes what ours does: those of input and weight, that of the output, and whether eager
    torch keeps the input itself for backward, and not a wider copy of it: one that wants a gradient, and one that does
    not."""

    dtypes: Dtypes
    output: torch.dtype
    keeps_input: bool
    keeps_data: bool


class Norm(Unary):
    """A norm, for what fuses with it: `compute(module, input, activation)`, or None where the original has to."""

    def of(self, module: nn.Module, input: Tensor) -> Tensor | None:
        return self.compute(module, input, "identity")

    @abc.abstractmethod
    def compute(self, module: nn.Module, input: Tensor, activation: str) -> Tensor | None: ...


@dataclass(frozen=True)
class RowNorm(Norm):
    """A norm over the last dimension, or over the channels of (N, C, *space) where `channels_first`.

    `weight` and `bias` name parameters; "" for none. `eps` is a number, or names an attribute. Of a norm that was tried
    out, `settings` and `code` are those it was tried with, `shapes` those of its parameters, and `cases` those in which
    it computes what ours does; None for all. `copied`: an input that eager torch does not keep is kept as a copy,
    because the model may write to it later. `contiguous`: over channels, of a contiguous map comes a contiguous one;
    `dimensions` are those of the maps that were tried. `strided`: the output lies as the input does.
    """

    centered: bool
    weight: str
    bias: str
    eps: str | float
    weight_offset: float = 0.0
    cast_before_weight: bool = False
    channels_first: bool = False
    settings: Settings = ()
    code: CodeSnapshot | None = None
    cases: tuple[Case, ...] | None = None
    copied: bool = False
    contiguous: bool = False
    dimensions: int = 0
    shapes: tuple[tuple[str, torch.Size], ...] = ()
    strided: bool = False

    @property
    def takes_bfloat16(self) -> bool:
        """Whether it computes bfloat16, input and weight, as ours does."""
        return self.cases is None or any(case.dtypes == (torch.bfloat16, torch.bfloat16) for case in self.cases)

    def operands(self, module: nn.Module, input: Tensor) -> Operands:
        """What the functions of row norms take first: input, normalized_shape, weight, bias, eps."""
        return self._operands(module, input, *self._coefficients(module))

    def _coefficients(self, module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias. Each load of them is a call in Python: the module itself does not hold them, but a dict of
        its own."""
        weight = getattr(module, self.weight) if self.weight else None
        return weight, (getattr(module, self.bias) if self.bias else None)

    def _operands(self, module: nn.Module, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Operands:
        eps: Any = getattr(module, self.eps) if type(self.eps) is str else self.eps
        if self.cases is None:
            return input, module.normalized_shape, weight, bias, eps
        # (C, 1, 1) is as good as (C,).
        weight = weight if weight is None or weight.dim() == 1 else weight.flatten()
        bias = bias if bias is None or bias.dim() == 1 else bias.flatten()
        return input, (input.shape[-1:] if weight is None else weight.shape), weight, bias, eps

    def takes(self, module: nn.Module, input: Tensor) -> bool:
        """Whether ours computes what the module does of that input, as it is, and in its dtype."""
        weight, bias = self._coefficients(module)
        case = self._case(module, input, weight, bias)
        if case is None or case.output != input.dtype or not input.is_contiguous():
            return False
        return not self._must_copy(input, weight, case)

    def _case(self, module: nn.Module, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Case | None:
        """None where it is not known what the module computes."""
        if not are_coefficients(input, weight, bias):
            return None
        if self.cases is not None and not self._fits(module, input, weight):
            return None
        dtypes = input.dtype, input.dtype if weight is None else weight.dtype
        if self.cases is None:
            shape = module.normalized_shape
            if not isinstance(shape, tuple) or input.shape[-len(shape) :] != shape:
                return None
            fused = self.centered or input.is_cuda
            return Case(dtypes, input.dtype, fused or input.dtype.itemsize >= 4, fused)
        known = (case for case in self.cases if case.dtypes == dtypes)
        return next(known, None) if is_unchanged(module, self.settings, self.code) else None

    def _fits(self, module: nn.Module, input: Tensor, weight: Tensor | None) -> bool:
        """Whether the input, and the parameters, are of shapes like those that were tried."""
        if any(getattr(module, name).shape != shape for name, shape in self.shapes):
            return False
        if self.channels_first and (input.dim() != self.dimensions or not lies_as_a_map(input)):
            return False
        columns = input.shape[1 if self.channels_first else -1] if input.dim() > 1 else 0
        return columns > 0 and (weight is None or weight.numel() == columns)

    def _must_copy(self, input: Tensor, weight: Tensor | None, case: Case) -> bool:
        """Whether ours has to keep a copy of the input: eager torch does not keep it, and it may be written to, or be a
        part of a larger tensor."""
        if not torch.is_grad_enabled() or (case.keeps_input if input.requires_grad else case.keeps_data):
            return False
        if not input.requires_grad:
            return weight is not None and weight.requires_grad
        return self.copied or input.untyped_storage().nbytes() > input.numel() * input.itemsize

    def compute(self, module: nn.Module, input: Tensor, activation: str) -> Tensor | None:
        weight, bias = self._coefficients(module)
        case = self._case(module, input, weight, bias)
        if case is None or (self.channels_first and input.dim() < 3):
            return None
        if case.output != input.dtype:
            input = input.to(case.output)
        elif self._must_copy(input, weight, case):
            input = input.clone()
        if not self.channels_first:
            # Maps in channels_last, of which torch's own RMSNorm makes such, are its own affair.
            if self.cases is None and not self.centered and not input.is_contiguous() and lies_as_a_map(input):
                return None
            if input.is_contiguous() or not self.strided:
                return self._compute(activation, *self._operands(module, input, weight, bias))
            order = _order_in_memory(input)
            if order is None:
                return None
            rows = self._compute(activation, *self._operands(module, input.permute(order), weight, bias))
            return _as_no_view(rows.permute([order.index(dimension) for dimension in range(input.dim())]))
        output = self._compute(activation, *self._operands(module, input.movedim(1, -1), weight, bias)).movedim(-1, 1)
        if self.contiguous and input.is_contiguous() and not output.is_contiguous():
            return output.contiguous()
        return _as_no_view(output)

    def _compute(
        self, activation: str, input: Tensor, shape: Any, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        if self.centered:
            return F.layer_norm(input, shape, weight, bias, eps, activation=activation)
        return F.rms_norm(input, shape, weight, eps, activation=activation, **self.rms_options())

    def computed_by_torch(self, module: nn.Module, input: Tensor) -> Tensor | None:
        """The same by torch's own function, if it has that."""
        if self.weight_offset or self.cast_before_weight:
            return None
        rows, shape, weight, bias, eps = self.operands(module, input.movedim(1, -1) if self.channels_first else input)
        if self.centered:
            output = nn.functional.layer_norm(rows, shape, weight, bias, eps)
        else:
            output = nn.functional.rms_norm(rows, shape, weight, eps)
        output = output.movedim(-1, 1) if self.channels_first else output
        return output.contiguous() if self.contiguous else output

    def rms_options(self) -> dict[str, Any]:
        return {"weight_offset": self.weight_offset, "cast_before_weight": self.cast_before_weight}

    def __str__(self) -> str:
        settings = [f"weight_offset={self.weight_offset:g}"] if self.weight_offset else []
        settings += ["cast_before_weight"] if self.cast_before_weight else []
        settings += ["channels first"] if self.channels_first else []
        name = "layer_norm" if self.centered else "rms_norm"
        return name + (f" ({', '.join(settings)})" if settings else "")


def _as_no_view(output: Tensor) -> Tensor:
    """The same memory, but no view, as what a norm makes is none: such may be written to in place, and detached."""
    return torch.ops.aten._unsafe_view.default(output, output.shape)


def are_coefficients(input: Tensor, *coefficients: Tensor | None) -> bool:
    """Whether torch's norms take these beside the input: of its dtype, or of float32 beside 16 bits."""
    dtype = None
    for coefficient in coefficients:
        if coefficient is None:
            continue
        if not is_ordinary(coefficient) or (dtype is not None and coefficient.dtype is not dtype):
            return False
        dtype = coefficient.dtype
    return dtype is None or dtype is input.dtype or (dtype is torch.float32 and input.dtype.itemsize < 4)


def _order_in_memory(input: Tensor) -> list[int] | None:
    """The dimensions of rows, the outermost first, as torch's elementwise operations keep them; None where the last is
    not innermost, or where some elements are one."""
    strides = input.stride()
    if any(stride == 0 and size > 1 for stride, size in zip(strides, input.shape, strict=True)):
        return None
    order = sorted(range(input.dim()), key=lambda dimension: -strides[dimension])
    return order if order[-1] == input.dim() - 1 else None


def lies_as_a_map(input: Tensor) -> bool:
    """Whether it is contiguous, or a dense map in channels_last, and has elements."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = input.dim() in formats and input.is_contiguous(memory_format=formats[input.dim()])
    return input.numel() > 0 and (last or input.is_contiguous())

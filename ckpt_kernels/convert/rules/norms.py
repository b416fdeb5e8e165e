"""Rules for norms: the base class, and the rule for norms over rows.

`channel_norms` has the rules for torch's other norms, and `norm_trials` recognises norms.
"""

import abc
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import functional as F
from ... import recompute, thin
from ...functional.map_norm import map_norm
from ..code.reachability import is_unchanged
from ..code.settings import Settings
from ..code.snapshots import CodeSnapshot
from ..operands import is_ordinary
from ..torch_patches import are_patched
from .rule import UnaryRule

# The dtypes of the input and of the weight.
Dtypes = tuple[torch.dtype, torch.dtype]
# The first arguments of the functional row norms: input, normalized_shape, weight, bias, eps.
Operands = tuple[Tensor, Any, Tensor | None, Tensor | None, float]


class Case(NamedTuple):
    """Dtypes of input, weight and output for which the fused norm computes the same as a module.

    `keeps_input`: whether eager torch saves an input that requires a gradient itself, and not a wider copy;
    `keeps_data`: the same for an input that requires no gradient.
    """

    dtypes: Dtypes
    output: torch.dtype
    keeps_input: bool
    keeps_data: bool


class Norm(UnaryRule):
    """A rule for norms, which other rules can fuse with an activation."""

    def apply(self, module: nn.Module, input: Tensor) -> Tensor | None:
        return self.compute(module, input, "identity")

    @abc.abstractmethod
    def compute(self, module: nn.Module, input: Tensor, activation: str) -> Tensor | None:
        """The activation of the norm of the input; None where the original forward must compute the norm."""
        ...


@dataclass(frozen=True)
class RowNorm(Norm):
    """The rule for layer and RMS norms over the last dimension, or over the channels of (N, C, *space).

    Attributes:
        centered: whether the mean is subtracted: LayerNorm, else RMSNorm.
        weight, bias: names of parameters; "" for none.
        eps: a number, or the name of an attribute.
        weight_offset, cast_before_weight: options of `functional.rms_norm`.
        channels_first: whether the norm is over the channels of (N, C, *space).
        settings, code: for a norm that was tried, the settings and the code at the trial.
        cases: for a norm that was tried, the dtypes for which the fused norm computes the same; None for all.
        contiguous: for a norm over channels, whether the output of a contiguous input is contiguous.
        dimensions: for a norm that was tried, the numbers of dimensions of inputs for which the fused norm computes the
            same.
        shapes: for a norm that was tried, names and shapes of the parameters, None for one that is None.
        strided: whether the output has the strides of the input; over channels, whether those of a map whose channels
            are last.
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
    contiguous: bool = False
    dimensions: tuple[int, ...] = ()
    shapes: tuple[tuple[str, torch.Size | None], ...] = ()
    strided: bool = False

    @property
    def is_torchs_layer_norm(self) -> bool:
        """Whether this is the rule for `torch.nn.LayerNorm`."""
        return self.cases is None and self.centered

    def by_plan(self, module: Any, input: Any) -> Tensor | None:
        # A plan exists only for shapes and dtypes that torch's layer norm takes too, and its input is never copied.
        if not self.is_torchs_layer_norm or type(module.normalized_shape) is not tuple:
            return None
        weight, bias = module.weight, module.bias
        options = module.normalized_shape, module.eps, True, "identity", "identity", 0.0, False
        plan = thin.plan_of("row_norm", (input, weight, bias), options)
        if plan is None or are_patched():
            return None
        return plan(input, None, None, None, None, weight, bias, None)[0]

    @property
    def takes_bfloat16(self) -> bool:
        """Whether the fused norm computes the same for input and weight in bfloat16."""
        return self.cases is None or any(case.dtypes == (torch.bfloat16, torch.bfloat16) for case in self.cases)

    def operands(self, module: nn.Module, input: Tensor) -> Operands:
        """The first arguments of the functional row norms: input, normalized_shape, weight, bias, eps."""
        return self._operands(module, input, *self._coefficients(module))

    def _coefficients(self, module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias. Callers pass them on, because each load runs `nn.Module.__getattr__`, a call in Python."""
        weight = getattr(module, self.weight) if self.weight else None
        return weight, (getattr(module, self.bias) if self.bias else None)

    def _operands(self, module: nn.Module, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Operands:
        eps: Any = getattr(module, self.eps) if type(self.eps) is str else self.eps
        if self.cases is None:
            return input, module.normalized_shape, weight, bias, eps
        # A weight may have the shape (C, 1, 1) instead of (C,).
        weight = weight if weight is None or weight.dim() == 1 else weight.flatten()
        bias = bias if bias is None or bias.dim() == 1 else bias.flatten()
        return input, (input.shape[-1:] if weight is None else weight.shape), weight, bias, eps

    def takes(self, module: nn.Module, input: Tensor) -> bool:
        """Whether the fused norm computes the same from this input without a copy or a cast, in the same dtype."""
        weight, bias = self._coefficients(module)
        case = self._case(module, input, weight, bias)
        if case is None or case.output != input.dtype or not input.is_contiguous():
            return False
        return not self._must_copy(input, weight, case)

    def _case(self, module: nn.Module, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Case | None:
        """The case of these dtypes; None where the fused norm may compute something else than the module."""
        if not are_coefficients(input, weight, bias):
            return None
        if self.cases is not None and not self._fits(module, input, weight, bias):
            return None
        dtypes = input.dtype, input.dtype if weight is None else weight.dtype
        if self.cases is None:
            shape = module.normalized_shape
            if not isinstance(shape, tuple) or input.shape[-len(shape) :] != shape:
                return None
            fused = self.centered or input.is_cuda
            return Case(dtypes, input.dtype, fused or input.dtype.itemsize >= 4, fused)
        matching = (case for case in self.cases if case.dtypes == dtypes)
        return next(matching, None) if is_unchanged(module, self.settings, self.code) else None

    def _fits(self, module: nn.Module, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
        """Whether input and parameters have shapes like those in the trial."""
        loaded = {self.weight: weight, self.bias: bias}
        for name, shape in self.shapes:
            parameter = loaded[name] if name in loaded else getattr(module, name, None)
            if (None if parameter is None else parameter.shape) != shape:
                return False
        if input.dim() not in self.dimensions or (self.channels_first and not is_dense_map(input)):
            return False
        columns = input.shape[1 if self.channels_first else -1]
        return columns > 0 and (weight is None or weight.numel() == columns)

    def _must_copy(self, input: Tensor, weight: Tensor | None, case: Case) -> bool:
        """Whether the fused norm must save a copy of the input.

        This is so where eager torch saves a wider copy, or nothing: the model may write to the input later, and a
        storage that the input is a view of must not stay alive.
        """
        is_kept = case.keeps_input if input.requires_grad else case.keeps_data
        is_saved = input.requires_grad or (weight is not None and weight.requires_grad)
        return torch.is_grad_enabled() and is_saved and not is_kept

    def compute(self, module: nn.Module, input: Tensor, activation: str) -> Tensor | None:
        weight, bias = self._coefficients(module)
        case = self._case(module, input, weight, bias)
        if case is None:
            return None
        if case.output != input.dtype:
            input = input.to(case.output)
        elif self._must_copy(input, weight, case):
            input = recompute.copied(input)
        if not self.channels_first:
            # For maps in channels_last, torch's own RMSNorm returns channels_last, which the fused norm does not.
            if self.cases is None and not self.centered and not input.is_contiguous() and is_dense_map(input):
                return None
            if input.is_contiguous() or not self.strided:
                return self._fused(activation, *self._operands(module, input, weight, bias))
            order = _order_in_memory(input)
            if order is None:
                return None
            rows = self._fused(activation, *self._operands(module, input.permute(order), weight, bias))
            return as_no_view(rows.permute([order.index(dimension) for dimension in range(input.dim())]))
        output = self._over_channels(activation, *self._operands(module, input, weight, bias))
        if output is not None:
            return output
        output = self._fused(activation, *self._operands(module, input.movedim(1, -1), weight, bias)).movedim(-1, 1)
        if self._returns_contiguous(input) and not output.is_contiguous():
            return output.contiguous()
        return as_no_view(output)

    def _returns_contiguous(self, input: Tensor) -> bool:
        """Whether the norm over the channels of this map is contiguous."""
        return self.contiguous and (input.is_contiguous() or not self.strided)

    def _over_channels(
        self, activation: str, input: Tensor, _: Any, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor | None:
        """The norm from the map as it lies, for an input that `is_dense_map`; None where the channels must be moved.

        That is so on other devices, where a dimension has one element, so that both layouts are one, and for the
        gradient of a bias alone, which then keeps nothing.
        """
        if type(input) is not Tensor or not input.is_cpu or 1 in input.shape[1:] or torch.compiler.is_compiling():
            return None
        is_alone = not (input.requires_grad or (weight is not None and weight.requires_grad))
        if is_alone and bias is not None and bias.requires_grad and torch.is_grad_enabled():
            return None
        channels_last = not self._returns_contiguous(input)
        options = self.weight_offset, self.cast_before_weight, channels_last
        return map_norm(input, weight, bias, (eps, self.centered, activation, *options))

    def _fused(
        self, activation: str, input: Tensor, shape: Any, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        if self.centered:
            return F.layer_norm(input, shape, weight, bias, eps, activation=activation)
        return F.rms_norm(input, shape, weight, eps, activation=activation, **self.rms_options())

    def computed_by_torch(self, module: nn.Module, input: Tensor) -> Tensor | None:
        """The norm by torch's own function; None where torch has no such function."""
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
        """The keyword arguments for `functional.rms_norm`."""
        return {"weight_offset": self.weight_offset, "cast_before_weight": self.cast_before_weight}

    def __str__(self) -> str:
        settings = [f"weight_offset={self.weight_offset:g}"] if self.weight_offset else []
        settings += ["cast_before_weight"] if self.cast_before_weight else []
        settings += ["channels first"] if self.channels_first else []
        name = "layer_norm" if self.centered else "rms_norm"
        return name + (f" ({', '.join(settings)})" if settings else "")


def as_no_view(output: Tensor) -> Tensor:
    """The same memory as a tensor that is no view, so that in-place writes and `detach_` work as on a norm's output."""
    result = torch.ops.aten._unsafe_view.default(output, output.shape)
    # A recipe for a copy of the result asks whether the result has been written to.
    recompute.note(result, output, watches=True)
    return result


def are_coefficients(input: Tensor, *coefficients: Tensor | None) -> bool:
    """Whether torch's norms take these coefficients: in the input's dtype, or in float32 beside a 16-bit input."""
    dtype = None
    for coefficient in coefficients:
        if coefficient is None:
            continue
        if not is_ordinary(coefficient) or (dtype is not None and coefficient.dtype is not dtype):
            return False
        dtype = coefficient.dtype
    return dtype is None or dtype is input.dtype or (dtype is torch.float32 and input.dtype.itemsize < 4)


def _order_in_memory(input: Tensor) -> list[int] | None:
    """The dimensions by decreasing stride, an order that torch's elementwise operations preserve.

    None where the last dimension is not the innermost, or where elements overlap in memory.
    """
    strides = input.stride()
    if any(stride == 0 and size > 1 for stride, size in zip(strides, input.shape, strict=True)):
        return None
    order = sorted(range(input.dim()), key=lambda dimension: -strides[dimension])
    return order if order[-1] == input.dim() - 1 else None


def is_dense_map(input: Tensor) -> bool:
    """Whether the input has elements and is contiguous, in torch's default format or in channels_last."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    is_channels_last = input.dim() in formats and input.is_contiguous(memory_format=formats[input.dim()])
    return input.numel() > 0 and (is_channels_last or input.is_contiguous())

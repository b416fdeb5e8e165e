"""The map-norm op: LayerNorm and RMSNorm over the channels of (samples, channels, *space), with an activation after it.

The op computes maps as they lie in memory, contiguous or with channels last. Kept for backward are the input and the
statistics of each pixel. Only the native backend on the CPU has kernels for maps; elsewhere, and for one channel, the
pixels become rows of a row norm.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..backends import reference
from ..backends.blocks import RowNorm, RowNormOptions
from .block import Block
from .channel_layout import last_strides
from .operands import as_rows, in_dtypes_of, vector, wide_empty, zero
from .row_norm import rebuilt as rebuilt_rows
from .row_norm import row_norm


class MapNormOptions(NamedTuple):
    """The options of a map norm, as in `RowNormOptions`. The output has `channels_last`, or is contiguous."""

    eps: float
    centered: bool
    activation: str
    weight_offset: float
    cast_before_weight: bool
    channels_last: bool

    def of_rows(self, channels: int) -> RowNormOptions:
        """The options of the row norm of the pixels."""
        eps, centered, activation, offset, cast, _ = self
        return RowNormOptions(channels, eps, centered, "identity", activation, offset, cast)


class _MapNorm(Block):
    name = "map_norm"
    operands = "Tensor input, Tensor? weight, Tensor? bias"
    kept = "Tensor input, Tensor? weight, Tensor? bias, Tensor? mean, Tensor rstd"
    differentiable = 3
    options = MapNormOptions
    results = ("output", "mean", "rstd")

    def empty(self, input: Tensor, weight: Tensor | None, bias: Tensor | None, options: Any) -> Sequence[Tensor | None]:
        pixels, dtype = input.numel() // input.shape[1], reference.compute_dtype(input.dtype)
        mean = input.new_empty(pixels, dtype=dtype) if options.centered else None
        return _empty(input, options.channels_last), mean, input.new_empty(pixels, dtype=dtype)

    def forward(self, input: Tensor, weight: Tensor | None, bias: Tensor | None, options: Any) -> Sequence:
        results = output, mean, rstd = self.empty(input, weight, bias, options)
        if (backend := _map_backend(input)) is not None:
            eps, _, *others, _ = options
            operands = (as_map(input), vector(weight), vector(bias), mean, rstd, output)
            backend.map_norm_forward(*operands, eps, *others, False)
            return results
        rows = (input.movedim(1, -1), None, None, None, None, weight, bias, None)
        of_rows, _, mean, rstd = row_norm.forward(*rows, options.of_rows(input.shape[1]))
        return output.copy_(of_rows.movedim(-1, 1)), mean, rstd

    def keep(self, arguments: Sequence[Any], results: Sequence[Tensor | None], wanted: Sequence[bool]) -> tuple:
        return (*arguments[:3], *results[1:]), arguments[-1]

    def recipe(self, ctx: Any, arguments: Sequence[Any], results: Sequence[Tensor | None]) -> tuple:
        """The norm of the kept input, with the kept statistics."""
        options = arguments[-1]
        return (lambda *kept: rebuilt(kept, options)), (*arguments[:3], *results[1:])

    def gradients(
        self, grads: Sequence[Tensor | None], kept: Sequence[Tensor | None], options: Any, wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        input, weight, bias, mean, rstd = kept
        mean = mean if options.centered else None
        grad_input, *affine = self.empty_gradients(grads, kept, options, wanted)
        if (backend := _map_backend(input)) is not None:
            affine = [wide_empty(t, rstd.dtype) if w else None for t, w in zip((weight, bias), wanted[1:], strict=True)]
            operands = (as_map(grads[0]), as_map(input), vector(weight), vector(bias), mean, rstd)
            _, _, *others, _ = options
            backend.map_norm_backward(*operands, grad_input, *affine, *others)
            return in_dtypes_of((input, weight, bias), (grad_input, *affine))
        if not input.numel():
            zero(*affine)
            return grad_input, *affine
        of_rows = (input.movedim(1, -1), None, None, None, weight, bias, None, mean, rstd)
        wanted = [wanted[0], False, False, False, False, *wanted[1:]]
        gradients = row_norm.gradients(
            (grads[0].movedim(1, -1), None), of_rows, options.of_rows(input.shape[1]), wanted
        )
        if grad_input is not None:
            grad_input.copy_(gradients[0].movedim(-1, 1))
        return grad_input, *gradients[-2:]

    def empty_gradients(
        self, grads: Sequence[Tensor | None], kept: Sequence[Tensor | None], options: Any, wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        input = kept[0]
        grad_input = _empty(input, not input.is_contiguous()) if wanted[0] else None
        return grad_input, *super().empty_gradients(grads, kept[1:3], options, wanted[1:])

    def composition(self, input: Tensor, weight: Tensor | None, bias: Tensor | None, options: Any) -> Sequence:
        channels, pixels = input.shape[1], input.movedim(1, -1)
        rows = (as_rows(pixels, channels), None, None, weight, bias, None, None, None)
        output, _, mean, rstd = reference.row_norm(RowNorm(*rows, options.of_rows(channels)))
        output = output.reshape(pixels.shape).movedim(-1, 1)
        return output if options.channels_last else output.contiguous(), mean, rstd

    def first_order(
        self, grads: Sequence[Tensor | None], kept: Sequence[Tensor | None], options: Any, wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        def block(*operands: Tensor | None) -> Sequence[Tensor]:
            return self.composition(*operands, options)[:1]

        return reference.gradients(block, kept[:3], grads, wanted)


def is_channels_last(tensor: Tensor) -> bool:
    """Whether the tensor is dense, and the channels are last in memory."""
    return tensor.stride() == last_strides(tensor.shape)


def as_map(tensor: Tensor) -> Tensor:
    """The tensor if the kernels take the layout, else a contiguous copy."""
    return tensor if is_channels_last(tensor) else tensor.contiguous()


def rebuilt(kept: Sequence[Tensor | None], options: MapNormOptions) -> Tensor:
    """Recomputes the output from the kept tensors."""
    input, weight, bias, mean, rstd = kept
    output = _empty(input, options.channels_last)
    if (backend := _map_backend(input)) is None:
        rows = (input.movedim(1, -1), None, None, None, weight, bias, None, mean, rstd)
        return output.copy_(rebuilt_rows(rows, options.of_rows(input.shape[1])).movedim(-1, 1))
    eps, _, *others, _ = options
    operands = (as_map(input), vector(weight), vector(bias), mean if options.centered else None, rstd, output)
    backend.map_norm_forward(*operands, eps, *others, True)
    return output


def _empty(input: Tensor, channels_last: bool) -> Tensor:
    """Allocates a dense map of the input's shape."""
    if not channels_last:
        return torch.empty(input.shape, dtype=input.dtype, device=input.device)
    return torch.empty_strided(input.shape, last_strides(input.shape), dtype=input.dtype, device=input.device)


def _map_backend(input: Tensor) -> ModuleType | None:
    """The backend of the input, if it has kernels for maps."""
    backend = backends.select(input)
    has_kernels = input.device.type in getattr(backend, "MAP_NORMS", ()) and input.shape[1] > 1 and input.numel() > 0
    return backend if has_kernels else None


map_norm = _MapNorm()

"""The glu ops: activation(gate) * value, from two tensors, or from one that packs both, with optional limits of gate
and value and an offset of the value."""

import math
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from .. import backends
from ..arguments import one_of
from ..backends import reference
from .block import Block
from .operands import (
    as_matrices,
    as_rows,
    contiguous,
    elementwise_empty,
    memory_order,
    reuse_or_allocate,
    with_elementwise_strides,
)
from .sharding import Sharding, every_dim, like_input


def forward(operands: Sequence[Tensor], options: "PackedOptions") -> Tensor:
    """The output of (gate, value), or of (packed,)."""
    if len(operands) == 2:
        return glu.forward(*operands, options.of_two)[0]
    return packed_glu.forward(*operands, options)[0]


def gradient(
    grad_output: Tensor, operands: Sequence[Tensor], options: "PackedOptions", wanted: Sequence[bool], rewrite: bool
) -> tuple[list[Tensor | None], Tensor | None]:
    """The gradients of (gate, value), or of (packed,); and the output, recomputed, if `rewrite`.

    The caller gives `grad_output` away: a gradient overwrites that tensor, element by element, if the sizes fit.
    """
    if len(operands) == 1:
        output = packed_glu.empty(*operands)[0] if rewrite else None
        return [_packed_gradient(grad_output, *operands, output, options)], output
    gate, value = operands
    grad_output = grad_output.contiguous()
    output = contiguous(grad_output) if rewrite else None
    grads = [reuse_or_allocate(grad_output, gate) if wanted[0] else None, contiguous(value) if wanted[1] else None]
    if grad_output.numel():
        matrices = as_matrices(grad_output, grad_output, gate, value, *grads, output)
        backends.select(grad_output).glu_backward(*matrices, *options.of_two.of_gradients(gate.dtype))
    return grads, None if output is None else with_elementwise_strides(gate, output)


# glu: two tensors


# From torch 2.14 on, the gradient of `torch.clamp` is 0 at the limit itself, where it was 1 before.
CLAMP_STOPS_AT_LIMIT = TorchVersion(torch.__version__) >= (2, 14)


class Options(NamedTuple):
    activation: str
    limit: float = math.inf
    offset: float = 0.0

    def of_gradients(self, dtype: torch.dtype) -> "Options":
        """The options with which a kernel computes the gradients of operands of this dtype.

        Kernels let the gradient through at the limit itself. Where torch's clamp does not, their limit is the number
        before, which changes other gradients by an ulp.
        """
        if self.limit == math.inf or not CLAMP_STOPS_AT_LIMIT:
            return self
        return self._replace(limit=_number_before(self.limit, dtype))


def _number_before(limit: float, dtype: torch.dtype) -> float:
    """The number before a positive limit in the dtype that kernels compute in."""
    if dtype is torch.float64:
        return math.nextafter(limit, 0.0)
    # Numbers of float32 above 0 have the order of their bits.
    (bits,) = struct.unpack("i", struct.pack("f", limit))
    return struct.unpack("f", struct.pack("i", bits - 1))[0]


class _Glu(Block):
    name = "glu"
    operands = "Tensor gate, Tensor value"
    differentiable = 2
    options = Options
    elementwise = True
    sharding = Sharding(every_dim, (like_input, like_input), (like_input,))

    def empty(self, gate: Tensor, *rest: Any) -> tuple[Tensor]:
        return (elementwise_empty(gate),)

    def forward(self, gate: Tensor, value: Tensor, options: Options) -> tuple[Tensor]:
        output = elementwise_empty(gate)
        if output.numel():
            backends.select(gate).glu_forward(*as_matrices(output, gate, value, output), *options)
        return (output,)

    def empty_gradients(
        self, grads: Sequence[Tensor], kept: Sequence[Tensor], options: Options, wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        """Allocates both gradients with the strides of grad_output, or of gate if grad_output is expanded; with a limit
        with the strides of the output, as torch's clamp does."""
        like = (elementwise_empty(kept[0]), *grads) if options.limit < math.inf else (*grads, *kept)
        return [elementwise_empty(*like) if w else None for w in wanted]

    def gradients(
        self, grads: Sequence[Tensor], kept: Sequence[Tensor], options: Options, wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        results = self.empty_gradients(grads, kept, options, wanted)
        like = next((t for t in results if t is not None), None)
        if like is not None and like.numel():
            matrices = as_matrices(like, *grads, *kept, *results)
            backends.select(like).glu_backward(*matrices, None, *options.of_gradients(like.dtype))
        return results

    def composition(self, gate: Tensor, value: Tensor, options: Options) -> tuple[Tensor]:
        return (reference.glu(gate, value, *options),)


glu = _Glu()


# packed_glu: one tensor, whose gradient is written as one


LAYOUTS = ("gate_first", "value_first", "interleaved")


def layout_name(layout: str) -> str:
    """Returns `layout` if it is one of `LAYOUTS`; else raises ValueError."""
    return one_of(layout, LAYOUTS, "layout")


def unpack(packed: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Gate and value as views of a tensor whose last dimension packs them."""
    if layout == "interleaved":
        return packed[..., ::2], packed[..., 1::2]
    first, second = packed.chunk(2, -1)
    return (first, second) if layout == "gate_first" else (second, first)


class _Cut(NamedTuple):
    """How a packed tensor and its output are cut into rows.

    `order` has the dimensions from the outermost to the innermost in memory, `columns` the length of a row of gate or
    value, and `layout` how a row of both packs them. If the packed dimension is not the innermost, a half includes all
    inner dimensions; with an interleaved layout, gate and value alternate by all that one index includes.
    """

    order: list[int]
    columns: int
    layout: str

    def matrix(self, tensor: Tensor | None) -> Tensor | None:
        """The output or its gradient as a matrix."""
        return None if tensor is None else as_rows(tensor.permute(self.order), self.columns)

    def matrices(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """Gate and value as matrices: views of a dense tensor, or of a copy if the strides need one."""
        return unpack(as_rows(packed.permute(self.order), 2 * self.columns), self.layout)


def _cut(packed: Tensor, layout: str) -> _Cut:
    """How to cut a packed tensor."""
    last, half = packed.dim() - 1, packed.shape[-1] // 2
    if packed.is_contiguous():
        return _Cut(list(range(last + 1)), half, layout)
    order = memory_order(torch.empty_like(packed, device="meta").stride())
    inner = math.prod(packed.shape[dim] for dim in order[order.index(last) + 1 :])
    if layout == "interleaved" and inner > 1:
        return _Cut(order, inner, "gate_first")
    return _Cut(order, inner * half, layout)


class PackedOptions(NamedTuple):
    activation: str
    layout: str
    limit: float = math.inf
    offset: float = 0.0

    @property
    def of_two(self) -> Options:
        """The options of gate and value as two tensors."""
        return Options(self.activation, self.limit, self.offset)


class _PackedGlu(Block):
    name = "packed_glu"
    operands = "Tensor packed"
    differentiable = 1
    options = PackedOptions
    elementwise = True
    # The packed dimension must not be split.
    sharding = Sharding(lambda arguments: range(arguments[0].dim() - 1), (like_input,), (like_input,))

    def empty(self, packed: Tensor, *rest: Any) -> tuple[Tensor]:
        shape = (*packed.shape[:-1], packed.shape[-1] // 2)
        if packed.is_contiguous():
            return (torch.empty(shape, dtype=packed.dtype, device=packed.device),)
        order = memory_order(torch.empty_like(packed, device="meta").stride())
        return (torch.empty_permuted(shape, order, dtype=packed.dtype, device=packed.device),)

    def forward(self, packed: Tensor, options: PackedOptions) -> tuple[Tensor]:
        (output,) = results = self.empty(packed)
        if output.numel():
            cut = _cut(packed, options.layout)
            backends.select(packed).glu_forward(*cut.matrices(packed), cut.matrix(output), *options.of_two)
        return results

    def empty_gradients(
        self, grads: Sequence[Tensor], kept: Sequence[Tensor], options: PackedOptions, wanted: Sequence[bool]
    ) -> tuple[Tensor]:
        return (elementwise_empty(*kept),)

    def gradients(
        self, grads: Sequence[Tensor], kept: Sequence[Tensor], options: PackedOptions, wanted: Sequence[bool]
    ) -> tuple[Tensor]:
        return (_packed_gradient(*grads, *kept, None, options),)

    def composition(self, packed: Tensor, options: PackedOptions) -> tuple[Tensor]:
        return (reference.glu(*unpack(packed, options.layout), *options.of_two),)


packed_glu = _PackedGlu()


def _packed_gradient(grad_output: Tensor, packed: Tensor, output: Tensor | None, options: PackedOptions) -> Tensor:
    grad_packed = elementwise_empty(packed)
    if packed.numel():
        cut = _cut(packed, options.layout)
        operands = (cut.matrix(grad_output), *cut.matrices(packed), *cut.matrices(grad_packed), cut.matrix(output))
        backends.select(packed).glu_backward(*operands, *options.of_two.of_gradients(packed.dtype))
    return grad_packed

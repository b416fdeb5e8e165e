"""The channel-norm op: batch, group and instance norm, with an activation and a residual added before it.

One way to compute all of them. Every channel of every sample is a set of numbers, whose moments one kernel finds. From
these, in small tensors, come the statistics of each norm (a batch norm merges the moments over samples, a group norm
over the channels of a group) and for each channel of each sample the coefficients by which another kernel makes the
output: activation((x - mean) * scale + bias + residual). Backward likewise: a kernel for two sums over each set, and one
for the gradient from coefficients.

Kept for backward: the input, the statistics and the coefficients. With a residual, what says how the activation slopes: for relu and
leaky_relu the output, whose sign is that of what the activation was given, and which whatever reads it keeps too; for
other activations the residual; for the identity neither.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..backends import reference
from .operands import or_none, returned, wanted_gradients
from .registration import Op
from .second_order import second_order

_SIGNED_BY_OUTPUT = ("relu", "leaky_relu")
# How many pieces the rows of a channels-last tensor are summed in: enough to keep every processor busy, few enough
# that the pieces' own sums cost nothing. Fixed for a device, so that results do not depend on the number of threads.
_PIECES = {"cpu": 64}
_PIECES_ELSEWHERE = 512
_LEAST_ROWS = 64


class Layout(NamedTuple):
    """How (samples, channels, *space) lies in memory.

    As planes, (samples * channels, size) with a channel a row; or channels last, (samples * size, channels).
    """

    planes: bool
    samples: int
    channels: int
    size: int
    piece_rows: int  # of a sample, that are summed together; a whole plane where there are planes

    @property
    def pieces(self) -> int:
        return 1 if self.planes else -(-self.size // self.piece_rows)

    def matrix(self, tensor: Tensor | None) -> Tensor | None:
        """As a contiguous matrix: a view where `tensor` lies so, else a copy."""
        if tensor is None:
            return None
        if self.planes:
            return tensor.contiguous().view(self.samples * self.channels, self.size)
        return tensor.movedim(1, -1).contiguous().view(self.samples * self.size, self.channels)

    def room(self, like: Tensor) -> Tensor:
        """Room for a result of this shape, laid out in this way."""
        if self.planes:
            return torch.empty(like.shape, dtype=like.dtype, device=like.device)
        shape = (like.shape[0], *like.shape[2:], like.shape[1])
        return torch.empty(shape, dtype=like.dtype, device=like.device).movedim(-1, 1)

    def statistics(self, count: int, like: Tensor) -> Tensor:
        """Room for `count` numbers for each piece of each channel: (count, samples, pieces, channels)."""
        shape = (count, self.samples, self.pieces, self.channels)
        return torch.empty(shape, dtype=reference.compute_dtype(like.dtype), device=like.device)


def layout_of(input: Tensor, groups: int) -> Layout:
    """The layout to compute in; a batch norm (no groups) takes all samples of a channels-last tensor as one."""
    samples, channels = input.shape[:2]
    size = math.prod(input.shape[2:])
    last = input.dim() == 2 or size == 1 or (not input.is_contiguous() and input.movedim(1, -1).is_contiguous())
    if not last:
        return Layout(True, samples, channels, size, size)
    if groups == 0:
        samples, size = 1, samples * size
    most = max(_PIECES.get(input.device.type, _PIECES_ELSEWHERE) // max(samples, 1), 1)
    least = min(max(-(-size // most), _LEAST_ROWS), max(size, 1))
    # Pieces of one size where that is not much larger: they merge in fewer steps.
    even = next((rows for rows in range(least, 2 * least) if size % rows == 0), least)
    return Layout(False, samples, channels, size, even)


def moments_of(matrix: Tensor, layout: Layout, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of what is normalised together.

    (channels,) for a batch norm, (samples, groups) for a group norm. The moments of pieces of equal size merge into
    their mean, and the mean of their variances plus the variance of their means.
    """
    means, squares = layout.statistics(2, matrix)
    backends.select(matrix).channel_moments(matrix, means, squares, layout.planes, layout.piece_rows)
    if groups:
        split = (layout.samples, layout.pieces, groups, layout.channels // groups)
        means, squares = means.view(split), squares.view(split)
        over, count = (1, 3), layout.size * layout.channels // groups
    else:
        over, count = (0, 1), layout.size * layout.samples
    if layout.size == layout.pieces * layout.piece_rows:
        spread, mean = torch.var_mean(means, over, correction=0)
        return mean, squares.sum(over).div_(count).add_(spread)
    # The last piece is smaller (Chan, Golub and LeVeque, 1983, merge by size).
    counts = means.new_full((layout.pieces, *[1] * (means.dim() - 2)), layout.piece_rows)
    counts[-1] = layout.size - (layout.pieces - 1) * layout.piece_rows
    mean = (means * (counts / count)).sum(over, keepdim=True)
    var = (squares + counts * (means - mean).square()).sum(over).div_(count)
    return mean.view(var.shape), var


def coefficients_of(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, layout: Layout, groups: int, eps: float
) -> Tensor:
    """mean, scale and bias for each channel of each sample (or of all): (3, samples or 1, channels)."""
    rows, split = (layout.samples, groups) if groups else (1, layout.channels)
    shape = (split, layout.channels // split)
    mean, rstd = (t.view(rows, split, 1) for t in (mean, (var + eps).rsqrt_()))
    coefficients = mean.new_empty(3, rows, *shape)
    coefficients[0] = mean
    coefficients[1] = rstd if weight is None else rstd * weight.view(shape)
    coefficients[2] = 0 if bias is None else bias.view(shape)
    return coefficients.view(3, rows, layout.channels)


def apply(
    input: Tensor, residual: Tensor | None, coefficients: Tensor, layout: Layout, activation: str, matrix: Tensor
) -> Tensor:
    """The output by these coefficients."""
    output = layout.room(input)
    if not input.numel():
        return output
    backends.select(input).channel_forward(
        matrix,
        layout.matrix(residual),
        coefficients,
        layout.matrix(output),
        layout.planes,
        layout.samples,
        activation,
    )
    return output


def _statistics_room(input: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for mean, variance and coefficients."""
    samples, channels = input.shape[:2]
    dtype = reference.compute_dtype(input.dtype)
    shapes = ((samples, groups) if groups else (channels,),) * 2 + ((3, samples if groups else 1, channels),)
    return tuple(torch.empty(shape, dtype=dtype, device=input.device) for shape in shapes)


def _channel_norm(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    given_mean: Tensor | None,
    given_var: Tensor | None,
    groups: int,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layout = layout_of(input, groups)
    if not input.numel():
        return layout.room(input), *(t.zero_() for t in _statistics_room(input, groups))
    matrix = layout.matrix(input)
    if given_mean is None:
        mean, var = moments_of(matrix, layout, groups)
    else:
        dtype = reference.compute_dtype(input.dtype)
        # Copies, because what an op returns must not be what it was given.
        mean, var = given_mean.to(dtype, copy=True), given_var.to(dtype, copy=True)
    coefficients = coefficients_of(mean, var, weight, bias, layout, groups, eps)
    return apply(input, residual, coefficients, layout, activation, matrix), mean, var, coefficients


def _channel_norm_fake(input, residual, weight, bias, given_mean, given_var, groups, eps, activation):
    return layout_of(input, groups).room(input), *_statistics_room(input, groups)


def slope_source(activation: str, residual: Tensor | None, output: Tensor) -> tuple[Tensor | None, bool]:
    """What is kept to find the activation's slope beside the input, and whether it is the output."""
    if residual is None or activation == "identity":
        return None, False
    return (output, True) if activation in _SIGNED_BY_OUTPUT else (residual, False)


def _channel_norm_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    input, residual, weight, bias, given_mean, _, ctx.groups, ctx.eps, ctx.activation = inputs
    output, mean, var, coefficients = output
    ctx.mark_non_differentiable(mean, var, coefficients)
    ctx.set_materialize_grads(False)
    ctx.fixed = given_mean is not None
    other, ctx.by_output = slope_source(ctx.activation, residual, output)
    ctx.save_for_backward(input, other, weight, bias, mean, var, coefficients)


def _channel_norm_backward_rule(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple:
    needs = wanted_gradients(ctx, 4)
    if grad_output is None:
        return (None,) * 9
    options = (ctx.groups, ctx.eps, ctx.activation, ctx.fixed, ctx.by_output)
    found = channel_norm_backward(grad_output, *ctx.saved_tensors, *options, needs)
    return *or_none(found, needs), *(None,) * 5


def gradient_sums(
    grads: Tensor, matrix: Tensor, other: Tensor | None, coefficients: Tensor, layout: Layout, options: tuple
) -> Tensor:
    """The sums of g and of g * (x - mean) over each channel of each sample, where g is the gradient before the norm."""
    sums = layout.statistics(2, matrix)
    backends.select(matrix).channel_sums(
        grads, matrix, other, coefficients, *sums, layout.planes, layout.piece_rows, *options
    )
    return sums.sum(2) if layout.pieces > 1 else sums.squeeze(2)


def batch_tilts(totals: Tensor, coefficients: Tensor, rstd: Tensor, count: float) -> Tensor:
    """From the sums over a batch, (2, channels): what its gradient takes of x - mean, and what it takes off."""
    share = coefficients[1] / -count
    return torch.stack((share * totals[1] * rstd.square(), share * totals[0]))


def _group_tilts(sums: Tensor, weight: Tensor | None, rstd: Tensor, layout: Layout) -> Tensor:
    """The same for each group, from the sums over each channel of each sample, (2, samples, channels)."""
    samples, groups = rstd.shape
    weighted = sums if weight is None else sums * weight
    totals = weighted.view(2, samples, groups, -1).sum(3)
    share = rstd / -(layout.size * layout.channels // groups)
    tilts = torch.stack((share * totals[1] * rstd.square(), share * totals[0])).unsqueeze(3)
    return tilts.expand(2, samples, groups, layout.channels // groups).reshape(2, samples, layout.channels)


def _channel_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    other: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    coefficients: Tensor,
    groups: int,
    eps: float,
    activation: str,
    fixed: bool,
    by_output: bool,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    layout = layout_of(input, groups)
    shapes = (input, input, weight, bias)
    if not input.numel():
        empty = [None if t is None or not w else torch.zeros_like(t) for t, w in zip(shapes, wanted, strict=True)]
        return returned(empty, shapes, input)
    matrix, grads, other = (layout.matrix(t) for t in (input, grad_output, other))
    options = (activation, by_output)
    grad_weight = grad_bias = tilts = None
    if wanted[2] or wanted[3] or (wanted[0] and not fixed):
        rstd = (var + eps).rsqrt_()
        sums = gradient_sums(grads, matrix, other, coefficients, layout, options)
        if groups:
            grad_bias = sums[0].sum(0)
            scaled = sums[1].view(*rstd.shape, -1) * rstd.unsqueeze(2)
            grad_weight = scaled.sum(0).view(layout.channels)
            tilts = _group_tilts(sums, weight, rstd, layout)
        else:
            totals = sums.sum(1)
            grad_bias, grad_weight = totals[0].clone(), totals[1] * rstd
            tilts = None if fixed else batch_tilts(totals, coefficients, rstd, layout.size * layout.samples)
    gradients = input_gradients(grads, matrix, other, coefficients, tilts, layout, options, wanted, input)
    affine = (g if w else None for g, w in zip((grad_weight, grad_bias), wanted[2:], strict=True))
    return returned((*gradients, *affine), shapes, input)


def input_gradients(
    grads: Tensor,
    matrix: Tensor,
    other: Tensor | None,
    coefficients: Tensor,
    tilts: Tensor | None,
    layout: Layout,
    options: tuple,
    wanted: list[bool],
    input: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of input and residual: g * scale + (x - mean) * tilt + shift, and g.

    `tilts` are tilt and shift for each channel of each sample (or of all); None where the statistics were given, and
    both are zero.
    """
    if tilts is None:
        tilts = torch.zeros_like(coefficients[:2])
    grad_input = layout.room(input) if wanted[0] else None
    grad_residual = layout.room(input) if wanted[1] else None
    if input.numel() and (wanted[0] or wanted[1]):
        backends.select(matrix).channel_backward(
            grads,
            matrix,
            other,
            torch.cat((coefficients, coefficients[1:2], tilts)),
            layout.matrix(grad_input),
            layout.matrix(grad_residual),
            layout.planes,
            layout.samples,
            *options,
        )
    return grad_input, grad_residual


def _channel_norm_backward_fake(
    grad_output, input, other, weight, bias, mean, var, coefficients, groups, eps, activation, fixed, by_output, wanted
):
    layout = layout_of(input, groups)
    room = [layout.room(input) if w else input.new_empty(0) for w in wanted[:2]]
    affine = zip((weight, bias), wanted[2:], strict=True)
    return *room, *(torch.empty_like(t) if w and t is not None else input.new_empty(0) for t, w in affine)


def _channel_norm_first_order(
    grad_output, input, other, weight, bias, mean, var, coefficients, groups, eps, activation, fixed, by_output, wanted
):
    given = (mean, var) if fixed else (None, None)

    def block(input, residual, weight, bias):
        if by_output:
            # What added to the norm gives the output: its sign is all that matters.
            norm = reference.channel_norm(input, None, weight, bias, *given, groups, eps, "identity")[0]
            residual = (other - norm).detach() + residual - residual.detach()
        return (reference.channel_norm(input, residual, weight, bias, *given, groups, eps, activation)[0],)

    residual = None if by_output else other
    if residual is None and (by_output or wanted[1]):
        residual = torch.zeros_like(input).requires_grad_()
    operands = (input, residual, weight, bias)
    return reference.gradients(block, operands, (grad_output,), wanted, create_graph=True)


_OPTIONS = "SymInt groups, float eps, str activation"
channel_norm_backward = Op(
    "channel_norm_backward(Tensor grad_output, Tensor input, Tensor? other, Tensor? weight, Tensor? bias, Tensor mean,"
    f" Tensor var, Tensor coefficients, {_OPTIONS}, bool fixed, bool by_output, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    _channel_norm_backward,
    _channel_norm_backward_fake,
    *second_order(_channel_norm_first_order, differentiable=5),
)
channel_norm = Op(
    "channel_norm(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? given_mean, Tensor? given_var,"
    f" {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _channel_norm,
    _channel_norm_fake,
    _channel_norm_setup,
    _channel_norm_backward_rule,
    results=3,
)

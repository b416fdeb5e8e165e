"""A batch norm with statistics over the batches of several processes.

It uses the kernels of `channel_norm`. Processes exchange the moments of their batches in the forward pass, and the two
sums of the gradient in the backward pass. Batches may differ in size, or be empty.
"""

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import recompute
from ..backends import reference
from .channel_layout import Maps, maps_of
from .channel_steps import (
    GradientOptions,
    Options,
    Statistics,
    apply,
    backward_coefficients,
    gradient_sums,
    input_gradients,
    rematerialized,
    slope_source,
)
from .operands import vector
from .same_backend import same_backend_function


def _merged_moments(
    input: Tensor, matrix: Tensor, maps: Maps, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, float]:
    """Mean, variance and count over all processes."""
    channels = input.shape[1]
    own = torch.zeros(2 * channels + 1, dtype=reference.compute_dtype(matrix.dtype), device=matrix.device)
    if matrix.numel():
        mean, var = Statistics.of(input, matrix, maps, 0)
        own = torch.cat((mean, var, own.new_full((1,), maps.samples * maps.size)))
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, own, group=group)
    everyone = torch.stack(gathered)
    means, variances, counts = everyone[:, :channels], everyone[:, channels:-1], everyone[:, -1:]
    shares = counts / counts.sum()
    mean = (means * shares).sum(0)
    var = ((variances + (means - mean).square()) * shares).sum(0)
    return mean, var, counts.sum().item()


@same_backend_function
class _SyncBatchNorm(torch.autograd.Function):
    """The batch norm; see the module."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        activation: str,
        group: dist.ProcessGroup,
    ) -> tuple[Tensor, Tensor, Tensor, float]:
        maps = maps_of(input, 0)
        matrix = maps.matrix(input)
        mean, var, count = _merged_moments(input, matrix, maps, group)
        coefficients = Statistics(mean, var).coefficients(weight, bias, maps.channels, eps)
        output = apply(input, residual, coefficients, maps, activation, matrix)
        ctx.mark_non_differentiable(mean, var)
        ctx.eps, ctx.activation, ctx.group, ctx.count = eps, activation, group, count
        other, ctx.by_output = slope_source(activation, residual, output)
        ctx.dtypes = [None if t is None else t.dtype for t in (weight, bias)]
        ctx.save_for_backward(input, other, weight, bias, mean, var)
        if recompute.is_active():
            operands = (input, residual, weight, bias, mean, var)
            recompute.announce((functools.partial(rematerialized, Options(0, eps, activation)), operands))
        return output, mean, var, count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor, *_: None) -> tuple:
        input, other, weight, bias, mean, var = ctx.saved_tensors
        maps = maps_of(input, 0)
        matrix, grads, other = (maps.matrix(t) for t in (input, grad_output, other))
        options = (ctx.activation, ctx.by_output)
        coefficients = Statistics(mean, var).coefficients(weight, bias, maps.channels, ctx.eps)
        sums = torch.zeros(2, 1, 1, input.shape[1], dtype=var.dtype, device=input.device)
        if input.numel():
            sums = gradient_sums(grads, matrix, other, coefficients, maps, options).sum((1, 2)).view(sums.shape)
        # The gradients of weight and bias cover only this process's batch, as in any other layer.
        affine = [torch.empty_like(var) if wanted else None for wanted in ctx.needs_input_grad[2:4]]
        fixed = GradientOptions(0, ctx.eps, ctx.activation, True, ctx.by_output)
        backward_coefficients(coefficients, sums, var, None, affine, ctx.count, fixed)
        dist.all_reduce(sums, group=ctx.group)
        options_with_sums = fixed._replace(fixed=False)
        six = backward_coefficients(coefficients, sums, var, vector(weight), (None, None), ctx.count, options_with_sums)
        wanted = list(ctx.needs_input_grad[:2])
        grad_input, grad_residual = input_gradients(grads, matrix, other, six, maps, options, wanted, input)
        grad_weight, grad_bias = (None if g is None else g.to(d) for g, d in zip(affine, ctx.dtypes, strict=True))
        return grad_input, grad_residual, grad_weight, grad_bias, None, None, None


def sync_batch_norm(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor, Tensor, float]:
    """The output, and the mean, variance and count over the batches of all processes of `group`."""
    output, *statistics = _SyncBatchNorm.apply(input, residual, weight, bias, eps, activation, group)
    if recompute.is_active():
        recompute.record(output)
    return output, *statistics

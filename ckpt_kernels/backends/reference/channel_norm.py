"""The channel norms in plain torch: the whole block, and each step of the forward and backward pass."""

import math

import torch
from torch import Tensor

from .common import ACTIVATIONS, compute_dtype, slope


def channel_norm(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    given_mean: Tensor | None,
    given_var: Tensor | None,
    groups: int,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute activation((x - mean) / sqrt(var + eps) * weight + bias + residual) of (samples, channels, *space).

    Mean and (biased) variance are given for each channel, or are computed: with groups = 0 for each channel over all
    samples, otherwise for each of `groups` groups of channels of a sample. Returns output, mean and variance.
    """
    x = input.to(compute_dtype(input.dtype))
    samples, channels = x.shape[:2]
    size = math.prod(x.shape[2:])
    if not x.numel():
        given_mean = given_var = x.new_zeros(channels)
    if given_mean is not None:
        mean, var = given_mean.to(x.dtype), given_var.to(x.dtype)
        sets, shape = x.reshape(samples, channels, size), (1, channels, 1)
    elif groups:
        sets, shape = x.reshape(samples, groups, channels // groups * size), (samples, groups, 1)
        var, mean = torch.var_mean(sets, 2, correction=0)
    else:
        sets, shape = x.reshape(samples, channels, size), (1, channels, 1)
        var, mean = torch.var_mean(sets, (0, 2), correction=0)
    x_hat = ((sets - mean.view(shape)) * torch.rsqrt(var + eps).view(shape)).reshape(samples, channels, size)
    if weight is not None:
        x_hat = x_hat * weight.to(x.dtype).reshape(channels, 1)
    if bias is not None:
        x_hat = x_hat + bias.to(x.dtype).reshape(channels, 1)
    z = x_hat.reshape(x.shape)
    if residual is not None:
        z = z + residual.to(x.dtype)
    return ACTIVATIONS[activation](z).to(input.dtype), mean, var


def _channels(matrix: Tensor, planes: bool, samples: int, channels: int) -> Tensor:
    """Return a matrix of the channel_* functions as (samples, size, channels), in the compute dtype."""
    matrix = matrix.to(compute_dtype(matrix.dtype))
    return matrix.view(samples, channels, -1).transpose(1, 2) if planes else matrix.view(samples, -1, channels)


def _rows(values: Tensor, planes: bool, shape: torch.Size) -> Tensor:
    """Invert `_channels`: return (samples, size, channels) as a matrix."""
    return (values.transpose(1, 2) if planes else values).reshape(shape)


def channel_moments(x, mean, squares, planes, piece_rows):
    """Compute mean and sum of squared deviations of each piece of each channel of each sample.

    x is (samples * channels, size) if `planes`, otherwise (samples * size, channels). mean and squares are (samples,
    pieces, channels). A piece has `piece_rows` rows; the last piece of a sample may have fewer.
    """
    values = _channels(x, planes, mean.shape[0], mean.shape[2])
    for index, piece in enumerate(values.split(piece_rows, 1)):
        var, center = torch.var_mean(piece, 1, correction=0)
        mean[:, index], squares[:, index] = center, var * piece.shape[1]


def channel_statistics(means, squares, mean, var, groups, size, piece_rows):
    """Combine the moments of pieces into the statistics of the norm.

    `means` and `squares` are from `channel_moments`, with `size` elements of each channel of each sample. For a batch
    norm (groups = 0) mean and var are (channels,), otherwise (samples, groups).
    """
    samples, pieces, channels = means.shape
    split, over, count = (samples, pieces, channels), (0, 1), size * samples
    if groups:
        split, over, count = (samples, pieces, groups, channels // groups), (1, 3), size * channels // groups
    means, squares = means.view(split), squares.view(split)
    if size == pieces * piece_rows:
        # For pieces of equal size the variance is the mean of the variances plus the variance of the means.
        spread, center = torch.var_mean(means, over, correction=0)
        mean.copy_(center)
        var.copy_(squares.sum(over).div_(count).add_(spread))
    else:
        counts = means.new_full((pieces, *[1] * (len(split) - 2)), piece_rows)
        counts[-1] = size - (pieces - 1) * piece_rows
        center = (means * (counts / count)).sum(over, keepdim=True)
        mean.copy_(center.view(mean.shape))
        var.copy_((squares + counts * (means - center).square()).sum(over).div_(count))


def channel_coefficients(mean, var, weight, bias, coefficients, eps):
    """Compute the coefficients of the forward pass, (3, samples or 1, channels): mean, weight / sqrt(var + eps), bias.

    mean and var are from `channel_statistics`.
    """
    _, rows, channels = coefficients.shape
    sets = mean.numel() // rows
    shape = (sets, channels // sets)
    rstd = (var + eps).rsqrt_().view(rows, sets, 1)
    grouped = coefficients.view(3, rows, *shape)
    grouped[0] = mean.view(rows, sets, 1)
    grouped[1] = rstd if weight is None else rstd * weight.view(shape)
    grouped[2] = 0 if bias is None else bias.view(shape)


def channel_backward_coefficients(
    first, second, var, weight, coefficients, grad_weight, grad_bias, groups, count, eps, fixed
):
    """Compute the gradients of weight and bias, and the coefficients of `channel_backward`.

    Args:
        first, second: the sums of `channel_sums`.
        coefficients: (6, samples or 1, channels); the caller fills the first three, those of the forward pass.
        count: the number of elements that share their statistics.
        fixed: whether the statistics are constants without a gradient.
    """
    sums = torch.stack((first, second)).sum(2)
    _, samples, channels = sums.shape
    sets = groups or channels
    rstd = (var + eps).rsqrt_().view(-1, sets, 1)
    for target, values in ((grad_bias, sums[0]), (grad_weight, (sums[1].view(samples, sets, -1) * rstd))):
        if target is not None:
            target.copy_(values.sum(0).view(channels))
    coefficients[3] = coefficients[1]
    if fixed:
        coefficients[4:] = 0
        return
    if groups:
        weighted = sums if weight is None else sums * weight
        totals, share = weighted.view(2, samples, groups, -1).sum(3, keepdim=True), rstd / -count
    else:
        totals, share = sums.sum(1).view(2, 1, channels, 1), coefficients[1].view(1, channels, 1) / -count
    grouped = coefficients.view(6, *rstd.shape[:2], -1)
    grouped[4] = share * totals[1] * rstd.square()
    grouped[5] = share * totals[0]


def channel_forward(x, residual, coefficients, output, planes, samples, activation):
    """Compute activation((x - mean) * scale + bias + residual).

    `coefficients`, (3, samples or 1, channels), are mean, scale and bias.
    """
    channels = coefficients.shape[2]
    mean, scale, bias = (c.unsqueeze(1) for c in coefficients)
    z = (_channels(x, planes, samples, channels) - mean) * scale + bias
    if residual is not None:
        z = z + _channels(residual, planes, samples, channels)
    output.copy_(_rows(ACTIVATIONS[activation](z), planes, output.shape))


def _channel_slopes(grad_output, x, other, coefficients, planes, samples, activation, by_output):
    """Return g = grad_output * activation'(z), and x - mean."""
    channels = coefficients.shape[2]
    mean, scale, bias = (c.unsqueeze(1) for c in coefficients[:3])
    g, d = _channels(grad_output, planes, samples, channels), _channels(x, planes, samples, channels) - mean
    z = None if other is None else _channels(other, planes, samples, channels)
    if not by_output:
        z = d * scale + bias + (0 if z is None else z)
    return slope(activation, z, g), d


def channel_sums(grad_output, x, other, coefficients, first, second, planes, piece_rows, activation, by_output):
    """Sum g and g * (x - mean) over each piece of each channel of each sample: (samples, pieces, channels).

    g = grad_output * activation'(z), with z as in `channel_forward` and `other` the residual. With `by_output`, `other`
    is the output, and the derivative is computed from the output in the place of z.
    """
    g, d = _channel_slopes(grad_output, x, other, coefficients, planes, first.shape[0], activation, by_output)
    for index, (piece, deviations) in enumerate(zip(g.split(piece_rows, 1), d.split(piece_rows, 1), strict=True)):
        first[:, index], second[:, index] = piece.sum(1), (piece * deviations).sum(1)


def channel_backward(
    grad_output, x, other, coefficients, grad_input, grad_residual, planes, samples, activation, by_output
):
    """Compute grad_input = g * factor + (x - mean) * c1 + c2, and grad_residual = g.

    `coefficients` are mean, scale, bias, factor, c1 and c2; `channel_sums` defines g.
    """
    g, d = _channel_slopes(grad_output, x, other, coefficients, planes, samples, activation, by_output)
    factor, c1, c2 = (c.unsqueeze(1) for c in coefficients[3:])
    for target, values in ((grad_input, g * factor + d * c1 + c2), (grad_residual, g)):
        if target is not None:
            target.copy_(_rows(values, planes, target.shape))

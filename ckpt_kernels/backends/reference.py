"""The maths in plain torch: the specification that the other backends are held to.

The functions named after a block compute it from (rows, columns) matrices and can be differentiated any number
of times. The functions named `*_forward` and `*_backward` are the backend interface, the same in every backend:
they fill tensors that the caller has allocated, and their gradients are written out here. An
operand of None is one the block does not have; a gradient of None is one that nobody wants.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .blocks import RowNorm, RowNormGradients

aten = torch.ops.aten

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "relu_squared": lambda x: F.relu(x).square(),
    "elu": F.elu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "mish": F.mish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
    "softplus": F.softplus,
}
# grad * activation'(x), by the operators that torch's own backward passes consist of. Not by autograd, which is out of
# reach where the dispatcher runs an op: torch.compile's graphs and batches of gradients do.
SLOPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "identity": lambda grad, x: grad,
    "relu": lambda grad, x: aten.threshold_backward(grad, x, 0),
    "leaky_relu": lambda grad, x: aten.leaky_relu_backward(grad, x, 0.01, False),
    "relu_squared": lambda grad, x: aten.threshold_backward(grad * (2 * F.relu(x)), x, 0),
    "elu": lambda grad, x: aten.elu_backward(grad, 1, 1, 1, False, x),
    "gelu": lambda grad, x: aten.gelu_backward(grad, x),
    "gelu_tanh": lambda grad, x: aten.gelu_backward(grad, x, approximate="tanh"),
    "quick_gelu": lambda grad, x: _quick_gelu_slope(grad, x, torch.sigmoid(1.702 * x)),
    "silu": lambda grad, x: aten.silu_backward(grad, x),
    "mish": lambda grad, x: aten.mish_backward(grad, x),
    "sigmoid": lambda grad, x: aten.sigmoid_backward(grad, torch.sigmoid(x)),
    "tanh": lambda grad, x: aten.tanh_backward(grad, torch.tanh(x)),
    "hardswish": lambda grad, x: aten.hardswish_backward(grad, x),
    "softplus": lambda grad, x: aten.softplus_backward(grad, x, 1, 20),
}


def _quick_gelu_slope(grad: Tensor, x: Tensor, sigmoid: Tensor) -> Tensor:
    return grad * sigmoid + aten.sigmoid_backward(grad * x, sigmoid) * 1.702


def why_not(device_type: str, dtype: torch.dtype) -> str | None:
    """Why this backend cannot serve such tensors: it always can."""
    return None


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What `dtype` is computed in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _low_32_bits(x: Tensor) -> Tensor:
    return x & 0xFFFFFFFF


def philox_bits(seed: Tensor, rows: int, columns: int) -> Tensor:
    """32 random bits for each element of a (rows, columns) matrix, as int64.

    Lane `column % 4` of Philox4x32-10 (Salmon et al., 2011) with the counter (column // 4, row, row >> 32, 0) and
    the 64-bit `seed` as the key.
    """
    row = torch.arange(rows, device=seed.device).reshape(-1, 1)
    quad = torch.arange((columns + 3) // 4, device=seed.device).reshape(1, -1)
    zero = torch.zeros_like(row + quad)
    words = [quad + zero, _low_32_bits(row) + zero, (row >> 32) + zero, zero]
    key = [_low_32_bits(seed.reshape(())), _low_32_bits(seed.reshape(()) >> 32)]
    for _ in range(10):
        # The products wrap around to the right low 64 bits; an arithmetic shift then gives the right high word.
        first, second = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
        words = [
            _low_32_bits(second >> 32) ^ words[1] ^ key[0],
            _low_32_bits(second),
            _low_32_bits(first >> 32) ^ words[3] ^ key[1],
            _low_32_bits(first),
        ]
        key = [_low_32_bits(key[0] + 0x9E3779B9), _low_32_bits(key[1] + 0xBB67AE85)]
    return torch.stack(words, dim=-1).reshape(rows, -1)[:, :columns]


def dropout(x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """x / (1 - p) where the element's Philox bits are at least p * 2**32, else 0."""
    if seed is None or p == 0:
        return x
    keep = philox_bits(seed, *x.shape) >= int(p * 4294967296.0)
    return torch.where(keep, x * (1 / (1 - p) if p < 1 else 0.0), 0.0)


def _normalize(u: Tensor, eps: float, centered: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    mean = u.mean(-1, keepdim=True) if centered else None
    if mean is not None:
        u = u - mean
    rstd = torch.rsqrt(u.square().mean(-1, keepdim=True) + eps)
    return u * rstd, None if mean is None else mean.squeeze(-1), rstd.squeeze(-1)


def _grouped(rows: Tensor, coefficient: Tensor) -> Tensor:
    """(groups, rows, columns), where each group has a row of `coefficient`."""
    columns = rows.shape[-1]
    groups = coefficient.numel() // columns
    return rows.reshape(groups, rows.numel() // max(groups * columns, 1), columns)


def _affine(x_hat: Tensor, weight: Tensor | None, bias: Tensor | None, weight_offset: float) -> Tensor:
    """x_hat * (weight + offset) + bias, where each row of weight and bias serves an equal share of the rows."""
    rows, columns = x_hat.shape
    grouped = x_hat
    if weight is not None:
        grouped = _grouped(x_hat, weight)
        grouped = grouped * (weight.to(x_hat.dtype).reshape(-1, 1, columns) + weight_offset)
    if bias is not None:
        grouped = _grouped(grouped, bias)
        grouped = grouped + bias.to(x_hat.dtype).reshape(-1, 1, columns)
    return grouped.reshape(rows, columns)


def row_norm(block: RowNorm) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """What `RowNorm` says, of (rows, columns) matrices, and without given statistics.

    rstd = 1 / sqrt(mean((u - mean)**2) + eps); without `centered` the mean is taken as 0. Returns output, residual_out,
    mean and rstd, where residual_out = residual + dropout(input), rounded to the input's dtype, is what is normalised.
    """
    options, dtype = block.options, block.input.dtype
    u = block.input.to(compute_dtype(dtype))
    residual_out = None
    if block.residual is not None:
        residual_out = (block.residual.to(u.dtype) + dropout(u, block.seed, options.dropout_p)).to(dtype)
        u = residual_out.to(u.dtype)
    u = ACTIVATIONS[options.pre_activation](u)
    factor = None if block.gate is None else ACTIVATIONS[options.activation](block.gate.to(u.dtype))
    if factor is not None and options.gate_first:
        u = u * factor
    x_hat, mean, rstd = _normalize(u, options.eps, options.centered)
    if options.cast_before_weight:
        x_hat = x_hat.to(dtype).to(u.dtype)
    output = _affine(x_hat, block.weight, block.bias, options.weight_offset)
    if factor is None:
        output = ACTIVATIONS[options.activation](output)
    elif not options.gate_first:
        output = output * factor
    return output.to(dtype), residual_out, mean, rstd


def glu(gate: Tensor, value: Tensor, activation: str) -> Tensor:
    """activation(gate) * value."""
    compute = compute_dtype(gate.dtype)
    return (ACTIVATIONS[activation](gate.to(compute)) * value.to(compute)).to(gate.dtype)


def bias_act(input: Tensor, bias: Tensor | None, seed: Tensor | None, activation: str, dropout_p: float) -> Tensor:
    """dropout(activation(input + bias))."""
    z = input.to(compute_dtype(input.dtype))
    if bias is not None:
        z = z + bias.to(z.dtype)
    return dropout(ACTIVATIONS[activation](z), seed, dropout_p).to(input.dtype)


def dyt(input: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """tanh(alpha * input) * weight + bias, where alpha has one element."""
    x = input.to(compute_dtype(input.dtype))
    output = torch.tanh(alpha.to(x.dtype).reshape(()) * x)
    if weight is not None:
        output = output * weight.to(x.dtype)
    if bias is not None:
        output = output + bias.to(x.dtype)
    return output.to(input.dtype)


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
    """activation((x - mean) / sqrt(var + eps) * weight + bias + residual) of (samples, channels, *space).

    Mean and (biased) variance are those given for each channel, or over all samples for each channel (groups = 0), or
    over each of `groups` runs of channels of a sample. Returns output, mean and variance.
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


def gradients(
    block: Callable[..., Sequence[Tensor]],
    operands: Sequence[Tensor | None],
    grad_outputs: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of block(*operands) for the operands wanted, as autograd finds them; None for the others.

    `grad_outputs` are those of the block's first outputs; None stands for zero. The gradients have a graph if the
    caller's grad mode is on.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        outputs = block(*operands)
        pairs = [(y, g) for y, g in zip(outputs, grad_outputs, strict=False) if g is not None and y.requires_grad]
        sources = [operand for operand, w in zip(operands, wanted, strict=True) if w]
        found = iter(
            torch.autograd.grad(
                [y for y, _ in pairs],
                sources,
                [g for _, g in pairs],
                create_graph=create_graph,
                allow_unused=True,
                materialize_grads=True,
            )
            if sources and pairs
            else [torch.zeros_like(source) for source in sources]
        )
    return [next(found) if w else None for w in wanted]


def _fill(targets: Sequence[Tensor | None], values: Sequence[Tensor | None]) -> None:
    for target, value in zip(targets, values, strict=True):
        if target is not None and value is not None:
            target.copy_(value.reshape(target.shape))


def _matrix(rows: Tensor | None) -> Tensor | None:
    """Rows that lie on several levels as one matrix."""
    return None if rows is None else rows.reshape(-1, rows.shape[-1])


def row_norm_forward(
    block: RowNorm, output: Tensor, residual_out: Tensor | None, given_statistics: bool = False
) -> None:
    """`row_norm` into output, residual_out, and the block's mean and rstd, which with `given_statistics` are there."""
    input, residual, gate = _matrix(block.input), _matrix(block.residual), _matrix(block.gate)
    found = row_norm(block._replace(input=input, residual=residual, gate=gate))
    _fill((output, residual_out), found[:2])
    if not given_statistics:
        _fill((block.mean, block.rstd), found[2:])


def row_norm_backward(
    block: RowNorm,
    grad_output: Tensor,
    grad_residual_out: Tensor | None,
    gradients: RowNormGradients,
    output: Tensor | None = None,
) -> None:
    """The gradients of `row_norm`, and its output again where there is memory for it.

    With z = x_hat * w + b, g = grad_output * activation'(z) and h = g * w, grad_weight = sum of g * x_hat and grad_bias
    = sum of g over rows. Of a row of N, x_hat_j = (u_j - mean) * rstd, so d mean / d u_i = 1 / N and d rstd / d u_i =
    -rstd**2 * x_hat_i / N, whence
        du_i = sum_j h_j * d x_hat_j / d u_i = rstd * (h_i - mean(h) - x_hat_i * mean(h * x_hat)),
    without mean(h) where the mean is taken as 0 (Ba, Kiros and Hinton, "Layer Normalization", 2016).
    """
    options, dtype = block.options, block.input.dtype
    x, gate, dy, dh = (
        None if t is None else _matrix(t).to(compute_dtype(dtype))
        for t in (block.input, block.gate, grad_output, grad_residual_out)
    )
    u = ACTIVATIONS[options.pre_activation](x)
    if options.gate_first:
        factor = ACTIVATIONS[options.activation](gate)
        u = u * factor
    x_hat = (u if block.mean is None else u - block.mean.unsqueeze(1)) * block.rstd.unsqueeze(1)
    seen = x_hat.to(dtype).to(x.dtype) if options.cast_before_weight else x_hat
    z = _affine(seen, block.weight, block.bias, options.weight_offset)
    grad_gate = None
    if gate is None:
        g = slope(options.activation, z, dy)
        _fill((output,), (ACTIVATIONS[options.activation](z),))
    elif options.gate_first:
        g = dy
    else:
        g = dy * ACTIVATIONS[options.activation](gate)
        grad_gate = slope(options.activation, gate, dy * z)
    for target, values in ((gradients.weight, g * seen), (gradients.bias, g)):
        if target is not None:
            target.copy_(_grouped(values, target).sum(1).reshape(target.shape))
    h = _affine(g, block.weight, None, options.weight_offset)
    du = h - x_hat * (h * x_hat).mean(1, keepdim=True)
    if block.mean is not None:
        du = du - h.mean(1, keepdim=True)
    du = du * block.rstd.unsqueeze(1)
    if options.gate_first:
        du, grad_gate = du * factor, slope(options.activation, gate, du * x)
    du = slope(options.pre_activation, x, du)
    if dh is not None:
        du = du + dh
    _fill((gradients.residual, gradients.gate), (du, grad_gate))
    _fill((gradients.input,), (dropout(du.to(dtype).to(du.dtype), block.seed, options.dropout_p),))


def slope(activation: str, z: Tensor, grad: Tensor) -> Tensor:
    """grad * activation'(z)."""
    return SLOPES[activation](grad, z)


def glu_forward(gate, value, output, activation):
    """`glu` into output."""
    _fill((output,), (glu(gate, value, activation),))


def glu_backward(grad_output, gate, value, grad_gate, grad_value, output, activation):
    """The gradients of `glu`, and its output where there is memory for it: d gate = grad * value * activation'(gate),
    d value = grad * activation(gate)."""
    dy, u, v = (t.to(compute_dtype(gate.dtype)) for t in (grad_output, gate, value))
    factor = ACTIVATIONS[activation](u)
    _fill((grad_gate, grad_value, output), (slope(activation, u, dy * v), dy * factor, factor * v))


def bias_act_forward(input, bias, seed, output, activation, dropout_p):
    """`bias_act` into output."""
    _fill((output,), (bias_act(input, bias, seed, activation, dropout_p),))


def bias_act_backward(grad_output, input, bias, seed, grad_input, grad_bias, output, activation, dropout_p):
    """The gradients of `bias_act`, and its output where there is memory for it: d input = dropout(grad) *
    activation'(input + bias), d bias is the sum of that over rows. No bias is one of zeros."""
    dy, z = (t.to(compute_dtype(input.dtype)) for t in (grad_output, input))
    if bias is not None:
        z = z + bias.to(z.dtype)
    dz = slope(activation, z, dropout(dy, seed, dropout_p))
    _fill((grad_input, output), (dz, dropout(ACTIVATIONS[activation](z), seed, dropout_p)))
    if grad_bias is not None:
        grad_bias.copy_(dz.sum(0))


def dyt_forward(input, alpha, weight, bias, output):
    """`dyt` into output."""
    _fill((output,), (dyt(input, alpha, weight, bias),))


def dyt_backward(grad_output, input, alpha, weight, grad_input, grad_alpha, grad_weight, grad_bias):
    """The gradients of `dyt`: with t = tanh(alpha * x) and s = grad * weight * (1 - t**2), the gradient of alpha * x,
    d x = alpha * s, d alpha is the sum of s * x, d weight and d bias are those of grad * t and of grad over rows."""
    dy, x = (t.to(compute_dtype(input.dtype)) for t in (grad_output, input))
    scale = alpha.to(x.dtype).reshape(())
    t = torch.tanh(scale * x)
    s = slope("tanh", scale * x, dy if weight is None else dy * weight.to(x.dtype))
    gradients = (s * scale, (s * x).sum(), (dy * t).sum(0), dy.sum(0))
    _fill((grad_input, grad_alpha, grad_weight, grad_bias), gradients)


def _channels(matrix: Tensor, planes: bool, samples: int, channels: int) -> Tensor:
    """A matrix of channel_* as (samples, size, channels), in the compute type."""
    matrix = matrix.to(compute_dtype(matrix.dtype))
    return matrix.view(samples, channels, -1).transpose(1, 2) if planes else matrix.view(samples, -1, channels)


def _rows(values: Tensor, planes: bool, shape: torch.Size) -> Tensor:
    """Back from (samples, size, channels)."""
    return (values.transpose(1, 2) if planes else values).reshape(shape)


def channel_moments(x, mean, squares, planes, piece_rows):
    """Mean and sum of squared deviations of each piece of each channel of each sample.

    x is (samples * channels, size) where there are `planes`, else (samples * size, channels); mean and squares are
    (samples, pieces, channels), of `piece_rows` rows but for the last piece of a sample.
    """
    values = _channels(x, planes, mean.shape[0], mean.shape[2])
    for index, piece in enumerate(values.split(piece_rows, 1)):
        var, center = torch.var_mean(piece, 1, correction=0)
        mean[:, index], squares[:, index] = center, var * piece.shape[1]


def channel_statistics(means, squares, mean, var, groups, size, piece_rows):
    """The statistics of what is normalised together.

    `means` and `squares` are those of `channel_moments`, of `size` elements of each channel of each sample. For a batch
    norm (groups = 0) mean and var are (channels,), else (samples, groups).
    """
    samples, pieces, channels = means.shape
    split, over, count = (samples, pieces, channels), (0, 1), size * samples
    if groups:
        split, over, count = (samples, pieces, groups, channels // groups), (1, 3), size * channels // groups
    means, squares = means.view(split), squares.view(split)
    if size == pieces * piece_rows:
        # Of pieces of equal size the variances' mean and the means' variance are what there is to add.
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
    """What the norm is made with, (3, samples or 1, channels): mean, weight / sqrt(var + eps) and bias.

    mean and var are those of `channel_statistics`.
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
    """From the sums of `channel_sums` the gradients of weight and bias, and `channel_backward`'s coefficients.

    `coefficients` is (6, samples or 1, channels), of which the first three are there, those of the forward pass.

    `count` elements were normalised together; with `fixed` statistics these have no gradient.
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
    """activation((x - mean) * scale + bias + residual); `coefficients` (3, samples or 1, channels) are the three."""
    channels = coefficients.shape[2]
    mean, scale, bias = (c.unsqueeze(1) for c in coefficients)
    z = (_channels(x, planes, samples, channels) - mean) * scale + bias
    if residual is not None:
        z = z + _channels(residual, planes, samples, channels)
    output.copy_(_rows(ACTIVATIONS[activation](z), planes, output.shape))


def _channel_slopes(grad_output, x, other, coefficients, planes, samples, activation, by_output):
    """g = grad_output * activation'(z), and x - mean."""
    channels = coefficients.shape[2]
    mean, scale, bias = (c.unsqueeze(1) for c in coefficients[:3])
    g, d = _channels(grad_output, planes, samples, channels), _channels(x, planes, samples, channels) - mean
    z = None if other is None else _channels(other, planes, samples, channels)
    if not by_output:
        z = d * scale + bias + (0 if z is None else z)
    return slope(activation, z, g), d


def channel_sums(grad_output, x, other, coefficients, first, second, planes, piece_rows, activation, by_output):
    """The sums of g and of g * (x - mean) over each piece of each channel of each sample: (samples, pieces, channels).

    g = grad_output * activation'(z) with z as in `channel_forward` and `other` the residual, or, `by_output`, with
    `other` the output in the place of z.
    """
    g, d = _channel_slopes(grad_output, x, other, coefficients, planes, first.shape[0], activation, by_output)
    for index, (piece, deviations) in enumerate(zip(g.split(piece_rows, 1), d.split(piece_rows, 1), strict=True)):
        first[:, index], second[:, index] = piece.sum(1), (piece * deviations).sum(1)


def channel_backward(
    grad_output, x, other, coefficients, grad_input, grad_residual, planes, samples, activation, by_output
):
    """grad_input = g * factor + (x - mean) * c1 + c2, grad_residual = g; `coefficients` are mean, scale, bias,
    factor, c1 and c2, and g is that of `channel_sums`."""
    g, d = _channel_slopes(grad_output, x, other, coefficients, planes, samples, activation, by_output)
    factor, c1, c2 = (c.unsqueeze(1) for c in coefficients[3:])
    for target, values in ((grad_input, g * factor + d * c1 + c2), (grad_residual, g)):
        if target is not None:
            target.copy_(_rows(values, planes, target.shape))

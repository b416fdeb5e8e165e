"""The maths in plain torch: the specification that the other backends are held to.

The functions named after a block compute it from (rows, columns) matrices and can be differentiated any number
of times. The functions named `*_forward` and `*_backward` are the backend interface, the same in every backend:
they fill tensors that the caller has allocated, and their gradients here are those that autograd finds. An
operand of None is one the block does not have; a gradient of None is one that nobody wants.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

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


def row_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centered: bool,
    pre_activation: str,
    activation: str,
    weight_offset: float,
    cast_before_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """activation(x_hat * (weight + offset) + bias) with x_hat = (u - mean) * rstd, u = pre_activation(input).

    rstd = 1 / sqrt(mean((u - mean)**2) + eps); without `centered` the mean is taken as 0. With
    `cast_before_weight`, x_hat is rounded to the input's dtype before it meets the weight. Returns output, mean
    (None if not centred) and rstd.
    """
    u = ACTIVATIONS[pre_activation](input.to(compute_dtype(input.dtype)))
    x_hat, mean, rstd = _normalize(u, eps, centered)
    if cast_before_weight:
        x_hat = x_hat.to(input.dtype).to(u.dtype)
    output = ACTIVATIONS[activation](_affine(x_hat, weight, bias, weight_offset))
    return output.to(input.dtype), mean, rstd


def add_row_norm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    centered: bool,
    activation: str,
    weight_offset: float,
    cast_before_weight: bool,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """residual_out = residual + dropout(input), and `row_norm` of it: output, residual_out, mean, rstd."""
    compute = compute_dtype(input.dtype)
    total = residual.to(compute) + dropout(input.to(compute), seed, dropout_p)
    residual_out = total.to(input.dtype)
    output, mean, rstd = row_norm(
        residual_out, weight, bias, eps, centered, "identity", activation, weight_offset, cast_before_weight
    )
    return output, residual_out, mean, rstd


def gated_row_norm(
    input: Tensor, gate: Tensor, weight: Tensor | None, eps: float, activation: str, norm_before_gate: bool
) -> tuple[Tensor, Tensor]:
    """x_hat(input) * weight * activation(gate), or x_hat(input * activation(gate)) * weight; returns output, rstd."""
    compute = compute_dtype(input.dtype)
    u, factor = input.to(compute), ACTIVATIONS[activation](gate.to(compute))
    x_hat, _, rstd = _normalize(u if norm_before_gate else u * factor, eps, centered=False)
    output = _affine(x_hat, weight, None, 0.0)
    return (output * factor if norm_before_gate else output).to(input.dtype), rstd


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
        sets, places = x.reshape(samples, channels, size), (1, channels, 1)
    elif groups:
        sets, places = x.reshape(samples, groups, channels // groups * size), (samples, groups, 1)
        var, mean = torch.var_mean(sets, 2, correction=0)
    else:
        sets, places = x.reshape(samples, channels, size), (1, channels, 1)
        var, mean = torch.var_mean(sets, (0, 2), correction=0)
    x_hat = ((sets - mean.view(places)) * torch.rsqrt(var + eps).view(places)).reshape(samples, channels, size)
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
    create_graph: bool = False,
) -> list[Tensor | None]:
    """The gradients of block(*operands) for the operands wanted, as autograd finds them; None for the others.

    `grad_outputs` are those of the block's first outputs; None stands for zero. With `create_graph` the operands are
    taken as they are, and the gradients have a graph if the caller's grad mode is on.
    """
    is_grad_enabled = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = list(operands)
        if not create_graph:
            leaves = [None if t is None else t.detach().requires_grad_(w) for t, w in zip(leaves, wanted, strict=True)]
        outputs = block(*leaves)
        pairs = [(y, g) for y, g in zip(outputs, grad_outputs, strict=False) if g is not None and y.requires_grad]
        sources = [leaf for leaf, w in zip(leaves, wanted, strict=True) if w]
        found = iter(
            torch.autograd.grad(
                [y for y, _ in pairs],
                sources,
                [g for _, g in pairs],
                create_graph=create_graph and is_grad_enabled,
                allow_unused=True,
                materialize_grads=True,
            )
            if sources and pairs
            else [torch.zeros_like(leaf) for leaf in sources]
        )
    return [next(found) if w else None for w in wanted]


def _fill(targets: Sequence[Tensor | None], values: Sequence[Tensor | None]) -> None:
    for target, value in zip(targets, values, strict=True):
        if target is not None and value is not None:
            target.copy_(value.reshape(target.shape))


def _refill(output: Tensor | None, block: Callable[..., Sequence[Tensor]], operands: Sequence[Tensor | None]) -> None:
    """The block's output again, where there is room for it."""
    if output is not None:
        _fill((output,), block(*operands)[:1])


def _matrix(rows: Tensor | None) -> Tensor | None:
    """Rows that lie on several levels as one matrix."""
    return None if rows is None else rows.reshape(-1, rows.shape[-1])


def row_norm_forward(
    input,
    weight,
    bias,
    output,
    mean,
    rstd,
    eps,
    pre_activation,
    activation,
    weight_offset,
    cast_before_weight,
    given_statistics,
):
    """`row_norm` into output, mean (None: not centred) and rstd; with `given_statistics` these are there already."""
    options = (eps, mean is not None, pre_activation, activation, weight_offset, cast_before_weight)
    found = row_norm(_matrix(input), weight, bias, *options)
    _fill((output,), found[:1])
    if not given_statistics:
        _fill((mean, rstd), found[1:])


def row_norm_backward(
    grad_output,
    input,
    weight,
    bias,
    mean,
    rstd,
    grad_input,
    grad_weight,
    grad_bias,
    output,
    eps,
    pre_activation,
    activation,
    weight_offset,
    cast_before_weight,
):
    """The gradients of `row_norm`, which finds its statistics again from eps, and its output where there is room."""

    def block(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Sequence[Tensor]:
        return row_norm(
            input, weight, bias, eps, mean is not None, pre_activation, activation, weight_offset, cast_before_weight
        )

    targets = (grad_input, grad_weight, grad_bias)
    operands = (_matrix(input), *_wide((weight, bias), input.dtype))
    _fill(targets, gradients(block, operands, (_matrix(grad_output),), [t is not None for t in targets]))
    _refill(output, block, operands)


def add_row_norm_forward(
    input,
    residual,
    weight,
    bias,
    seed,
    output,
    residual_out,
    mean,
    rstd,
    eps,
    activation,
    weight_offset,
    cast_before_weight,
    dropout_p,
):
    """`add_row_norm` into output, residual_out, mean (None: not centred) and rstd."""
    options = (eps, mean is not None, activation, weight_offset, cast_before_weight, dropout_p)
    found = add_row_norm(_matrix(input), _matrix(residual), weight, bias, seed, *options)
    _fill((output, residual_out, mean, rstd), found)


def add_row_norm_backward(
    grad_output,
    grad_residual_out,
    residual_out,
    weight,
    bias,
    seed,
    mean,
    rstd,
    grad_input,
    grad_residual,
    grad_weight,
    grad_bias,
    eps,
    activation,
    weight_offset,
    cast_before_weight,
    dropout_p,
):
    """The gradients of `add_row_norm` from what it keeps, residual_out.

    grad_residual is None where it equals grad_input, which is where there is no dropout.
    """

    def block(total: Tensor, weight: Tensor | None, bias: Tensor | None) -> Sequence[Tensor]:
        options = ("identity", activation, weight_offset, cast_before_weight)
        return row_norm(total, weight, bias, eps, mean is not None, *options)[0], total

    wanted = (grad_input is not None or grad_residual is not None, grad_weight is not None, grad_bias is not None)
    operands = (residual_out, *_wide((weight, bias), residual_out.dtype))
    incoming = (_matrix(grad_output), _matrix(grad_residual_out))
    grad_total, *grad_affine = gradients(block, operands, incoming, wanted)
    _fill((grad_weight, grad_bias), grad_affine)
    if grad_total is not None:
        kept = dropout(grad_total.to(compute_dtype(grad_total.dtype)), seed, dropout_p)
        _fill((grad_input, grad_residual), (kept, grad_total))


def gated_row_norm_forward(input, gate, weight, output, rstd, eps, activation, norm_before_gate):
    """`gated_row_norm` into output and rstd."""
    _fill((output, rstd), gated_row_norm(_matrix(input), _matrix(gate), weight, eps, activation, norm_before_gate))


def gated_row_norm_backward(
    grad_output, input, gate, weight, rstd, grad_input, grad_gate, grad_weight, eps, activation, norm_before_gate
):
    """The gradients of `gated_row_norm`."""

    def block(input: Tensor, gate: Tensor, weight: Tensor | None) -> Sequence[Tensor]:
        return gated_row_norm(input, gate, weight, eps, activation, norm_before_gate)

    targets = (grad_input, grad_gate, grad_weight)
    operands = (_matrix(input), _matrix(gate), *_wide((weight,), input.dtype))
    _fill(targets, gradients(block, operands, (_matrix(grad_output),), [t is not None for t in targets]))


def glu_forward(gate, value, output, activation):
    """`glu` into output."""
    _fill((output,), (glu(gate, value, activation),))


def glu_backward(grad_output, gate, value, grad_gate, grad_value, output, activation):
    """The gradients of `glu`, and its output where there is room."""

    def block(gate: Tensor, value: Tensor) -> Sequence[Tensor]:
        return (glu(gate, value, activation),)

    targets = (grad_gate, grad_value)
    _fill(targets, gradients(block, (gate, value), (grad_output,), [t is not None for t in targets]))
    _refill(output, block, (gate, value))


def bias_act_forward(input, bias, seed, output, activation, dropout_p):
    """`bias_act` into output."""
    _fill((output,), (bias_act(input, bias, seed, activation, dropout_p),))


def bias_act_backward(grad_output, input, bias, seed, grad_input, grad_bias, output, activation, dropout_p):
    """The gradients of `bias_act`, without a bias that of one that is zero; and its output where there is room."""

    def block(input: Tensor, bias: Tensor | None) -> Sequence[Tensor]:
        return (bias_act(input, bias, seed, activation, dropout_p),)

    if bias is None and grad_bias is not None:
        bias = torch.zeros_like(grad_bias)
    targets = (grad_input, grad_bias)
    operands = (input, *_wide((bias,), input.dtype))
    _fill(targets, gradients(block, operands, (grad_output,), [t is not None for t in targets]))
    _refill(output, block, operands)


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


def channel_tilts(first, second, var, weight, coefficients, grad_weight, grad_bias, groups, count, eps, fixed):
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
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        (g,) = torch.autograd.grad(ACTIVATIONS[activation](leaf), leaf, g)
    return g, d


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
    """grad_input = g * factor + (x - mean) * tilt + shift, grad_residual = g; `coefficients` are mean, scale, bias,
    factor, tilt and shift, and g is that of `channel_sums`."""
    g, d = _channel_slopes(grad_output, x, other, coefficients, planes, samples, activation, by_output)
    factor, tilt, shift = (c.unsqueeze(1) for c in coefficients[3:])
    for target, values in ((grad_input, g * factor + d * tilt + shift), (grad_residual, g)):
        if target is not None:
            target.copy_(_rows(values, planes, target.shape))


def _wide(operands: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """In the compute type of `dtype`, so that their gradients come back unrounded."""
    return [None if t is None else t.to(compute_dtype(dtype)) for t in operands]

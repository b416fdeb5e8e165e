"""The row norms in plain torch."""

from torch import Tensor

from ..blocks import RowNorm, RowNormGradients
from .common import ACTIVATIONS, compute_dtype, dropout, fill, normalize, slope


def _grouped(rows: Tensor, coefficient: Tensor) -> Tensor:
    """Return rows as (groups, rows, columns); each group has a row of `coefficient`."""
    columns = rows.shape[-1]
    groups = coefficient.numel() // columns
    return rows.reshape(groups, rows.numel() // max(groups * columns, 1), columns)


def _affine(x_hat: Tensor, weight: Tensor | None, bias: Tensor | None, weight_offset: float) -> Tensor:
    """Compute x_hat * (weight + offset) + bias, where each row of weight and bias serves an equal share of the rows."""
    rows, columns = x_hat.shape
    grouped = x_hat
    if weight is not None:
        grouped = _grouped(x_hat, weight)
        grouped = grouped * (weight.to(x_hat.dtype).reshape(grouped.shape[0], 1, columns) + weight_offset)
    if bias is not None:
        grouped = _grouped(grouped, bias)
        grouped = grouped + bias.to(x_hat.dtype).reshape(grouped.shape[0], 1, columns)
    return grouped.reshape(rows, columns)


def row_norm(block: RowNorm) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Compute a `RowNorm` of (rows, columns) matrices, statistics included.

    rstd = 1 / sqrt(mean((u - mean)**2) + eps); without `centered` the mean is taken as 0. Returns output, residual_out,
    mean and rstd. In a block with a residual, residual_out = residual + dropout(input), rounded to the input's dtype,
    is normalised.
    """
    options, dtype = block.options, block.input.dtype
    u = block.input.to(compute_dtype(dtype))
    residual_out = None
    if block.residual is not None:
        residual_out = (block.residual.to(u.dtype) + dropout(u, block.seed, options.dropout_p)).to(dtype)
        u = residual_out.to(u.dtype)
    u = ACTIVATIONS[options.pre_activation](u)
    factor = None if block.gate is None else ACTIVATIONS[options.activation](block.gate.to(u.dtype))
    if factor is not None and options.gate_before_norm:
        u = u * factor
    x_hat, mean, rstd = normalize(u, options.eps, options.centered)
    if options.cast_before_weight:
        x_hat = x_hat.to(dtype).to(u.dtype)
    output = _affine(x_hat, block.weight, block.bias, options.weight_offset)
    if factor is None:
        output = ACTIVATIONS[options.activation](output)
    elif not options.gate_before_norm:
        output = output * factor
    return output.to(dtype), residual_out, mean, rstd


def _matrix(rows: Tensor | None) -> Tensor | None:
    """Return (outer, middle, inner, columns) as (rows, columns)."""
    return None if rows is None else rows.reshape(-1, rows.shape[-1])


def row_norm_forward(
    block: RowNorm, output: Tensor, residual_out: Tensor | None, given_statistics: bool = False
) -> None:
    """Compute `row_norm` into output, residual_out, and the block's mean and rstd.

    With `given_statistics` the block's mean and rstd are filled already.
    """
    input, residual, gate = _matrix(block.input), _matrix(block.residual), _matrix(block.gate)
    results = row_norm(block._replace(input=input, residual=residual, gate=gate))
    fill((output, residual_out), results[:2])
    if not given_statistics:
        fill((block.mean, block.rstd), results[2:])


def row_norm_backward(
    block: RowNorm,
    grad_output: Tensor,
    grad_residual_out: Tensor | None,
    gradients: RowNormGradients,
    output: Tensor | None = None,
) -> None:
    """Compute the gradients of `row_norm`, and the output again unless `output` is None.

    With z = x_hat * w + b, g = grad_output * activation'(z) and h = g * w, grad_weight = sum of g * x_hat and grad_bias
    = sum of g over rows. In a row of N elements, x_hat_j = (u_j - mean) * rstd, so d mean / d u_i = 1 / N and
    d rstd / d u_i = -rstd**2 * x_hat_i / N, hence
        du_i = sum_j h_j * d x_hat_j / d u_i = rstd * (h_i - mean(h) - x_hat_i * mean(h * x_hat)),
    without mean(h) if the mean is taken as 0 (Ba, Kiros and Hinton, "Layer Normalization", 2016).
    """
    options, dtype = block.options, block.input.dtype
    x, gate, dy, dh = (
        None if t is None else _matrix(t).to(compute_dtype(dtype))
        for t in (block.input, block.gate, grad_output, grad_residual_out)
    )
    u = ACTIVATIONS[options.pre_activation](x)
    if options.gate_before_norm:
        factor = ACTIVATIONS[options.activation](gate)
        u = u * factor
    x_hat = (u if block.mean is None else u - block.mean.unsqueeze(1)) * block.rstd.unsqueeze(1)
    rounded = x_hat.to(dtype).to(x.dtype) if options.cast_before_weight else x_hat
    z = _affine(rounded, block.weight, block.bias, options.weight_offset)
    grad_gate = None
    if gate is None:
        g = slope(options.activation, z, dy)
        fill((output,), (ACTIVATIONS[options.activation](z),))
    elif options.gate_before_norm:
        g = dy
    else:
        g = dy * ACTIVATIONS[options.activation](gate)
        grad_gate = slope(options.activation, gate, dy * z)
    for target, values in ((gradients.weight, g * rounded), (gradients.bias, g)):
        if target is not None:
            target.copy_(_grouped(values, target).sum(1).reshape(target.shape))
    h = _affine(g, block.weight, None, options.weight_offset)
    du = h - x_hat * (h * x_hat).mean(1, keepdim=True)
    if block.mean is not None:
        du = du - h.mean(1, keepdim=True)
    du = du * block.rstd.unsqueeze(1)
    if options.gate_before_norm:
        du, grad_gate = du * factor, slope(options.activation, gate, du * x)
    du = slope(options.pre_activation, x, du)
    if dh is not None:
        du = du + dh
    fill((gradients.residual, gradients.gate), (du, grad_gate))
    fill((gradients.input,), (dropout(du.to(dtype).to(du.dtype), block.seed, options.dropout_p),))

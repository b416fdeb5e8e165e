"""Rotary embeddings in plain torch, with an optional norm before the rotation."""

import torch
from torch import Tensor

from ..blocks import Rotary, RotaryGradients, RotaryOptions
from .common import compute_dtype, fill, normalize


def rotary(block: Rotary) -> Tensor:
    """Compute a `Rotary`, for an input of any shape; all dimensions of the tables but the last are broadcast."""
    return _rotated(_before_rotation(block)[0], block).to(block.input.dtype)


def _before_rotation(block: Rotary) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return norm(input), x_hat and rstd, in the compute dtype."""
    options, x = block.options, block.input.to(compute_dtype(block.input.dtype))
    if options.norm == "none":
        return x, None, None
    x_hat, _, rstd = normalize(x, options.eps, options.norm == "layer")
    z = x_hat.to(block.input.dtype).to(x.dtype) if options.cast_before_weight else x_hat
    if block.weight is not None:
        z = z * (block.weight.to(x.dtype) + options.weight_offset)
    return z if block.bias is None else z + block.bias.to(x.dtype), x_hat, rstd


def _pairs(part: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    half = part.shape[-1] // 2
    return (part[..., ::2], part[..., 1::2]) if interleaved else (part[..., :half], part[..., half:])


def _joined_pairs(first: Tensor, second: Tensor, interleaved: bool) -> Tensor:
    return torch.stack((first, second), -1).flatten(-2) if interleaved else torch.cat((first, second), -1)


def _table(table: Tensor, options: RotaryOptions, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    table = table.to(dtype)
    return (table, table) if table.shape[-1] != options.rotary_dim else _pairs(table, options.interleaved_output)


def _parts(heads: Tensor, options: RotaryOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Split heads into the columns before the rotated columns, the rotated columns, and the columns after."""
    end = options.start + options.rotary_dim
    return heads[..., : options.start], heads[..., options.start : end], heads[..., end:]


def _rotated(z: Tensor, block: Rotary) -> Tensor:
    options = block.options
    before, part, after = _parts(z, options)
    first, second = _pairs(part, options.interleaved)
    (cos1, cos2), (sin1, sin2) = (_table(table, options, z.dtype) for table in (block.cos, block.sin))
    turned = first * cos1 - second * sin1, second * cos2 + first * sin2
    return torch.cat((before, _joined_pairs(*turned, options.interleaved_output), after), -1)


def rotated_back(grad: Tensor, block: Rotary) -> Tensor:
    """Return the gradient of the rotation's input, which does not depend on the values of that input.

    Shapes are as in `rotary`.
    """
    return _rotated_back(grad.to(compute_dtype(grad.dtype)), block).to(grad.dtype)


def _rotated_back(grad: Tensor, block: Rotary) -> Tensor:
    options = block.options
    before, part, after = _parts(grad, options)
    first, second = _pairs(part, options.interleaved_output)
    (cos1, cos2), (sin1, sin2) = (_table(table, options, grad.dtype) for table in (block.cos, block.sin))
    turned = first * cos1 + second * sin2, second * cos2 - first * sin1
    return torch.cat((before, _joined_pairs(*turned, options.interleaved), after), -1)


def rotary_table_gradients(block: Rotary, grad_output: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of cos and sin, which are rarely needed: no backend has kernels for them."""
    options = block.options
    z = _before_rotation(block)[0]
    first, second = _pairs(_parts(z, options)[1], options.interleaved)
    grad1, grad2 = _pairs(_parts(grad_output.to(z.dtype), options)[1], options.interleaved_output)
    gradients = []
    for table, pair in ((block.cos, (grad1 * first, grad2 * second)), (block.sin, (-grad1 * second, grad2 * first))):
        is_half = table.shape[-1] != options.rotary_dim
        whole = pair[0] + pair[1] if is_half else _joined_pairs(*pair, options.interleaved_output)
        gradients.append(whole.sum_to_size(table.shape).to(table.dtype))
    return gradients[0], gradients[1]


def rotary_forward(block: Rotary, output: Tensor) -> None:
    """Compute `rotary` into output."""
    output.copy_(rotary(block))


def rotary_backward(block: Rotary, grad_output: Tensor, gradients: RotaryGradients) -> None:
    """Compute the gradients of `rotary`; without a norm the input is not needed.

    The gradient of z is h, the transpose of the rotation applied to grad_output. grad_weight is the sum of h * x_hat,
    grad_bias the sum of h, and the gradient of the input is as in `row_norm_backward`. The statistics are computed
    again from the input.
    """
    options = block.options
    h = _rotated_back(grad_output.to(compute_dtype(grad_output.dtype)), block)
    if options.norm == "none":
        fill((gradients.input,), (h,))
        return
    _, x_hat, rstd = _before_rotation(block)
    rounded = x_hat.to(block.input.dtype).to(h.dtype) if options.cast_before_weight else x_hat
    leading = tuple(range(h.dim() - 1))
    fill(gradients[1:], ((h * rounded).sum(leading), h.sum(leading)))
    if block.weight is not None:
        h = h * (block.weight.to(h.dtype) + options.weight_offset)
    du = h - x_hat * (h * x_hat).mean(-1, keepdim=True)
    if options.norm == "layer":
        du = du - h.mean(-1, keepdim=True)
    fill((gradients.input,), (du * rstd.unsqueeze(-1),))

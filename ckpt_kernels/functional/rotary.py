"""Rotary position embeddings, and the norms of queries and keys before them."""

from typing import Any

from torch import Tensor

from .. import ops
from ..arguments import flag, number, one_of, untraced, whole
from ..backends.blocks import RotaryOptions
from .checks import check_device, check_last, check_tensor, rms_eps, shape_of

_LAYOUTS = ("halves", "interleaved")
_NORMS = ("rms", "layer")


def rotary(
    input: Tensor,
    cos: Tensor,
    sin: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    layout: str = "halves",
    output_layout: str | None = None,
    rotary_dim: int | None = None,
    rotary_start: int = 0,
    norm: str | None = None,
    eps: float | None = None,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
) -> Tensor:
    r"""Rotate the pairs of each head by the angles of a table, after an optional norm over the head, in one kernel per
    pass.

    .. math::
        (y_i, y_j) = (z_i \cos_i - z_j \sin_i,\; z_j \cos_j + z_i \sin_j), \qquad z = \mathrm{norm}(x)

    where (i, j) are columns among the R rotated ones: (i, i + R / 2) for "halves", (2 i, 2 i + 1) for "interleaved".
    All arithmetic is in float32 (float64 for float64 inputs), and the result is rounded once.

    Args:
        input: x, `(*, D)`, such as `(B, H, S, D)`, with any strides; float32, bfloat16, float16 or float64.
        cos, sin: `(*, R)`, or `(*, R / 2)` with one entry for both elements of a pair; of any of these dtypes. Their
            other dimensions broadcast with the input's: `(S, R)` or `(B, 1, S, R)` for an input `(B, H, S, D)`,
            `(S, 1, R)` for an input `(B, S, H, D)`.
        weight, bias: the weight and bias of the norm, `(D)`, of any of these dtypes; None means 1 and 0.
        layout: "halves", where pairs have one element in each half, or "interleaved", where pairs are neighbours.
        output_layout: the layout of the output, and of tables with R entries; None means `layout`.
        rotary_dim: R, an even number; None means the last dimension of the tables. Other columns are not rotated.
        rotary_start: the first column that is rotated.
        norm: "rms" or "layer" for a norm over the whole head before the rotation, or None.
        eps: the epsilon of the norm; None means that of the dtype of the arithmetic, or 1e-5 for a layer norm.
        weight_offset: added to the weight.
        cast_before_weight: round the normalised value to the input's dtype before the product, as Llama does.

    Returns:
        The input's shape and dtype, with the strides that torch's elementwise operators give.

    Kept for backward:
        The tables; with a norm, or if the tables require gradients, also the input. No statistics.

    Raises:
        RuntimeError: a dtype or device is not as described above, or shapes do not broadcast.
        TypeError: an argument is not of the expected type.
        ValueError: another argument is not as described above, or the rotated columns are not all within the head.

    Example:
        >>> angles = torch.outer(torch.arange(16.0), 10000.0 ** -torch.linspace(0, 1, 32))
        >>> cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()
        >>> q = torch.randn(2, 4, 16, 64, requires_grad=True)
        >>> turned = torch.cat((-q[..., 32:], q[..., :32]), -1)
        >>> torch.allclose(F.rotary(q, cos, sin), q * cos + turned * sin, atol=1e-6)
        True
        >>> saved_bytes(F.rotary, q, cos, sin) == cos.nbytes + sin.nbytes
        True

    Source:
        Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021; the norms: Dehghani et al.,
        "Scaling Vision Transformers to 22 Billion Parameters", 2023.
    """
    check_tensor(input, "input")
    if input.dim() < 1:
        raise RuntimeError("input has no dimension; expected (*, D)")
    for tensor, name in ((cos, "cos"), (sin, "sin")):
        _check_table(tensor, name, input)
    if cos.shape[-1] != sin.shape[-1]:
        raise RuntimeError(
            f"sin has shape {shape_of(sin)}; expected its last dimension to be that of cos, {cos.shape[-1]}"
        )
    check_last(weight, "weight", input)
    check_last(bias, "bias", input)
    cast = flag(cast_before_weight, "cast_before_weight")
    options = _options(input, cos, layout, output_layout, rotary_dim, rotary_start, norm, eps, weight_offset)
    if options.norm == "none" and (weight is not None or bias is not None):
        raise ValueError(f"norm is {norm!r}; expected 'rms' or 'layer' where there is a weight or a bias")
    return ops.rotary.rotary(input, cos, sin, weight, bias, options._replace(cast_before_weight=cast))


def rotary_qk(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    query_weight: Tensor | None = None,
    key_weight: Tensor | None = None,
    query_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    r"""`rotary` for queries and for keys, with the same tables.

    .. math::
        (y_i, y_j) = (z_i \cos_i - z_j \sin_i,\; z_j \cos_j + z_i \sin_j), \qquad z = \mathrm{norm}(x),\; x \in \{q, k\}

    Args:
        query, key: as `input` of `rotary`; they may have different numbers of heads.
        cos, sin: as for `rotary`.
        query_weight, key_weight, query_bias, key_bias: weights and biases of the two norms.

    Other arguments of `rotary` are passed by name, and apply to both.

    Returns:
        The rotated queries and keys.

    Kept for backward:
        The same tensors as for two calls of `rotary`.

    Raises:
        RuntimeError, TypeError, ValueError: as `rotary`. Messages use its argument names.

    Source:
        See `rotary`.

    Example:
        >>> q, k = torch.randn(2, 8, 16, 64), torch.randn(2, 2, 16, 64)
        >>> angles = torch.outer(torch.arange(16.0), 10000.0 ** -torch.linspace(0, 1, 32))
        >>> q, k = F.rotary_qk(q, k, angles.cos(), angles.sin(), rotary_dim=64)
        >>> q.shape, k.shape
        (torch.Size([2, 8, 16, 64]), torch.Size([2, 2, 16, 64]))
    """
    return (
        rotary(query, cos, sin, query_weight, query_bias, **options),
        rotary(key, cos, sin, key_weight, key_bias, **options),
    )


def check_rotation(layout: str, output_layout: str | None, norm: str | None) -> None:
    """Raise ValueError for a layout or norm that `rotary` does not have."""
    one_of(layout, _LAYOUTS, "layout")
    if output_layout is not None:
        one_of(output_layout, _LAYOUTS, "output_layout")
    if norm is not None:
        one_of(norm, _NORMS, "norm")


def _check_table(table: Tensor, argument: str, input: Tensor) -> None:
    check_tensor(table, argument)
    check_device(table, argument, input)
    lead, whole = shape_of(table)[:-1], shape_of(input)[:-1]
    fits = 1 <= table.dim() <= input.dim()
    pairs = zip(reversed(lead), reversed(whole), strict=False)
    fits = fits and all(size == 1 or size == other for size, other in pairs)
    if not fits:
        raise RuntimeError(
            f"{argument} has shape {shape_of(table)}; expected (*, R) or (*, R / 2), which is broadcast beside the "
            f"dimensions of input before its last, {whole}"
        )


def _options(
    input: Tensor,
    cos: Tensor,
    layout: str,
    output_layout: str | None,
    rotary_dim: int | None,
    rotary_start: int,
    norm: str | None,
    eps: float | None,
    weight_offset: float,
) -> RotaryOptions:
    output_layout = layout if output_layout is None else output_layout
    check_rotation(layout, output_layout, norm)
    norm = "none" if norm is None else norm
    columns, entries = untraced(input.shape[-1]), untraced(cos.shape[-1])
    turned = entries if rotary_dim is None else whole(rotary_dim, "rotary_dim")
    start = whole(rotary_start, "rotary_start")
    # Compared by ==, because a compiler looks for a size in a tuple by identity.
    if turned % 2 or (turned != entries and turned != 2 * entries):
        raise ValueError(
            f"rotary_dim is {turned} and tables have {entries} columns; expected an even number, as many or twice that"
        )
    if start < 0 or start + turned > columns:
        raise ValueError(
            f"rotary_start is {start} and rotary_dim {turned}; expected columns within the input's {columns}"
        )
    epsilon = 1e-5 if norm == "layer" and eps is None else rms_eps(input, eps)
    return RotaryOptions(
        turned,
        start,
        layout == "interleaved",
        output_layout == "interleaved",
        norm,
        0.0 if norm == "none" else epsilon,
        number(weight_offset, "weight_offset"),
    )

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
    r"""Turns the pairs of each head by the angles of a table, after a norm over the head if there is one, in one kernel
    a pass.

    .. math::
        (y_i, y_j) = (z_i \cos_i - z_j \sin_i,\; z_j \cos_j + z_i \sin_j), \qquad z = \mathrm{norm}(x)

    where (i, j) is (i, i + R / 2) with halves and (2 i, 2 i + 1) where neighbours are pairs, of the R rotated columns.
    Everything is computed in float32 (float64 of float64), and rounded once.

    Args:
        input: x, `(*, D)`, such as `(B, H, S, D)`, however it lies in memory; float32, bfloat16, float16 or float64.
        cos, sin: `(*, R)`, or `(*, R / 2)` with one entry for both elements of a pair; of any of these dtypes. Their
            other dimensions are broadcast beside the input's, as in a product of both: `(S, R)` or `(B, 1, S, R)` for
            an input of `(B, H, S, D)`, `(S, 1, R)` for one of `(B, S, H, D)`.
        weight, bias: of the norm, `(D)`, of any of these dtypes; None are 1 and 0.
        layout: "halves", where an element of the first half turns with one of the second, or "interleaved".
        output_layout: how pairs lie in the output, and in tables of R entries; None is `layout`.
        rotary_dim: R, an even number; None is the length of the tables' last dimension. The other columns pass.
        rotary_start: the first column that turns.
        norm: "rms" or "layer", over the whole head, before the rotation; None is none.
        eps: of the norm; None is the epsilon of the type that is computed in, or 1e-5 of a layer norm.
        weight_offset: added to the weight.
        cast_before_weight: rounds to the input's dtype before the weight, as Llama's norms do.

    Returns:
        The input's shape and dtype, with the strides that torch's own elementwise operators give.

    Kept for backward:
        The tables; with a norm, or where gradients of the tables are wanted, the input too. There are no statistics.

    Raises:
        RuntimeError: a tensor has another dtype or device than said above, or dimensions that are not broadcast.
        TypeError: an argument is no tensor, no whole number or no bool.
        ValueError: another argument is none of what is said above, or heads are shorter than what is to turn.

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
    r"""`rotary` of queries and of keys, by the same tables.

    .. math::
        (y_i, y_j) = (z_i \cos_i - z_j \sin_i,\; z_j \cos_j + z_i \sin_j), \qquad z = \mathrm{norm}(x),\; x \in \{q, k\}

    Args:
        query, key: as `input` of `rotary`; they may have different numbers of heads.
        cos, sin: as there.
        query_weight, key_weight, query_bias, key_bias: those of the two norms.

    All other arguments of `rotary` are taken by name, the same for both.

    Returns:
        Both, as `rotary` returns one.

    Kept for backward:
        What two calls of `rotary` keep.

    Raises:
        RuntimeError, TypeError, ValueError: as `rotary`, by whose names arguments are called.

    Source:
        As of `rotary`.

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
    """ValueError for a name that is none of `rotary`'s."""
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
    fits = fits and all(size in (1, other) for size, other in zip(reversed(lead), reversed(whole), strict=False))
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
    if turned % 2 or turned not in (entries, 2 * entries):
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

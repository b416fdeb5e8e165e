"""Rotary position embeddings as a module."""

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from .. import functional as F
from ..arguments import flag, number, size
from ..functional.rotary import check_rotation
from .extras import extras, recorded


class Rotary(nn.Module):
    r"""The rotation of heads, after an optional norm over each head, as one block.

    .. math::
        (y_i, y_j) = (z_i \cos_i - z_j \sin_i,\; z_j \cos_j + z_i \sin_j), \qquad z = \mathrm{norm}(x)

    Args:
        head_dim: D, the length of a head.
        layout, output_layout, rotary_dim, rotary_start, norm, eps, weight_offset, cast_before_weight: as for
            `functional.rotary`.
        elementwise_affine: whether a norm has a weight, which starts at 1.
        bias: whether a norm with a weight also has a bias, which starts at 0. ValueError without a weight.
        device, dtype: the device and dtype of the parameters.

    Shape:
        `forward(input, cos, sin)`: `(*, D)` and two tables, which broadcast with the input, to `(*, D)`. Parameters, as
        in torch's norms: `weight` and `bias`, `(D)`; None without a norm.

    Kept for backward:
        The tables; with a norm also the input.

    Example:
        >>> block = ckpt_kernels.nn.Rotary(64, norm="rms", eps=1e-6)
        >>> block
        Rotary(64, norm='rms', eps=1e-06)
        >>> angles = torch.outer(torch.arange(16.0), 10000.0 ** -torch.linspace(0, 1, 32)).repeat(1, 2)
        >>> block(torch.randn(2, 4, 16, 64), angles.cos(), angles.sin()).shape
        torch.Size([2, 4, 16, 64])

    Errors and source: `functional.rotary`.
    """

    weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        head_dim: int,
        *,
        layout: str = "halves",
        output_layout: str | None = None,
        rotary_dim: int | None = None,
        rotary_start: int = 0,
        norm: str | None = None,
        eps: float | None = None,
        weight_offset: float = 0.0,
        cast_before_weight: bool = False,
        elementwise_affine: bool = True,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_rotation(layout, output_layout, norm)
        has_weight = flag(elementwise_affine, "elementwise_affine") and norm is not None
        if flag(bias, "bias") and not has_weight:
            raise ValueError(
                f"bias is True, norm {norm!r} and elementwise_affine {elementwise_affine}; expected a weight"
            )
        self.head_dim = size(head_dim, "head_dim")
        self.layout = layout
        self.output_layout = output_layout
        self.rotary_dim = None if rotary_dim is None else size(rotary_dim, "rotary_dim")
        self.rotary_start = size(rotary_start, "rotary_start")
        turned = self.rotary_dim or 0
        if turned % 2 or self.rotary_start + turned > self.head_dim:
            raise ValueError(
                f"rotary_start is {rotary_start} and rotary_dim {rotary_dim}; expected an even number of columns "
                f"within the {head_dim} of a head"
            )
        self.norm = norm
        self.eps = None if eps is None else number(eps, "eps")
        self.weight_offset = number(weight_offset, "weight_offset")
        self.cast_before_weight = flag(cast_before_weight, "cast_before_weight")
        for name, wanted in (("weight", has_weight), ("bias", has_weight and bias)):
            values = torch.empty(head_dim, device=device, dtype=dtype) if wanted else None
            self.register_parameter(name, None if values is None else nn.Parameter(values))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set weights to 1 minus their offset, and biases to 0."""
        if self.weight is not None:
            nn.init.constant_(self.weight, 1 - self.weight_offset)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if isinstance(input, Proxy) and (call := recorded(self, input, cos, sin)) is not None:
            return call
        return F.rotary(
            input,
            cos,
            sin,
            self.weight,
            self.bias,
            layout=self.layout,
            output_layout=self.output_layout,
            rotary_dim=self.rotary_dim,
            rotary_start=self.rotary_start,
            norm=self.norm,
            eps=self.eps,
            weight_offset=self.weight_offset,
            cast_before_weight=self.cast_before_weight,
        )

    def extra_repr(self) -> str:
        return f"{self.head_dim}" + extras(
            layout=(self.layout, "halves"),
            output_layout=(self.output_layout, None),
            rotary_dim=(self.rotary_dim, None),
            rotary_start=(self.rotary_start, 0),
            norm=(self.norm, None),
            eps=(self.eps, None),
            weight_offset=(self.weight_offset, 0.0),
            cast_before_weight=(self.cast_before_weight, False),
            elementwise_affine=(self.weight is not None, self.norm is not None),
            bias=(self.bias is not None, False),
        )

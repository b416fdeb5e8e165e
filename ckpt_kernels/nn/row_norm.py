"""Row norms as modules."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from .. import functional as F
from ..activations import Activation, activation_name
from ..arguments import flag, number
from .extras import extras, recorded, row_shape, weight_and_bias


class LayerNorm(nn.LayerNorm):
    r"""`torch.nn.LayerNorm` with an activation after and before it, as one block.

    .. math::
        y = \mathrm{act}(\mathrm{LayerNorm}(\mathrm{pre}(x)))

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: as torch's.
        activation: act, applied to the normalised value.
        pre_activation: pre, applied to the input.

    Shape:
        `(*, normalized_shape)` to the same. Parameters, as torch's: `weight` and `bias`, `(normalized_shape)`.

    Kept for backward:
        The input, and two numbers per row.

    Example:
        >>> norm = ckpt_kernels.nn.LayerNorm(64, activation="gelu")
        >>> norm
        LayerNorm((64,), eps=1e-05, elementwise_affine=True, bias=True, activation='gelu')
        >>> norm.load_state_dict(torch.nn.LayerNorm(64).state_dict())
        <All keys matched successfully>
        >>> norm(torch.randn(8, 64)).shape
        torch.Size([8, 64])

    Errors and source: `functional.layer_norm`.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: Activation = "identity",
        pre_activation: Activation = "identity",
    ) -> None:
        super().__init__(row_shape(normalized_shape), eps, elementwise_affine, bias, device, dtype)
        self.activation = activation_name(activation)
        self.pre_activation = activation_name(pre_activation, "pre_activation")

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy) and (call := recorded(self, input)) is not None:
            return call
        weight, bias = weight_and_bias(self)
        return F.layer_norm(
            input,
            self.normalized_shape,
            weight,
            bias,
            self.eps,
            activation=self.activation,
            pre_activation=self.pre_activation,
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + extras(
            activation=(self.activation, "identity"), pre_activation=(self.pre_activation, "identity")
        )


class RMSNorm(nn.RMSNorm):
    r"""`torch.nn.RMSNorm` with an activation after and before it, as one block.

    .. math::
        y = \mathrm{act}\left(\frac{u}{\sqrt{\mathrm{mean}(u^2) + \epsilon}} \odot (o + w)\right),
        \qquad u = \mathrm{pre}(x)

    Args:
        normalized_shape, eps, elementwise_affine, device, dtype: as torch's.
        activation: act, applied to the normalised value.
        pre_activation: pre, applied to the input.
        weight_offset: o, added to the weight (1 for Gemma, whose weights then start at 0).
        cast_before_weight: round the normalised value to the input's dtype before the product (Llama).

    Shape:
        `(*, normalized_shape)` to the same. Parameter, as torch's: `weight`, `(normalized_shape)`.

    Kept for backward:
        The input, and one number per row.

    Example:
        >>> norm = ckpt_kernels.nn.RMSNorm(64, eps=1e-6, weight_offset=1.0)  # as Gemma's
        >>> norm.weight.abs().max().item()
        0.0
        >>> x = torch.randn(8, 64)
        >>> torch.allclose(norm(x), torch.nn.RMSNorm(64, eps=1e-6)(x), atol=1e-5)
        True

    Errors and source: `functional.rms_norm`.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: Activation = "identity",
        pre_activation: Activation = "identity",
        weight_offset: float = 0.0,
        cast_before_weight: bool = False,
    ) -> None:
        self.weight_offset = number(weight_offset, "weight_offset")
        super().__init__(row_shape(normalized_shape), eps, elementwise_affine, device, dtype)
        self.activation = activation_name(activation)
        self.pre_activation = activation_name(pre_activation, "pre_activation")
        self.cast_before_weight = flag(cast_before_weight, "cast_before_weight")

    def reset_parameters(self) -> None:
        """Set the weights to 1 minus their offset."""
        if self.elementwise_affine:
            nn.init.constant_(self.weight, 1.0 - self.weight_offset)

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy) and (call := recorded(self, input)) is not None:
            return call
        return F.rms_norm(
            input,
            self.normalized_shape,
            self.weight,
            self.eps,
            activation=self.activation,
            pre_activation=self.pre_activation,
            weight_offset=self.weight_offset,
            cast_before_weight=self.cast_before_weight,
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + extras(
            activation=(self.activation, "identity"),
            pre_activation=(self.pre_activation, "identity"),
            weight_offset=(self.weight_offset, 0.0),
            cast_before_weight=(self.cast_before_weight, False),
        )

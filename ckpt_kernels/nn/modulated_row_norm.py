"""Row norms whose result is scaled and shifted by sample, as modules."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from .. import functional as F
from ..activations import Activation, activation_name
from .extras import extras, recorded, row_shape
from .row_norm import LayerNorm


class ModulatedLayerNorm(LayerNorm):
    r"""LayerNorm whose result is scaled and shifted by sample, as one block: `forward(input, scale, shift)`.

    .. math::
        y = \mathrm{act}\left(\mathrm{LayerNorm}(\mathrm{pre}(x)) \odot (1 + s) + t\right)

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: as `torch.nn.LayerNorm`'s.
        activation, pre_activation: as `LayerNorm`'s.

    Shape:
        `(*samples, *, normalized_shape)` and two tensors `(*samples, normalized_shape)` to the first shape. Parameters:
        `weight` and `bias`, `(normalized_shape)`.

    Kept for backward:
        Input, scale, shift, and two numbers per row.

    Example:
        >>> norm = ckpt_kernels.nn.ModulatedLayerNorm(64, elementwise_affine=False)
        >>> norm(torch.randn(2, 8, 64), torch.randn(2, 64), torch.randn(2, 64)).shape
        torch.Size([2, 8, 64])

    Errors and source: `functional.modulated_layer_norm`.
    """

    def forward(self, input: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        if isinstance(input, Proxy) and (call := recorded(self, input, scale, shift)) is not None:
            return call
        return F.modulated_layer_norm(
            input,
            scale,
            shift,
            self.normalized_shape,
            self.weight,
            self.bias,
            self.eps,
            activation=self.activation,
            pre_activation=self.pre_activation,
        )


class ModulatedRMSNorm(nn.RMSNorm):
    r"""RMSNorm whose result is scaled and shifted by sample, as one block: `forward(input, scale, shift)`.

    .. math::
        y = \mathrm{act}\left(\mathrm{RMSNorm}(\mathrm{pre}(x)) \odot (1 + s) + t\right)

    Args:
        normalized_shape, eps, elementwise_affine, device, dtype: as `torch.nn.RMSNorm`'s.
        activation: act, applied to the modulated value.
        pre_activation: pre, applied to the input.

    Shape:
        `(*samples, *, normalized_shape)` and two tensors `(*samples, normalized_shape)` to the first shape. Parameter:
        `weight`, `(normalized_shape)`.

    Kept for backward:
        Input, scale, shift, and one number per row.

    Example:
        >>> norm = ckpt_kernels.nn.ModulatedRMSNorm(64)
        >>> norm(torch.randn(2, 8, 64), torch.randn(2, 64), torch.randn(2, 64)).shape
        torch.Size([2, 8, 64])

    Errors and source: `functional.modulated_rms_norm`.
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
    ) -> None:
        super().__init__(row_shape(normalized_shape), eps, elementwise_affine, device, dtype)
        self.activation = activation_name(activation)
        self.pre_activation = activation_name(pre_activation, "pre_activation")

    def forward(self, input: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        if isinstance(input, Proxy) and (call := recorded(self, input, scale, shift)) is not None:
            return call
        return F.modulated_rms_norm(
            input,
            scale,
            shift,
            self.normalized_shape,
            self.weight,
            self.eps,
            activation=self.activation,
            pre_activation=self.pre_activation,
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + extras(
            activation=(self.activation, "identity"), pre_activation=(self.pre_activation, "identity")
        )

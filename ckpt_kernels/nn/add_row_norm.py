"""Dropout, residual add and row norm, as modules."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from .. import functional as F
from ..activations import Activation, activation_name
from ..arguments import probability
from .extras import extras, recorded, row_shape, weight_and_bias
from .row_norm import RMSNorm


class AddLayerNorm(nn.LayerNorm):
    r"""Dropout, residual add and LayerNorm, as one block: `forward(input, residual)` returns (y, r).

    .. math::
        r = \mathrm{residual} + \mathrm{dropout}(x), \qquad y = \mathrm{act}(\mathrm{LayerNorm}(r))

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: as `torch.nn.LayerNorm`'s.
        activation: act, applied to the normalised value.
        dropout: the probability of dropping an element of the input in training.

    Shape:
        Two tensors `(*, normalized_shape)` to two of the same shape. Parameters: `weight` and `bias`,
        `(normalized_shape)`.

    Kept for backward:
        r, and two numbers per row; no dropout mask.

    Example:
        >>> add_norm = ckpt_kernels.nn.AddLayerNorm(64, dropout=0.1).eval()
        >>> x, residual = torch.randn(8, 64), torch.randn(8, 64)
        >>> y, r = add_norm(x, residual)
        >>> torch.equal(r, residual + x)
        True

    Errors and source: `functional.add_layer_norm`.
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
        dropout: float = 0.0,
    ) -> None:
        super().__init__(row_shape(normalized_shape), eps, elementwise_affine, bias, device, dtype)
        self.activation = activation_name(activation)
        self.dropout = probability(dropout, "dropout")

    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(input, Proxy) and (call := recorded(self, input, residual)) is not None:
            return call
        weight, bias = weight_and_bias(self)
        return F.add_layer_norm(
            input,
            residual,
            self.normalized_shape,
            weight,
            bias,
            self.eps,
            activation=self.activation,
            dropout_p=self.dropout,
            training=self.training,
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + extras(activation=(self.activation, "identity"), dropout=(self.dropout, 0.0))


class AddRMSNorm(RMSNorm):
    r"""Dropout, residual add and RMSNorm, as one block: `forward(input, residual)` returns (y, r).

    .. math::
        r = \mathrm{residual} + \mathrm{dropout}(x), \qquad y = \mathrm{act}(\mathrm{RMSNorm}(r))

    Args:
        normalized_shape, eps, elementwise_affine, device, dtype: as `torch.nn.RMSNorm`'s.
        activation: act, applied to the normalised value.
        dropout: the probability of dropping an element of the input in training.
        weight_offset, cast_before_weight: as `RMSNorm`'s.

    Shape:
        Two tensors `(*, normalized_shape)` to two of the same shape. Parameter: `weight`, `(normalized_shape)`.

    Kept for backward:
        r, and one number per row; no dropout mask.

    Example:
        >>> add_norm = ckpt_kernels.nn.AddRMSNorm(64)
        >>> x, residual = torch.randn(8, 64), torch.randn(8, 64)
        >>> y, residual = add_norm(x, residual)
        >>> y.shape, residual.shape
        (torch.Size([8, 64]), torch.Size([8, 64]))

    Errors and source: `functional.add_rms_norm`.
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
        dropout: float = 0.0,
        weight_offset: float = 0.0,
        cast_before_weight: bool = False,
    ) -> None:
        super().__init__(
            row_shape(normalized_shape),
            eps,
            elementwise_affine,
            device,
            dtype,
            activation=activation,
            weight_offset=weight_offset,
            cast_before_weight=cast_before_weight,
        )
        self.dropout = probability(dropout, "dropout")

    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(input, Proxy) and (call := recorded(self, input, residual)) is not None:
            return call
        return F.add_rms_norm(
            input,
            residual,
            self.normalized_shape,
            self.weight,
            self.eps,
            activation=self.activation,
            dropout_p=self.dropout,
            training=self.training,
            weight_offset=self.weight_offset,
            cast_before_weight=self.cast_before_weight,
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + extras(dropout=(self.dropout, 0.0))

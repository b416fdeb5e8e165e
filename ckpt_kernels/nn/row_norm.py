"""Row norms as modules. Each says in `extra_repr` what torch's own says, and what it does beyond that."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from .. import functional as F
from ..activations import Activation, activation_name
from .extras import extras, probability, recorded, weight_and_bias


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` with an activation after and before it, as one block; see `functional.layer_norm`.

    Args: as torch's, and
        activation: applied to the normalised output.
        pre_activation: applied to the input.
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
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
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
    """`torch.nn.RMSNorm` with an activation after and before it, as one block; see `functional.rms_norm`.

    Args: as torch's, and
        activation, pre_activation: applied to the normalised output, and to the input.
        weight_offset: added to the weight (1 for Gemma, whose weights then start at 0).
        cast_before_weight: round the normalised value to the input's dtype first (Llama).
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
        self.weight_offset = weight_offset
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self.activation = activation_name(activation)
        self.pre_activation = activation_name(pre_activation, "pre_activation")
        self.cast_before_weight = cast_before_weight

    def reset_parameters(self) -> None:
        """Weights such that weight_offset + weight is 1."""
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


class AddLayerNorm(nn.LayerNorm):
    """residual + dropout(input), and the norm of it, as one block; see `functional.add_layer_norm`.

    `forward(input, residual)` returns (output, residual_out).

    Args: as `torch.nn.LayerNorm`'s, and
        activation: applied to the normalised output.
        dropout: the probability with which elements of the input are dropped in training.
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
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self.activation = activation_name(activation)
        self.dropout = probability(dropout)

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
    """residual + dropout(input), and the RMS norm of it, as one block; see `functional.add_rms_norm`.

    `forward(input, residual)` returns (output, residual_out). Args: as `RMSNorm`'s, without `pre_activation`, and
        dropout: the probability with which elements of the input are dropped in training.
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
            normalized_shape,
            eps,
            elementwise_affine,
            device,
            dtype,
            activation=activation,
            weight_offset=weight_offset,
            cast_before_weight=cast_before_weight,
        )
        self.dropout = probability(dropout)

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


class GatedRMSNorm(nn.RMSNorm):
    """RMSNorm(input) * activation(gate), as one block; see `functional.gated_rms_norm`.

    `forward(input, gate)`. Args: as `torch.nn.RMSNorm`'s, and
        activation: applied to the gate.
        norm_before_gate: False normalises input * activation(gate) instead.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: Activation = "silu",
        norm_before_gate: bool = True,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self.activation = activation_name(activation)
        self.norm_before_gate = norm_before_gate

    def forward(self, input: Tensor, gate: Tensor) -> Tensor:
        if isinstance(input, Proxy) and (call := recorded(self, input, gate)) is not None:
            return call
        return F.gated_rms_norm(
            input,
            gate,
            self.normalized_shape,
            self.weight,
            self.eps,
            activation=self.activation,
            norm_before_gate=self.norm_before_gate,
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + extras(
            activation=(self.activation, "silu"), norm_before_gate=(self.norm_before_gate, True)
        )


class ModulatedLayerNorm(LayerNorm):
    """LayerNorm(input) * (1 + scale) + shift, as one block; see `functional.modulated_layer_norm`.

    `forward(input, scale, shift)`. Args: as `LayerNorm`'s.
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
    """RMSNorm(input) * (1 + scale) + shift, as one block; see `functional.modulated_rms_norm`.

    `forward(input, scale, shift)`. Args: as `torch.nn.RMSNorm`'s, and
        activation, pre_activation: applied to the modulated output, and to the input.
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
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
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

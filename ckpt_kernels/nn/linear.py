"""Blocks with the linear layers that read them, as modules.

A module makes one fused call with the parameters of its parts. If the parts have hooks or other forwards, they are
called one by one instead: see `by_parts`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from .. import functional as F
from ..activations import Activation, activation_name
from ..arguments import flag, number, probability, size
from ..functional.linear import level_name, norm_name
from .by_parts import are_plain, discarding_outputs
from .extras import extras, recorded
from .row_norm import LayerNorm, RMSNorm


class NormLinear(nn.Module):
    r"""A norm, an activation, and one linear layer that reads the result, or several.

    .. math::
        y_i = \mathrm{act}(\mathrm{norm}(x))\, W_i^\top + b_i

    Args:
        in_features: the length of the input's last dimension, which is normalised.
        out_features: the output features of the linear layer, or a sequence with those of several layers.
        bias: whether the linear layers have a bias.
        eps: the epsilon of the norm; None means the norm's default.
        device, dtype: the device and dtype of all parameters.
        norm: "layer_norm" or "rms_norm".
        activation: act, applied to the normalised value.
        recompute: "block", "output" or "all".

    Shape:
        `(*, in_features)` to `(*, out_features)`, or to a tuple of such tensors if `out_features` is a sequence.
        Parameters: those of `norm`, and of `linear` or `linears.0`, `linears.1`, ...

    Kept for backward:
        The input and one or two numbers per row; at "block" also the input of the linear layers.

    Example:
        >>> qkv = ckpt_kernels.nn.NormLinear(64, (64, 16, 16), norm="rms_norm", bias=False)
        >>> [y.shape[-1] for y in qkv(torch.randn(8, 64))]
        [64, 16, 16]

    Errors and source: `functional.norm_linear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int | Sequence[int],
        bias: bool = True,
        eps: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        norm: str = "layer_norm",
        activation: Activation = "identity",
        recompute: str = "output",
    ) -> None:
        super().__init__()
        self.recompute = level_name(recompute)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        columns, has_bias = size(in_features, "in_features"), flag(bias, "bias")
        epsilon = None if eps is None else number(eps, "eps")
        self.norm: LayerNorm | RMSNorm
        if norm_name(norm) == "layer_norm":
            self.norm = LayerNorm(columns, 1e-5 if epsilon is None else epsilon, activation=activation, **factory)
        else:
            self.norm = RMSNorm(columns, epsilon, activation=activation, **factory)
        if isinstance(out_features, Sequence):
            sizes = [size(out, "out_features") for out in out_features]
            self.linears = nn.ModuleList(nn.Linear(columns, out, has_bias, **factory) for out in sizes)
        else:
            self.linear = nn.Linear(columns, size(out_features, "out_features"), has_bias, **factory)

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, ...]:
        if isinstance(input, Proxy) and (call := recorded(self, input)) is not None:
            return call
        norm = self.norm
        centered = isinstance(norm, LayerNorm)
        single = "linear" in self._modules
        linears: list[Any] = [self.linear] if single else list(self.linears)
        if not are_plain(norm, *linears):
            with discarding_outputs(self, self.recompute):
                normalized = norm(input)
                several = tuple(linear(normalized) for linear in linears)
            return several[0] if single else several
        outputs = F.norm_linear(
            input,
            norm.normalized_shape,
            norm.weight,
            norm.bias if isinstance(norm, LayerNorm) else None,
            [linear.weight for linear in linears],
            [linear.bias for linear in linears],
            norm.eps,
            norm="layer_norm" if centered else "rms_norm",
            activation=norm.activation,
            recompute=self.recompute,
        )
        return outputs[0] if single else outputs

    def extra_repr(self) -> str:
        return f"recompute={self.recompute!r}"


class ActLinear(nn.Linear):
    r"""An activation, dropout, and the linear layer that reads the result.

    .. math::
        y = \mathrm{dropout}(\mathrm{act}(x))\, W^\top + b

    Args:
        in_features, out_features, bias, device, dtype: as for `torch.nn.Linear`.
        activation: act, applied to the input.
        dropout: the probability of dropping an element of act(x) in training.
        recompute: "block", "output" or "all".

    Shape:
        `(*, in_features)` to `(*, out_features)`. Parameters, as in `torch.nn.Linear`: `weight` and `bias`.

    Kept for backward:
        The input, and no dropout mask; at "block" also the input of the linear layer.

    Example:
        >>> layer = ckpt_kernels.nn.ActLinear(64, 32, activation="gelu")
        >>> layer(torch.randn(8, 64)).shape
        torch.Size([8, 32])

    Errors and source: `functional.act_linear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: Activation = "gelu",
        dropout: float = 0.0,
        recompute: str = "output",
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation = activation_name(activation)
        self.dropout = probability(dropout, "dropout")
        self.recompute = level_name(recompute)

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy) and (call := recorded(self, input)) is not None:
            return call
        return F.act_linear(
            input,
            self.weight,
            self.bias,
            activation=self.activation,
            dropout_p=self.dropout,
            training=self.training,
            recompute=self.recompute,
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + extras(
            activation=(self.activation, "identity"), dropout=(self.dropout, 0.0), recompute=(self.recompute, "output")
        )

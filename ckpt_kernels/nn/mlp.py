"""MLPs as modules.

A module makes one fused call with the parameters of its parts. If the parts have hooks or other forwards, they are
called one by one instead: see `by_parts`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from .. import functional as F
from ..activations import Activation, activation_name
from ..arguments import flag, probability, size
from ..functional.linear import level_name
from ..functional.mlps import tiles_for
from ..ops.glu import layout_name
from .by_parts import apply_dropout, are_plain, discarding_outputs
from .extras import extras, recorded


class MLP(nn.Module):
    r"""Linear, activation, dropout, linear.

    .. math::
        y = \mathrm{dropout}(\mathrm{act}(x W_1^\top + b_1))\, W_2^\top + b_2

    Args:
        in_features, hidden_features: the input and output features of the first linear layer.
        out_features: the output features of the second linear layer; None means `in_features`.
        bias: whether the linear layers have a bias.
        device, dtype: the device and dtype of all parameters.
        activation: act.
        dropout: the probability of dropping an element between the linear layers in training.
        recompute: "block", "output" or "all".
        tiles: the number of parts in which rows are processed; see `functional.mlp`.

    Shape:
        `(*, in_features)` to `(*, out_features)`. Parameters: those of `fc1` and `fc2`.

    Kept for backward:
        The input; at "output" and "block" also the first product; at "block" also the input of the second product.

    Example:
        >>> mlp = ckpt_kernels.nn.MLP(16, 64, recompute="all")
        >>> x = torch.randn(8, 16, requires_grad=True)
        >>> saved_bytes(mlp, x) == x.nbytes
        True

    Errors and source: `functional.mlp`.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: Activation = "gelu",
        dropout: float = 0.0,
        recompute: str = "output",
        tiles: int | None = None,
    ) -> None:
        super().__init__()
        width, hidden, out = _sizes(in_features, hidden_features, out_features)
        factory: dict[str, Any] = {"bias": flag(bias, "bias"), "device": device, "dtype": dtype}
        self.fc1 = nn.Linear(width, hidden, **factory)
        self.fc2 = nn.Linear(hidden, out, **factory)
        self.activation = activation_name(activation)
        self.dropout = probability(dropout, "dropout")
        self.recompute, self.tiles = level_name(recompute), tiles
        tiles_for(tiles, recompute)

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy) and (call := recorded(self, input)) is not None:
            return call
        first, last = self.fc1, self.fc2
        if not are_plain(first, last):
            drop = self.dropout
            with discarding_outputs(self, self.recompute):
                act = F.bias_act(first(input), activation=self.activation, dropout_p=drop, training=self.training)
                return last(act)
        return F.mlp(
            input,
            first.weight,
            first.bias,
            last.weight,
            last.bias,
            activation=self.activation,
            dropout_p=self.dropout,
            training=self.training,
            recompute=self.recompute,
            tiles=self.tiles,
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, dropout={self.dropout}" + extras(
            recompute=(self.recompute, ""), tiles=(self.tiles, None)
        )


class GatedMLP(nn.Module):
    r"""Two products of the input, one of which gates the other, dropout, and a third product.

    .. math::
        y = \mathrm{dropout}(\mathrm{act}(x W_g^\top + b_g) \odot (x W_v^\top + b_v))\, W^\top + b

    Args:
        in_features, hidden_features: the input and output features of the products of the input.
        out_features: the output features of the last product; None means `in_features`.
        bias: whether the linear layers have a bias.
        device, dtype: the device and dtype of all parameters.
        activation: act, applied to the gate.
        dropout: the probability of dropping an element of the last product's input in training.
        packed: whether one weight holds gate and value.
        layout: the layout of a packed weight: "gate_first", "value_first" or "interleaved".
        recompute: "block", "output" or "all".
        tiles: the number of parts in which rows are processed; see `functional.mlp`.

    Shape:
        `(*, in_features)` to `(*, out_features)`. Parameters: those of `gate_proj`, `up_proj` (for the value) and
        `down_proj`, as in Llama; if packed, those of `gate_up_proj` and `down_proj`, as in Phi-3.

    Kept for backward:
        The input; at "output" and "block" also gate and value; at "block" also the input of the last product.

    Example:
        >>> mlp = ckpt_kernels.nn.GatedMLP(16, 64)  # "output"
        >>> x = torch.randn(8, 16, requires_grad=True)
        >>> saved_bytes(mlp, x) == x.nbytes + 2 * 4 * 8 * 64
        True

    Errors and source: `functional.gated_mlp`.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: Activation = "silu",
        dropout: float = 0.0,
        packed: bool = False,
        layout: str = "gate_first",
        recompute: str = "output",
        tiles: int | None = None,
    ) -> None:
        super().__init__()
        width, hidden, out = _sizes(in_features, hidden_features, out_features)
        factory: dict[str, Any] = {"bias": flag(bias, "bias"), "device": device, "dtype": dtype}
        if flag(packed, "packed"):
            self.gate_up_proj = nn.Linear(width, 2 * hidden, **factory)
        else:
            self.gate_proj = nn.Linear(width, hidden, **factory)
            self.up_proj = nn.Linear(width, hidden, **factory)
        self.down_proj = nn.Linear(hidden, out, **factory)
        self.activation = activation_name(activation)
        self.dropout = probability(dropout, "dropout")
        self.packed, self.layout = packed, layout_name(layout)
        if not packed and layout != "gate_first":
            raise ValueError(
                f"layout is {layout!r} and packed is {packed}; expected a layout only where packed is True"
            )
        self.recompute, self.tiles = level_name(recompute), tiles
        tiles_for(tiles, recompute)

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy) and (call := recorded(self, input)) is not None:
            return call
        gate = self.gate_up_proj if self.packed else self.gate_proj
        value = None if self.packed else self.up_proj
        last = self.down_proj
        if not are_plain(gate, last) or not (value is None or are_plain(value)):
            with discarding_outputs(self, self.recompute):
                if value is None:
                    product = F.packed_glu(gate(input), activation=self.activation, layout=self.layout)
                else:
                    product = F.glu(gate(input), value(input), activation=self.activation)
                return last(apply_dropout(product, self.dropout, self.training))
        return F.gated_mlp(
            input,
            gate.weight,
            None if value is None else value.weight,
            last.weight,
            gate.bias,
            None if value is None else value.bias,
            last.bias,
            activation=self.activation,
            layout=self.layout,
            dropout_p=self.dropout,
            training=self.training,
            recompute=self.recompute,
            tiles=self.tiles,
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, dropout={self.dropout}" + extras(
            layout=(self.layout if self.packed else "", ""), recompute=(self.recompute, ""), tiles=(self.tiles, None)
        )


def _sizes(in_features: int, hidden_features: int, out_features: int | None) -> tuple[int, int, int]:
    """The three widths of an MLP, whose output is by default as wide as its input."""
    width = size(in_features, "in_features")
    out = width if out_features is None else size(out_features, "out_features")
    return width, size(hidden_features, "hidden_features"), out

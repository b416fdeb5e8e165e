"""A bias, an activation and a dropout as one module."""

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from .. import functional as F
from ..activations import Activation, activation_name
from ..arguments import flag, probability, size
from .extras import extras, recorded


class BiasAct(nn.Module):
    r"""A bias, an activation and dropout, as one block, with the input's strides.

    .. math::
        y = \mathrm{dropout}(\mathrm{act}(x + b))

    Args:
        num_features: N, the length of the input's last dimension.
        bias: whether the module has a bias, which starts at 0.
        device, dtype: the device and dtype of the bias.
        activation: act.
        dropout: the probability of dropping an element of the result in training.

    Shape:
        `(*, N)` to the same. Parameter: `bias`, `(N)`.

    Kept for backward:
        The input; for relu and leaky_relu only the output; for the identity neither. No dropout mask.

    Example:
        >>> block = ckpt_kernels.nn.BiasAct(64, activation="gelu", dropout=0.1)
        >>> block(torch.randn(8, 64)).shape
        torch.Size([8, 64])

    Errors and source: `functional.bias_act`.
    """

    def __init__(
        self,
        num_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: Activation = "identity",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_features = size(num_features, "num_features")
        self.activation = activation_name(activation)
        self.dropout = probability(dropout, "dropout")
        if flag(bias, "bias"):
            self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy) and (call := recorded(self, input)) is not None:
            return call
        return F.bias_act(input, self.bias, activation=self.activation, dropout_p=self.dropout, training=self.training)

    def extra_repr(self) -> str:
        return f"{self.num_features}" + extras(
            bias=(self.bias is not None, True),
            activation=(self.activation, "identity"),
            dropout=(self.dropout, 0.0),
        )

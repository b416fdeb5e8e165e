"""DyT as a module."""

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from .. import functional as F
from ..arguments import flag, number, size
from .extras import extras, recorded


class DyT(nn.Module):
    r"""Dynamic tanh, a replacement for a norm, as one block, with the input's strides.

    .. math::
        y = \tanh(\alpha x) \odot w + b

    Args:
        num_features: N, the length of the input's last dimension.
        alpha_init: the initial alpha.
        elementwise_affine: whether there are a weight, which starts at 1, and a bias, which starts at 0.
        bias: False for a weight without a bias.
        device, dtype: the device and dtype of the parameters.

    Shape:
        `(*, N)` to the same. Parameters, with the names in the paper's code: `alpha`, `(1)`, `weight` and `bias`,
        `(N)`.

    Kept for backward:
        The input.

    Example:
        >>> block = ckpt_kernels.nn.DyT(64, alpha_init=0.8)
        >>> block
        DyT(64, alpha_init=0.8)
        >>> x = torch.randn(8, 64)
        >>> torch.allclose(block(x), torch.tanh(0.8 * x), atol=1e-6)
        True

    Errors and source: `functional.dyt`.
    """

    weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        num_features: int,
        alpha_init: float = 0.5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features = size(num_features, "num_features")
        self.alpha_init = number(alpha_init, "alpha_init")
        self.elementwise_affine = flag(elementwise_affine, "elementwise_affine")
        self.alpha = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        for name, wanted in (("weight", elementwise_affine), ("bias", elementwise_affine and flag(bias, "bias"))):
            values = torch.empty(num_features, device=device, dtype=dtype) if wanted else None
            self.register_parameter(name, None if values is None else nn.Parameter(values))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set alpha to `alpha_init`, weights to 1 and biases to 0."""
        nn.init.constant_(self.alpha, self.alpha_init)
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy) and (call := recorded(self, input)) is not None:
            return call
        return F.dyt(input, self.alpha, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.num_features}" + extras(
            alpha_init=(self.alpha_init, 0.5),
            elementwise_affine=(self.elementwise_affine, True),
            bias=(self.bias is not None, self.elementwise_affine),
        )

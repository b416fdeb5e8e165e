"""Row norms with a gate as modules."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from .. import functional as F
from ..activations import Activation, activation_name
from ..arguments import flag
from .extras import extras, recorded, row_shape


class GatedRMSNorm(nn.RMSNorm):
    r"""RMSNorm and a gate, in either order, as one block: `forward(input, gate)`.

    .. math::
        y = \mathrm{RMSNorm}(x) \odot \mathrm{act}(g)
        \qquad\text{or}\qquad y = \mathrm{RMSNorm}(x \odot \mathrm{act}(g))

    Args:
        normalized_shape, eps, elementwise_affine, device, dtype: as `torch.nn.RMSNorm`'s.
        activation: act, applied to the gate.
        norm_before_gate: True computes the first form, False the second.

    Shape:
        Two tensors `(*, normalized_shape)` to one of the same shape. Parameter: `weight`, `(normalized_shape)`.

    Kept for backward:
        Input, gate, and one number per row.

    Example:
        >>> norm = ckpt_kernels.nn.GatedRMSNorm(64, norm_before_gate=False)
        >>> norm(torch.randn(8, 64), torch.randn(8, 64)).shape
        torch.Size([8, 64])

    Errors and source: `functional.gated_rms_norm`.
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
        super().__init__(row_shape(normalized_shape), eps, elementwise_affine, device, dtype)
        self.activation = activation_name(activation)
        self.norm_before_gate = flag(norm_before_gate, "norm_before_gate")

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

"""Gated linear units as a module."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from .. import functional as F
from ..activations import Activation, activation_name
from ..arguments import whole
from ..functional.glu import limits
from ..ops.glu import layout_name
from .extras import extras, recorded


class GLU(nn.Module):
    r"""The product of an activated gate and a value, as one block.

    .. math::
        y = \mathrm{act}(\min(g, l)) \odot (\max(\min(v, l), -l) + o)

    `forward(input)` reads gate and value from the halves of one tensor; with the default arguments the module computes
    the same as `torch.nn.GLU`. `forward(gate, value)` reads two tensors. The output has the input's order of dimensions
    in memory.

    Args:
        dim: the dimension whose halves are gate and value.
        activation: act, applied to the gate.
        layout: "value_first" as in torch, "gate_first" or "interleaved".
        limit: l, above 0, the limit of gate and value; None for no limit.
        offset: o, added to the value.

    Shape:
        `(*, 2 N, *)` to `(*, N, *)`; or two tensors of one shape to that shape.

    Kept for backward:
        Gate and value.

    Example:
        >>> swiglu = ckpt_kernels.nn.GLU(activation="silu", layout="gate_first")
        >>> swiglu(torch.randn(8, 128)).shape
        torch.Size([8, 64])
        >>> x = torch.randn(8, 128)
        >>> torch.allclose(ckpt_kernels.nn.GLU()(x), torch.nn.GLU()(x), atol=1e-6)
        True

    Errors and source: `functional.packed_glu` and `functional.glu`; IndexError for a `dim` that the input does not
    have.
    """

    def __init__(
        self,
        dim: int = -1,
        *,
        activation: Activation = "sigmoid",
        layout: str = "value_first",
        limit: float | None = None,
        offset: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim = whole(dim, "dim")
        self.activation = activation_name(activation)
        self.layout = layout_name(layout)
        limits(limit, offset)
        self.limit, self.offset = limit, offset

    def forward(self, input: Tensor, value: Tensor | None = None) -> Tensor:
        if isinstance(input, Proxy) and (call := recorded(self, input, value)) is not None:
            return call
        return _gated(input, value, self.dim, self.activation, self.layout, self.limit, self.offset)

    def extra_repr(self) -> str:
        layout = {"activation": (self.activation, "sigmoid"), "layout": (self.layout, "value_first")}
        return f"dim={self.dim}" + extras(**layout, limit=(self.limit, None), offset=(self.offset, 0.0))


def _gated(
    input: Tensor,
    value: Tensor | None,
    dim: int,
    activation: str,
    layout: str,
    limit: float | None,
    offset: float,
) -> Tensor:
    options: dict[str, Any] = {"activation": activation, "limit": limit, "offset": offset}
    if value is not None:
        return F.glu(input, value, **options)
    dims = input.dim()
    if dims == 0:
        raise RuntimeError("input has shape (); expected at least one dimension")
    if not -dims <= dim < dims:
        raise IndexError(f"dim is {dim}; expected a dimension of input, which has shape {tuple(input.shape)}")
    dim %= dims
    if input.shape[dim] % 2:
        raise RuntimeError(f"input has shape {tuple(input.shape)}; expected dimension {dim} of even length")
    if dim == dims - 1:
        return F.packed_glu(input, layout=layout, **options)
    if input.is_contiguous() and layout != "interleaved":
        # Flattened with all later dimensions, the halves of the dimension stay halves.
        halves = F.packed_glu(input.flatten(dim), layout=layout, **options)
        return halves.unflatten(dim, (input.shape[dim] // 2, *input.shape[dim + 1 :]))
    if not input.is_nested and 0 in input.stride() and layout != "interleaved":
        # In an expanded tensor several elements share one place in memory. The halves determine the output's layout.
        first, second = input.chunk(2, dim)
        gate, value = (second, first) if layout == "value_first" else (first, second)
        return F.glu(gate, value, **options)
    last = F.packed_glu(input.movedim(dim, -1), layout=layout, **options)
    return last.movedim(-1, dim)


# While torch.fx traces the module itself, it is not known yet whether calls pass one tensor or two.
torch.fx.wrap("_gated")

"""Gated linear units as a module."""

from torch import Tensor, nn
from torch.fx import Proxy

from .. import functional as F
from ..activations import Activation, activation_name
from ..ops.glu import layout_name
from .extras import extras, recorded


class GLU(nn.Module):
    r"""A gate and its product with a value, as one block.

    .. math::
        y = \mathrm{act}(g) \odot v

    `forward(input)` takes gate and value out of one tensor; as constructed by default it computes what `torch.nn.GLU`
    does. `forward(gate, value)` takes them as two. The output's dimensions lie in memory as the input's.

    Args:
        dim: the dimension that packs the two.
        activation: act, applied to the gate.
        layout: "value_first" as torch's, "gate_first" or "interleaved".

    Shape:
        `(*, 2 N, *)` to `(*, N, *)`; or twice any shape to the same.

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

    def __init__(self, dim: int = -1, *, activation: Activation = "sigmoid", layout: str = "value_first") -> None:
        super().__init__()
        self.dim = dim
        self.activation = activation_name(activation)
        self.layout = layout_name(layout)

    def forward(self, input: Tensor, value: Tensor | None = None) -> Tensor:
        if isinstance(input, Proxy) and (call := recorded(self, input, value)) is not None:
            return call
        if value is not None:
            return F.glu(input, value, activation=self.activation)
        if not -input.dim() <= self.dim < input.dim():
            raise IndexError(f"dim is {self.dim}; expected a dimension of input, which has shape {tuple(input.shape)}")
        dim = self.dim % input.dim()
        if input.shape[dim] % 2:
            raise RuntimeError(f"input has shape {tuple(input.shape)}; expected dimension {dim} of even length")
        if dim == input.dim() - 1:
            return F.packed_glu(input, activation=self.activation, layout=self.layout)
        if input.is_contiguous() and self.layout != "interleaved":
            # The halves of an inner dimension are the halves of it and all that follow.
            halves = F.packed_glu(input.flatten(dim), activation=self.activation, layout=self.layout)
            return halves.unflatten(dim, (input.shape[dim] // 2, *input.shape[dim + 1 :]))
        last = F.packed_glu(input.movedim(dim, -1), activation=self.activation, layout=self.layout)
        return last.movedim(-1, dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}" + extras(activation=(self.activation, "sigmoid"), layout=(self.layout, "value_first"))

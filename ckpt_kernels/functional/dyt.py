"""DyT, a replacement for norms."""

from torch import Tensor

from .. import ops
from .checks import check_device, check_last, check_tensor, shape_of


def dyt(input: Tensor, alpha: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    r"""Dynamic tanh, a replacement for a norm, in one kernel per pass.

    .. math::
        y = \tanh(\alpha x) \odot w + b

    Args:
        input: x, `(*, N)`; float32, bfloat16, float16 or float64.
        alpha: one element, `(1)` or `()`, of any of these dtypes.
        weight: w, `(N)`, of any of these dtypes; None means 1.
        bias: b, `(N)`, of any of these dtypes; None means 0.

    Returns:
        The input's shape and dtype, with the strides that torch's elementwise operators give: the input's strides if
        the input is dense, in any order of the dimensions. Gradients have these strides too.

    Kept for backward:
        The input. No statistics.

    Raises:
        RuntimeError: a shape, dtype or device is not as described above.
        TypeError: an argument is not a tensor.

    Example:
        >>> x, alpha = torch.randn(8, 64, requires_grad=True), torch.nn.Parameter(torch.tensor([0.5]))
        >>> torch.allclose(F.dyt(x, alpha), torch.tanh(0.5 * x), atol=1e-6)
        True
        >>> saved_bytes(F.dyt, x, alpha) == x.nbytes
        True

    Source:
        Zhu et al., "Transformers without Normalization", 2025.
    """
    check_tensor(input, "input", nested=True)
    check_tensor(alpha, "alpha")
    check_device(alpha, "alpha", input)
    if shape_of(alpha) not in ((), (1,)):
        raise RuntimeError(f"alpha has shape {shape_of(alpha)}; expected (1,) or ()")
    check_last(weight, "weight", input)
    check_last(bias, "bias", input)
    return ops.dyt.dyt(input, alpha, weight, bias, ops.block.NoOptions())

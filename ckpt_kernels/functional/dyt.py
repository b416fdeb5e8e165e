"""DyT, which stands where a norm stood."""

from torch import Tensor

from .. import ops
from .checks import check_device, check_last, check_tensor, shape_of


def dyt(input: Tensor, alpha: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    r"""Dynamic tanh, in the place of a norm, in one kernel a pass.

    .. math::
        y = \tanh(\alpha x) \odot w + b

    Args:
        input: x, `(*, N)`; float32, bfloat16, float16 or float64.
        alpha: one element, `(1)` or `()`, of any of these dtypes.
        weight: w, `(N)`, of any of these dtypes; None is 1.
        bias: b, `(N)`, of any of these dtypes; None is 0.

    Returns:
        The input's shape and dtype, with the strides that torch's own elementwise operators give: the input's where
        that is dense, in any order of its dimensions. Gradients have them too.

    Kept for backward:
        The input. There are no statistics.

    Raises:
        RuntimeError: a tensor has another shape, dtype or device than said above.
        TypeError: an argument is no tensor.

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

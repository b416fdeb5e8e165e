"""Row norms with a gate, before or after the norm."""

from collections.abc import Sequence

from torch import Tensor

from .. import ops, thin
from ..activations import Activation, activation_name
from ..arguments import flag
from ..backends.blocks import RowNormOptions
from .checks import (
    autocast,
    check_coefficient,
    check_input,
    check_like,
    promoted,
    rms_eps,
)


def gated_rms_norm(
    input: Tensor,
    gate: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    activation: Activation = "silu",
    norm_before_gate: bool = True,
) -> Tensor:
    r"""RMSNorm and a gate, in either order, in one kernel per pass.

    .. math::
        y = \frac{x}{\sqrt{\mathrm{mean}(x^2) + \epsilon}} \odot w \odot \mathrm{act}(g)
        \qquad\text{or}\qquad
        y = \frac{h}{\sqrt{\mathrm{mean}(h^2) + \epsilon}} \odot w, \quad h = x \odot \mathrm{act}(g)

    Args:
        input: x, `(*, normalized_shape)`; float32, bfloat16, float16 or float64.
        gate: g, of the input's shape and dtype.
        normalized_shape: the last dimensions, normalised together.
        weight: w, `(normalized_shape)`, of any of these dtypes; None means 1.
        eps: added to the mean square; None means the epsilon of the dtype of the arithmetic.
        activation: act, applied to the gate.
        norm_before_gate: True computes the first form, False the second.

    Returns:
        `(*, normalized_shape)`, contiguous, of the input's dtype.

    Kept for backward:
        Input, gate, and one number per row.

    Raises:
        RuntimeError: a shape, dtype or device is not as described above.
        ValueError: the activation is unknown.
        TypeError: an argument is not of the expected type.

    Example:
        >>> x, gate = torch.randn(8, 64), torch.randn(8, 64)
        >>> y = F.gated_rms_norm(x, gate, 64)
        >>> torch.allclose(y, torch.nn.functional.rms_norm(x, (64,)) * torch.nn.functional.silu(gate), atol=1e-5)
        True

    Source:
        Dao and Gu, "Transformers are SSMs" (Mamba-2), 2024.
    """
    tensors = (input, gate, weight)
    call = "gated_row_norm", tensors, (normalized_shape, eps, activation, norm_before_gate)
    plan = thin.plan_of(*call)
    if plan is not None:
        return plan(input, None, gate, None, None, weight, None, None)[0]
    input, gate = promoted(input, gate)
    columns = check_input(input, normalized_shape)
    check_like(gate, "gate", input)
    check_coefficient(weight, "weight", input, normalized_shape)
    eps, name = rms_eps(input, eps), activation_name(activation)
    gate_first = not flag(norm_before_gate, "norm_before_gate")
    options = RowNormOptions(columns, eps, False, activation=name, gate_before_norm=gate_first)
    thin.remember(thin.row_norm.row_norm(tensors[0], None, tensors[1], None, None, weight, None, options), *call)
    input, gate, weight = autocast(input, gate, weight)
    return ops.row_norm.row_norm(input, None, gate, None, None, weight, None, None, options)[0]

"""Gated linear units."""

import math

from torch import Tensor

from .. import ops, thin
from ..activations import Activation, activation_name
from ..arguments import number
from .checks import check_like, check_tensor, promoted, shape_of


def glu(
    gate: Tensor,
    value: Tensor,
    *,
    activation: Activation = "silu",
    limit: float | None = None,
    offset: float = 0.0,
) -> Tensor:
    r"""The product of an activated gate and a value in one kernel per pass: SwiGLU, GEGLU, ReGLU or GLU.

    .. math::
        y = \mathrm{act}(\min(g, l)) \odot (\max(\min(v, l), -l) + o)

    Args:
        gate: g, of any shape; float32, bfloat16, float16 or float64.
        value: v, of the gate's shape and dtype.
        activation: act; "silu" for SwiGLU, "gelu" for GEGLU, "relu" for ReGLU, "sigmoid" for GLU.
        limit: l, above 0, the limit of gate and value; None for no limit. As in `torch.clamp`, the gradient beyond the
            limit is 0; from torch 2.14 on, at the limit itself too.
        offset: o, added to the value. GPT-OSS uses "quick_gelu", a limit of 7 and an offset of 1.

    Gate and value may be views, such as the halves of one product. They are not copied if their innermost dimension is
    contiguous.

    Returns:
        The gate's shape and dtype, and also the gate's strides if the gate is dense, in any order of the dimensions.
        Gradients have the strides of the output's gradient, or with a limit the strides of the output.

    Kept for backward:
        Gate and value.

    Raises:
        RuntimeError: the value has another shape, dtype or device than the gate.
        ValueError: the activation is unknown, or the limit is not above 0.
        TypeError: an argument is not of the expected type.

    Example:
        >>> gate, value = torch.randn(8, 64, requires_grad=True), torch.randn(8, 64)
        >>> y = F.glu(gate, value)
        >>> torch.allclose(y, torch.nn.functional.silu(gate) * value, atol=1e-6)
        True
        >>> saved_bytes(F.glu, gate, value) == gate.nbytes + value.nbytes
        True

    Source:
        Shazeer, "GLU Variants Improve Transformer", 2020; Dauphin et al., "Language Modeling with Gated Convolutional
        Networks", 2017; limits and offset: OpenAI, "gpt-oss-120b & gpt-oss-20b Model Card", 2025.
    """
    call = "glu", (gate, value), (activation, limit, offset)
    plan = thin.plan_of(*call)
    if plan is not None:
        return plan(gate, value)
    gate, value = promoted(gate, value)
    check_tensor(gate, "gate", nested=True)
    check_like(value, "value", gate, "gate")
    options = ops.glu.Options(activation_name(activation), *limits(limit, offset))
    thin.remember(thin.glu.glu(*call[1], options), *call)
    return ops.glu.glu(gate, value, options)


def limits(limit: float | None, offset: float) -> tuple[float, float]:
    """Limit and offset as numbers, with infinity for no limit."""
    highest = math.inf if limit is None else number(limit, "limit")
    if not highest > 0:
        raise ValueError(f"limit is {limit}; expected a number above 0, or None")
    return highest, number(offset, "offset")


def packed_glu(
    input: Tensor,
    *,
    activation: Activation = "silu",
    layout: str = "gate_first",
    limit: float | None = None,
    offset: float = 0.0,
) -> Tensor:
    r"""The product of an activated gate and a value, which are parts of one tensor, in one kernel per pass.

    .. math::
        y = \mathrm{act}(\min(g, l)) \odot (\max(\min(v, l), -l) + o), \\
        x = [g, v],\ [v, g]\ \text{or}\ (g_0, v_0, g_1, v_1, \ldots)

    Args:
        input: x, `(*, 2 N)`; float32, bfloat16, float16 or float64.
        activation: act, applied to the gate.
        layout: "gate_first" (gate, then value: Phi-3), "value_first" (value, then gate: `torch.nn.functional.glu`), or
            "interleaved" (gate at even places, value at odd ones).
        limit: l, above 0, the limit of gate and value; None for no limit.
        offset: o, added to the value.

    Returns:
        `(*, N)`, of the input's dtype, with the input's order of dimensions in memory.

    Kept for backward:
        The input. The gradient is written as one tensor, with the input's strides if the input is dense.

    Raises:
        RuntimeError: the last dimension has an odd length, or the dtype is not as described above.
        ValueError: the activation or layout is unknown, or the limit is not above 0.
        TypeError: an argument is not of the expected type.

    Example:
        >>> x = torch.randn(8, 128)
        >>> y = F.packed_glu(x, activation="sigmoid", layout="value_first")
        >>> torch.allclose(y, torch.nn.functional.glu(x), atol=1e-6)
        True

    Source:
        Shazeer, "GLU Variants Improve Transformer", 2020; `torch.nn.functional.glu`.
    """
    call = "packed_glu", (input,), (activation, layout, limit, offset)
    plan = thin.plan_of(*call)
    if plan is not None:
        return plan(input)
    check_tensor(input, "input", nested=True)
    ops.glu.layout_name(layout)
    ragged = input.is_nested and getattr(input, "_ragged_idx", None) == input.dim() - 1
    if input.dim() == 0 or ragged or input.shape[-1] % 2:
        raise RuntimeError(f"input has shape {shape_of(input)}; expected a last dimension of even length")
    options = ops.glu.PackedOptions(activation_name(activation), layout, *limits(limit, offset))
    if not input.is_nested:
        thin.remember(thin.glu.packed_glu(input, options), *call)
    return ops.glu.packed_glu(input, options)

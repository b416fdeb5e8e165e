"""Gates."""

from torch import Tensor

from .. import ops, thin
from ..activations import Activation, activation_name
from .checks import check_like, check_tensor, promoted, shape_of


def glu(gate: Tensor, value: Tensor, *, activation: Activation = "silu") -> Tensor:
    """activation(gate) * value: "silu" makes it SwiGLU, "gelu" GEGLU, "relu" ReGLU, "sigmoid" the first GLU.

    Both have the same shape. They may be views, such as the two halves of one product, and are not copied as long as
    their innermost dimension is contiguous. The output has the gate's strides where that is dense, in any order of its
    dimensions, as torch's own operators give it; gradients have those of the output's gradient. Keeps gate and value.
    Source: Shazeer, "GLU Variants Improve Transformer", 2020.
    """
    call = "glu", (gate, value), (activation,)
    plan = thin.plan_of(*call)
    if plan is not None:
        return plan(gate, value)
    gate, value = promoted(gate, value)
    check_tensor(gate, "gate", nested=True)
    check_like(value, "value", gate, "gate")
    name = activation_name(activation)
    thin.remember(thin.glu.glu(gate, value, (name,)), *call)
    return ops.glu.glu(gate, value, name)


def packed_glu(input: Tensor, *, activation: Activation = "silu", layout: str = "gate_first") -> Tensor:
    """activation(gate) * value, where the last dimension of `input` holds both; the output's is half as long.

    `layout` is "gate_first" (gate, then value: Phi-3), "value_first" (value, then gate: `torch.nn.functional.glu`), or
    "interleaved" (gate at even places, value at odd ones). The output's dimensions lie in memory in the order of the
    input's. Keeps the input; its gradient is written as one tensor, with the input's strides where that is dense.
    """
    call = "packed_glu", (input,), (activation, layout)
    plan = thin.plan_of(*call)
    if plan is not None:
        return plan(input)
    check_tensor(input, "input", nested=True)
    ops.glu.layout_name(layout)
    ragged = input.is_nested and input._ragged_idx == input.dim() - 1
    if input.dim() == 0 or ragged or input.shape[-1] % 2:
        raise RuntimeError(f"input has shape {shape_of(input)}; expected a last dimension of even length")
    options = (activation_name(activation), layout)
    if not input.is_nested:
        thin.remember(thin.glu.packed_glu(input, options), *call)
    return ops.glu.packed_glu(input, *options)

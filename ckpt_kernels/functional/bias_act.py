"""Bias, activation and dropout."""

from torch import Tensor

from .. import ops, thin
from ..activations import Activation, activation_name
from .checks import check_device, check_tensor, dropout_seed, shape_of


def bias_act(
    input: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation = "identity",
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """dropout(activation(input + bias)); the bias is that of the last dimension.

    The output has the strides that torch's own elementwise operators give it: the input's where that is dense, in any
    order of its dimensions, and so have gradients. A dropout mask goes by the shape alone, whatever the strides are.
    Keeps the input; for relu and leaky_relu the output instead, which whatever reads it keeps too; for the identity
    nothing. No dropout mask: the backward kernel draws it again from its seed.
    """
    call = "bias_act", (input, bias), (activation, dropout_p, training)
    plan = thin.plan_of(*call)
    if plan is not None:
        return plan(input, bias, dropout_seed(input, dropout_p, training)[1] if dropout_p and training else None)
    check_tensor(input, "input", nested=True)
    if bias is not None:
        check_tensor(bias, "bias")
        check_device(bias, "bias", input)
        if input.dim() == 0 or shape_of(bias) != shape_of(input)[-1:]:
            raise RuntimeError(
                f"bias has shape {shape_of(bias)}; expected that of the last dimension of {shape_of(input)}"
            )
    name = activation_name(activation)
    p, seed = dropout_seed(input, dropout_p, training)
    if not input.is_nested:
        thin.remember(thin.bias_act.bias_act(input, bias, (name, p)), *call)
    return ops.bias_act.bias_act(input, bias, seed, name, p)

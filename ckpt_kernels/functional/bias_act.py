"""Bias, activation and dropout."""

from torch import Tensor

from .. import ops, thin
from ..activations import Activation, activation_name
from .checks import check_last, check_tensor, dropout_seed


def bias_act(
    input: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation = "identity",
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    r"""Bias, activation and dropout in one kernel per pass.

    .. math::
        y = \mathrm{dropout}(\mathrm{act}(x + b))

    Args:
        input: x, `(*, N)`; float32, bfloat16, float16 or float64.
        bias: b, `(N)`, of any of these dtypes; None means 0.
        activation: act.
        dropout_p: the probability of dropping an element of the result.
        training: False switches dropout off.

    Returns:
        The input's shape and dtype, with the strides that torch's elementwise operators give: the input's strides if
        the input is dense, in any order of the dimensions. Gradients have these strides too. The dropout mask does not
        depend on strides.

    Kept for backward:
        The bias, and the input; for relu and leaky_relu only the output, which a later op that saves its input keeps
        too, and the bias; for the identity the bias alone. No dropout mask: the backward kernel draws the mask again
        from the seed.

    Raises:
        RuntimeError: a shape, dtype or device is not as described above.
        ValueError: the activation is unknown, or `dropout_p` is outside [0, 1].
        TypeError: an argument is not of the expected type.

    Example:
        >>> x, bias = torch.randn(8, 64, requires_grad=True), torch.randn(64)
        >>> y = F.bias_act(x, bias, activation="gelu")
        >>> torch.allclose(y, torch.nn.functional.gelu(x + bias), atol=1e-6)
        True
        >>> saved_bytes(F.bias_act, x, bias, activation="gelu", dropout_p=0.1) == x.nbytes + 8 + bias.nbytes
        True

    Source:
        Shoeybi et al., "Megatron-LM", 2019, for the fusion; Salmon et al., "Parallel Random Numbers: As Easy as 1, 2,
        3" (Philox), 2011, for the masks.
    """
    call = "bias_act", (input, bias), (activation, dropout_p, training)
    plan = thin.plan_of(*call)
    if plan is not None:
        return plan(input, bias, dropout_seed(input, dropout_p, training)[1] if dropout_p and training else None)
    check_tensor(input, "input", nested=True)
    check_last(bias, "bias", input)
    name = activation_name(activation)
    p, seed = dropout_seed(input, dropout_p, training)
    if not input.is_nested:
        thin.remember(thin.bias_act.bias_act(input, bias, ops.bias_act.Options(name, p)), *call)
    return ops.bias_act.bias_act(input, bias, seed, ops.bias_act.Options(name, p))

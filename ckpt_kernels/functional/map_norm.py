"""Row norms over the channels of maps, for `convert`."""

from torch import Tensor

from .. import ops, thin
from ..arguments import number
from ..ops.map_norm import MapNormOptions


def map_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, given: tuple) -> Tensor:
    """The norm over the channels of (samples, channels, *space), for operands that the caller has checked.

    `given` are the options in the order of `MapNormOptions`.
    """
    tensors = (input, weight, bias)
    plan = thin.plan_of("map_norm", tensors, given)
    if plan is not None:
        return plan(*tensors)
    eps, *others = given
    options = MapNormOptions(number(eps, "eps"), *others)
    thin.remember(thin.map_norm.map_norm(*tensors, options), "map_norm", tensors, given)
    return ops.map_norm.map_norm(*tensors, options)

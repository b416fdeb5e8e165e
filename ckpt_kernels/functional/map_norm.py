"""Row norms over the channels of maps, for `convert`."""

from torch import Tensor

from .. import ops, thin
from ..ops.map_norm import MapNormOptions


def map_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, options: MapNormOptions) -> Tensor:
    """The norm over the channels of (samples, channels, *space), for operands that the caller has checked."""
    tensors = (input, weight, bias)
    plan = thin.plan_of("map_norm", tensors, options)
    if plan is not None:
        return plan(*tensors)
    thin.remember(thin.map_norm.map_norm(*tensors, options), "map_norm", tensors, options)
    return ops.map_norm.map_norm(*tensors, options)

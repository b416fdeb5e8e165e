"""Runs small calls on the CPU with little overhead around the kernel.

On a tensor of a few hundred elements a kernel takes a microsecond, and the code around the kernel twenty: argument
checks, the choice of a backend, views, torch's dispatcher. A call of plain tensors in CPU memory that only autograd has
to see therefore runs by a `Plan`: the outcome of the checks of an earlier call with the same options and with tensors
of the same shapes and dtypes. The plan runs the same kernels on the same operands (see `direct`). All other calls, and
calls that a plan cannot serve, take the full path, with the full path's errors.
"""

from . import bias_act, channel_norm, glu, linear, map_norm, row_norm
from .plan_cache import plan_of, remember

__all__ = ["bias_act", "channel_norm", "glu", "linear", "map_norm", "plan_of", "remember", "row_norm"]

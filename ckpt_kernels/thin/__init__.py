"""Small calls: what a block costs beside its kernel, cut to the least.

On a tensor of a few hundred elements a kernel takes a microsecond, and what stands around it twenty: checks of
arguments, the choice of a backend, views, torch's dispatcher. A call of plain tensors in the CPU's memory that nothing
but autograd has to see therefore goes by a `Plan`: what the checks came to when a call with tensors of the same shapes
and dtypes, and with the same options, was made before. The plan runs the same kernels on the same operands (see
`direct`). Everything else takes the full path, with its errors; so does a call that its plan turns out not to serve.
"""

from . import bias_act, channel_norm, glu, linear, row_norm
from .plan_cache import plan_of, remember

__all__ = ["bias_act", "channel_norm", "glu", "linear", "plan_of", "remember", "row_norm"]

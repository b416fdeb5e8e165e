"""Fused activation and normalization blocks that recompute inside the backward kernel instead of storing tensors.

- `convert`: replaces the layers of a model in place, in one line; `revert` restores them.
- `functional`: the blocks as functions. `nn`: the same as drop-in modules.
- `recompute.discard_outputs`: readers of a block's output keep a recipe instead of the output.
- `plan`: chooses for each layer which tensors to keep, for the fastest step that fits a memory budget.
- `offload.offload`: keeps layers' tensors in host memory until the backward pass.
- `memory.saved_bytes`: the bytes that a call keeps for backward.
- `use_backend` (in a `with`), `set_backend` (for the process): choose between the Triton, native (C++ and CUDA) and
  reference implementations.
"""

from . import functional, memory, nn, offload, recompute
from .backends import set_backend, use_backend
from .convert import convert, is_converted, revert
from .plan import DoesNotFit, Plan, plan
from .version import __version__

__all__ = [
    "DoesNotFit",
    "Plan",
    "__version__",
    "convert",
    "functional",
    "is_converted",
    "memory",
    "nn",
    "offload",
    "plan",
    "recompute",
    "revert",
    "set_backend",
    "use_backend",
]

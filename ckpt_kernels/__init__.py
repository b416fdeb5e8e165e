"""Fused activation and normalisation blocks that recompute inside the backward kernel instead of storing.

- `convert`: a model's own modules, in place, by one line; `revert` undoes it.
- `functional`: the blocks as functions. `nn`: the same as drop-in modules.
- `recompute.discard_outputs`: whatever reads a block's output keeps a recipe for it instead.
- `plan`: for each layer what to keep, so that a step is the fastest that fits a budget of memory.
- `offload.offload`: layers whose tensors wait in host memory for the backward pass.
- `memory.saved_bytes`: what a call keeps for backward.
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

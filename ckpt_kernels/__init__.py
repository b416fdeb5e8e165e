"""Fused activation and normalisation blocks that recompute inside the backward kernel instead of storing.

- `functional`: the blocks as functions. `nn`: the same as drop-in modules.
- `memory.saved_bytes`: what a call keeps for backward.
- `use_backend`: choose between the Triton, native (C++ and CUDA) and reference implementations.
"""

from . import functional, memory, nn
from .backends import use_backend
from .version import __version__

__all__ = ["__version__", "functional", "memory", "nn", "use_backend"]

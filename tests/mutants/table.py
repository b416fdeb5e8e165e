"""All faults, by the language of the sources."""

from .cuda import CUDA
from .gates import GATES
from .native import NATIVE
from .python import PYTHON
from .rotary import ROTARY
from .triton import TRITON

MUTANTS = (*PYTHON, *TRITON, *NATIVE, *CUDA, *ROTARY, *GATES)

"""Reports the resources of the GPU kernels and estimates their speed, without a GPU.

For Triton, every kernel that the launch tables can choose is compiled for an architecture, and the binary is read. For
the CUDA library, the built binary is read. Triton's interpreter (TRITON_INTERPRET) must be off in the process that
compiles.
"""

from .binary import Library, cuda_library
from .kernels import ARCHITECTURES, COLUMNS, Usage, triton_kernels
from .roofline import MACHINES, Estimate, Machine, Work, estimate
from .tables import below_target, report, to_json, worst

__all__ = [
    "ARCHITECTURES",
    "COLUMNS",
    "MACHINES",
    "Estimate",
    "Library",
    "Machine",
    "Usage",
    "Work",
    "below_target",
    "cuda_library",
    "estimate",
    "report",
    "to_json",
    "triton_kernels",
    "worst",
]

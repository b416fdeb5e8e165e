"""What the GPU kernels use, and how fast that lets them be, found without a GPU: each is compiled for an architecture,
and its binary is read.

For Triton every kernel that the launch tables can choose; for the CUDA library, what it was built with. Triton must not
be in its interpreter (TRITON_INTERPRET) in the process that compiles.
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

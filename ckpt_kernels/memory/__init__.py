"""Measures the tensors that a call keeps for backward: in total, by module, and with blocks' outputs discarded."""

from .by_module import ModuleMemory, Report, report, report_beside
from .freed_memory import keep_freed_memory
from .measured_copy import kept_bytes, random_numbers_kept
from .peak import allocations, peak_bytes
from .saved import SavedTensor, saved_bytes, saved_bytes_beside_output, saved_tensors

__all__ = [
    "ModuleMemory",
    "Report",
    "SavedTensor",
    "allocations",
    "keep_freed_memory",
    "kept_bytes",
    "peak_bytes",
    "random_numbers_kept",
    "report",
    "report_beside",
    "saved_bytes",
    "saved_bytes_beside_output",
    "saved_tensors",
]

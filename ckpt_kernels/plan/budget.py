"""Converts a user's memory budget to bytes."""

import math
import numbers
import re
from typing import Any

import torch

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
# The share of a device's free memory that a plan leaves, for fragmentation and for allocations of other processes.
RESERVE = 0.05

# Larger than any memory, and small enough that sums of such budgets fit in 64 bits.
_MOST = 2**60

Budget = int | float | str | None
_EXPECTED = 'expected bytes, a size such as "12GiB", a fraction of eager\'s peak up to 1.0, "device", or None'


class DoesNotFit(ValueError):
    """No choice fits the budget.

    Attributes:
        budget: in bytes.
        least: the smallest peak that was measured, of plans and of levels for the whole model, in bytes.
        note: remarks on the measurements, such as choices that were skipped.
    """

    def __init__(self, budget: int, least: int, note: str = "") -> None:
        least_of_all = f"expected at least {least:,}, the smallest peak that was measured"
        super().__init__(f"budget is {budget:,} bytes; {least_of_all}{f' ({note})' if note else ''}")
        self.budget, self.least, self.note = budget, least, note

    def __reduce__(self) -> tuple:
        return DoesNotFit, (self.budget, self.least, self.note)


def bytes_of(budget: Budget, eager: int, device: torch.device) -> int | None:
    """Return the budget in bytes; None for None.

    Args:
        budget: bytes, a size with a unit, a fraction of eager's peak up to 1, "device", or None.
        eager: eager's peak in bytes.
        device: the device of the model.

    Raises:
        TypeError, ValueError: the budget is none of these.
    """
    if budget is None:
        return None
    if budget == "device":
        return _free_bytes(device)
    if (fraction := fraction_of(budget)) is not None:
        return int(fraction * eager)
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*([\d.]+)\s*(|k|m|g|t|ki|mi|gi|ti)(b?)\s*", budget, re.IGNORECASE)
        if not match or match[1].count(".") > 1 or not any(map(str.isdigit, match[1])):
            raise ValueError(f"budget is {budget!r}; {_EXPECTED}")
        count = min(float(match[1]) * _UNITS[match[2].lower()], float(_MOST))
        # A fraction of a byte, "1.5", is refused; "1.5k" is 1,500 bytes.
        return _positive(int(count) if match[2] or count.is_integer() else 0, budget)
    if isinstance(budget, bool) or not isinstance(budget, numbers.Real):
        raise TypeError(f"budget is {budget!r}, of type {type(budget).__name__}; {_EXPECTED}")
    is_whole = isinstance(budget, numbers.Integral) or (math.isfinite(budget) and budget == int(budget))
    return _positive(int(budget) if is_whole else 0, budget)


def fraction_of(budget: Budget) -> float | None:
    """Return the fraction of eager's peak that a number or string stands for; None where the budget is no fraction."""
    if isinstance(budget, str):
        number = float(budget) if re.fullmatch(r"\s*\d*\.\d+\s*|\s*\d+\.\d*\s*", budget) else 0.0
    else:
        number = budget if isinstance(budget, numbers.Real) and not isinstance(budget, numbers.Integral) else 0.0
    return float(number) if 0.0 < number <= 1.0 else None


def _positive(count: int, budget: Any) -> int:
    if count <= 0:
        raise ValueError(f"budget is {budget!r}; {_EXPECTED}")
    return min(count, _MOST)


def _free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        raise ValueError(f'budget is "device" and the model is on {device}; expected a CUDA device, or a size')
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int((free + cached) * (1 - RESERVE))

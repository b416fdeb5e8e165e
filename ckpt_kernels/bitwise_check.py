"""Whether a layer that runs again saves what it saved at first, to the bit."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

# Where layers are record_differences: those that did not save the same when they ran again.
_differing: set[nn.Module] | None = None


@contextlib.contextmanager
def record_differences() -> Iterator[set[nn.Module]]:
    """Within, each layer that runs again is held against its first pass, to the bit: those that differ."""
    global _differing
    before, _differing = _differing, set()
    try:
        yield _differing
    finally:
        _differing = before


def checksum_of(tensor: Tensor) -> int | None:
    """Where layers are record_differences, a sum that another value would change."""
    if _differing is None:
        return None
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided or tensor.is_complex():
        return None
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(tensor.dtype.itemsize)
    plain = tensor.detach()
    if whole is None:
        return None
    return int((plain if plain.dtype == torch.bool else plain.view(whole)).sum())


def note_difference(module: nn.Module) -> None:
    """A layer has saved something else."""
    if _differing is not None:
        _differing.add(module)

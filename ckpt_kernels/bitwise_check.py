"""Checks whether a layer that runs again saves bitwise the same tensors as in the first pass."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

# While differences are recorded: the modules that saved other tensors when they ran again.
_differing: set[nn.Module] | None = None


@contextlib.contextmanager
def record_differences() -> Iterator[set[nn.Module]]:
    """Compares, within the context, each layer that runs again with the first pass. Yields the modules that differ."""
    global _differing
    before, _differing = _differing, set()
    try:
        yield _differing
    finally:
        _differing = before


def checksum_of(tensor: Tensor) -> int | None:
    """The sum of a tensor's bits as integers, while differences are recorded; else None."""
    if _differing is None:
        return None
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided or tensor.is_complex():
        return None
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(tensor.dtype.itemsize)
    plain = tensor.detach()
    if integers is None:
        return None
    return int((plain if plain.dtype == torch.bool else plain.view(integers)).sum())


def note_difference(module: nn.Module) -> None:
    """Records that a module has saved other tensors."""
    if _differing is not None:
        _differing.add(module)

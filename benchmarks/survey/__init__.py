"""Architectures by the hundred, tiny and with random weights, and what converting does to each.

`names` and `entry` are the catalogue; `run` measures it, each architecture in a process of its own; `report` tells.
"""

import fnmatch
import functools
import importlib
from collections.abc import Iterable

import torch

from .entry import Entry

# By library, the modules of this package that have its entries.
_CATALOGUES = {
    "torch": ("of_torch",),
    "handwritten": ("handwritten",),
    "transformers": ("of_transformers",),
    "diffusers": ("of_diffusers",),
    "torchvision": ("of_torchvision",),
    "timm": ("of_timm",),
}
LIBRARIES = tuple(_CATALOGUES)


@functools.cache
def declare_missing_operators() -> None:
    """torchvision without its own library of kernels imports if the two operators that it looks for are declared."""
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")


@functools.cache
def why_not(library: str) -> str | None:
    """Why models of that library cannot be built here; None if they can."""
    # transformers and diffusers look for the others.
    declare_missing_operators()
    try:
        importlib.import_module("torch" if library == "handwritten" else library)
    except Exception as error:
        return f"{library} does not import: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return None


@functools.cache
def catalogue() -> dict[str, Entry]:
    """All entries by name, of those libraries that import."""
    modules = [name for library, names in _CATALOGUES.items() if why_not(library) is None for name in names]
    found = [entry for name in modules for entry in importlib.import_module(f".{name}", __name__).entries()]
    return {entry.name: entry for entry in found}


def chosen(patterns: Iterable[str]) -> list[Entry]:
    """Entries whose name fits one of the patterns, with * and ?, or ends in one after the library's; all if none.

    Raises KeyError for a pattern that nothing fits.
    """
    known = catalogue()
    patterns = list(patterns)
    if not patterns:
        return list(known.values())
    found: dict[str, Entry] = {}
    for pattern in patterns:
        fits = [name for name in known if fnmatch.fnmatch(name, pattern) or name.partition("/")[2] == pattern]
        if not fits:
            raise KeyError(pattern)
        found |= {name: known[name] for name in fits}
    return list(found.values())


def left_out() -> dict[str, str]:
    """What is not in the catalogue, with the reason: a whole library, or a type of models of one."""
    reasons = {library: why for library in LIBRARIES if (why := why_not(library))}
    if "transformers" not in reasons:
        from . import of_transformers

        reasons |= of_transformers.left_out()
    return reasons

"""Converts hundreds of architectures, tiny and with random weights, and compares each with the unconverted model.

`catalogue` has the entries; `run` measures each architecture in a process of its own; `report` shows the results.
"""

import fnmatch
import functools
import importlib
from collections.abc import Iterable

import torch

from .entry import Entry

# For each library, the modules of this package that have the entries.
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
    """Declares two operators, so that torchvision can be imported without its library of kernels."""
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")


@functools.cache
def why_not(library: str) -> str | None:
    """The reason why models of this library cannot be built here; None if they can."""
    # transformers and diffusers check for the other packages.
    declare_missing_operators()
    try:
        importlib.import_module("torch" if library == "handwritten" else library)
    except Exception as error:
        return f"{library} does not import: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return None


@functools.cache
def catalogue() -> dict[str, Entry]:
    """All entries by name, of the libraries that can be imported."""
    modules = [name for library, names in _CATALOGUES.items() if why_not(library) is None for name in names]
    found = [entry for name in modules for entry in importlib.import_module(f".{name}", __name__).entries()]
    return {entry.name: entry for entry in found}


def chosen(patterns: Iterable[str]) -> list[Entry]:
    """The entries that match a pattern, with * and ?, by the whole name or without the library; all without patterns.

    Raises KeyError for a pattern without a match.
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
    """The libraries, and types of models of a library, that are not in the catalogue, with the reasons."""
    reasons = {library: why for library in LIBRARIES if (why := why_not(library))}
    if "transformers" not in reasons:
        from . import of_transformers

        reasons |= of_transformers.left_out()
    return reasons

"""Reads the cells that the nodes of an autograd graph hold, packed by C or by Python."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ckpt_kernels.recompute import fast_path
from ckpt_kernels.recompute.cells import Cell, Kept
from ckpt_kernels.recompute.recipes import Claim


@contextlib.contextmanager
def python_only() -> Iterator[None]:
    library, fast_path.library = fast_path.library, None
    try:
        yield
    finally:
        fast_path.library = library


def nodes_of(output: Tensor) -> list[Any]:
    waiting, seen = [output.grad_fn], set()
    for node in waiting:
        if node not in seen:
            seen.add(node)
            waiting += [before for before, _ in node.next_functions if before is not None]
    return waiting


def cells_of(output: Tensor) -> list[tuple[str, str, Cell]]:
    """All cells in the autograd graph of a tensor, each with the names of the node and of the attribute."""
    found = []
    for node in nodes_of(output):
        for name in sorted(name for name in dir(node) if name.startswith("_raw_saved")):
            held = getattr(node, name)
            for saved in held if isinstance(held, tuple) else [held]:
                if saved is not None and isinstance(saved.data, Cell):
                    found.append((node.name(), name, saved.data))
    return found


def described(cell: Cell) -> list[Any]:
    """The state of a cell, comparable between cells that C and Python made."""
    content, watch = cell.content, cell.watch
    found = [type(content), content.depth, cell.version, cell.is_clone, cell.is_unwritten(), type(cell.attached)]
    found += [type(watch), None if watch is None else (watch.numel(), watch._version)]
    if isinstance(content, Kept):
        found += [content.version, content.is_plain, content.tensor.shape, content.tensor.stride()]
        found += [content.tensor.requires_grad, content.tensor is watch]
    if isinstance(content, Claim):
        found += [content.geometry, content.served, content.made, len(content.recipe.claims)]
        found += [[type(o) for o in content.recipe.operands]]
    return found


def all_described(output: Tensor) -> list[Any]:
    return [(node, name, described(cell)) for node, name, cell in cells_of(output)]

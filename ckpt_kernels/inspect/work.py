"""What a compiled kernel does for an element, from its machine code, its intermediate code and how it is launched."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from . import accesses, sass
from .roofline import Work

if TYPE_CHECKING:
    from ..backends.triton.launch import Launch

# An estimate is for tensors of that many elements on that many multiprocessors: a program that walks over rows takes
# many.
_ELEMENTS, _MULTIPROCESSORS = 1 << 26, 132
# A launch that was recorded for so many programs a multiprocessor and no more is one whose programs walk.
_WALKING = 64


def tensors_of(argument: Any) -> list[torch.Tensor]:
    """The tensors in a kernel's arguments, in the order of its pointers."""
    if isinstance(argument, tuple):
        return [tensor for one in argument for tensor in tensors_of(one)]
    return [argument] if isinstance(argument, torch.Tensor) else []


def work_of(listing: str, code: str, launch: "Launch", columns: int, elements: int, resident: int) -> Work:
    """The work of one kernel.

    Args:
        listing: of its machine code, from nvdisasm.
        code: its intermediate code, `compiled.asm["ttir"]`.
        launch: as it was recorded, with tensors of torch's meta device.
        columns: of a row as the kernel takes it.
        elements: of a large operand.
        resident: programs that a multiprocessor has room for.

    Returns:
        Its `Work`.
    """
    from ..backends.triton.launch import processors

    tile, tensors = launch.tile, tensors_of(launch.arguments)
    large = {number for number, tensor in enumerate(tensors) if tensor.numel() >= elements}
    found = [access for access in accesses.parse(code) if access.operand in large]
    # A tile's columns beyond the row's end are worked on for nothing, but do not cross memory.
    filled = columns / (-(-columns // tile.block) * tile.block)
    size = tile.rows * tile.block
    per_element = 32 * tile.warps / (size * filled)
    blocks = sass.parse(listing)
    loops, whole = _loops(blocks), sass.count(one for block in blocks for one in block.instructions)
    steady, stored = sum(loop.instructions for loop in loops), sum(loop.stored for loop in loops)
    recorded = launch.programs // processors(torch.device("meta"))
    programs = max(min(resident, recorded), 1)
    # How many elements share what a program does once.
    walked = _ELEMENTS / (_MULTIPROCESSORS * programs) if recorded <= _WALKING else max(columns * tile.rows, size)
    once = 32 * tile.warps / walked
    pipes = {pipe: sum(loop.pipes[pipe] for loop in loops) * per_element for pipe in sass.PIPES}
    moved = sum(loop.loaded + loop.stored + loop.shared + 4 * loop.exchanges for loop in loops)
    crossing = accesses.bytes_once(found)
    reads = accesses.bytes_once(one for one in found if not one.store)
    return Work(
        steady * per_element,
        steady * per_element + (whole.instructions - steady) * once,
        pipes["fp32"],
        pipes["integer"],
        pipes["special"],
        pipes["load/store"],
        moved * per_element,
        crossing / size + (whole.stored - stored) * once,
        accesses.bytes_again(found) / size,
        max(accesses.passes(found).values(), default=0),
        size * filled,
        reads * filled,
        programs,
        tile.warps,
        tile.stages,
        sum(loop.exchanges for loop in loops),
        sum(loop.barriers for loop in loops),
    )


def _loops(blocks: Sequence[sass.Block]) -> list[sass.Counts]:
    """The loops over elements, each counted once through; of a kernel that has none, all of it."""
    counted = [sass.count(_instructions(blocks, loop)) for loop in sass.innermost_loops(blocks)]
    found = [counts for counts in counted if counts.loaded or counts.stored]
    return found or [sass.count(_instructions(blocks, range(len(blocks))))]


def _instructions(blocks: Sequence[sass.Block], numbers: Iterable[int]) -> list[sass.Instruction]:
    return [one for number in numbers for one in blocks[number].instructions]

"""Computes the work of a compiled kernel an element, from the machine code, the Triton IR and the launch parameters."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from . import accesses, sass
from .roofline import Work

if TYPE_CHECKING:
    from ..backends.triton.launch import Launch

# The size of the tensors and the number of multiprocessors of an estimate. Together they give the number of elements
# that a program of a persistent grid processes.
_ELEMENTS, _MULTIPROCESSORS = 1 << 26, 132
# A recorded launch with at most so many programs a multiprocessor is a persistent grid, whose programs loop over rows.
_PERSISTENT = 64


def tensors_of(argument: Any) -> list[torch.Tensor]:
    """Return the tensors in a kernel's arguments, in the order of the kernel's pointers."""
    if isinstance(argument, tuple):
        return [tensor for one in argument for tensor in tensors_of(one)]
    return [argument] if isinstance(argument, torch.Tensor) else []


def work_of(listing: str, code: str, launch: "Launch", columns: int, elements: int, resident: int) -> Work:
    """Return the work of one kernel.

    Args:
        listing: the machine code, as nvdisasm lists it.
        code: the Triton IR, `compiled.asm["ttir"]`.
        launch: the recorded launch, with tensors on torch's meta device.
        columns: the length of a row in the kernel.
        elements: the number of elements of a large operand.
        resident: the number of programs that a multiprocessor has room for.
    """
    from ..backends.triton.launch import processors

    tile, tensors = launch.tile, tensors_of(launch.arguments)
    large = {number for number, tensor in enumerate(tensors) if tensor.numel() >= elements}
    large_accesses = [access for access in accesses.parse(code) if access.operand in large]
    # Columns of a tile beyond the end of the row cost instructions, but no memory traffic.
    filled = columns / (-(-columns // tile.block) * tile.block)
    size = tile.rows * tile.block
    per_element = 32 * tile.warps / (size * filled)
    blocks = sass.parse(listing)
    loops, whole = _loops(blocks), sass.count(one for block in blocks for one in block.instructions)
    steady, stored = sum(loop.instructions for loop in loops), sum(loop.stored for loop in loops)
    recorded = launch.programs // processors(torch.device("meta"))
    programs = max(min(resident, recorded), 1)
    # Instructions outside the loop are executed once a program and spread over all elements of that program.
    is_persistent = recorded <= _PERSISTENT
    processed = _ELEMENTS / (_MULTIPROCESSORS * programs) if is_persistent else max(columns * tile.rows, size)
    once = 32 * tile.warps / processed
    pipes = {pipe: sum(loop.pipes[pipe] for loop in loops) * per_element for pipe in sass.PIPES}
    moved = sum(loop.loaded + loop.stored + loop.shared + 4 * loop.exchanges for loop in loops)
    crossing = accesses.bytes_once(large_accesses)
    reads = accesses.bytes_once(one for one in large_accesses if not one.store)
    return Work(
        steady=steady * per_element,
        instructions=steady * per_element + (whole.instructions - steady) * once,
        fp32=pipes["fp32"],
        integer=pipes["integer"],
        special=pipes["special"],
        load_store=pipes["load/store"],
        moved=moved * per_element,
        memory=crossing / size + (whole.stored - stored) * once,
        again=accesses.bytes_again(large_accesses) / size,
        passes=max(accesses.passes(large_accesses).values(), default=0),
        elements=size * filled,
        reads=reads * filled,
        programs=programs,
        warps=tile.warps,
        stages=tile.stages,
        exchanges=sum(loop.exchanges for loop in loops),
        barriers=sum(loop.barriers for loop in loops),
    )


def _loops(blocks: Sequence[sass.Block]) -> list[sass.Counts]:
    """Count the instructions of one iteration of each loop that accesses global memory.

    A kernel without such a loop counts as one loop.
    """
    counted = [sass.count(_instructions(blocks, loop)) for loop in sass.innermost_loops(blocks)]
    over_elements = [counts for counts in counted if counts.loaded or counts.stored]
    return over_elements or [sass.count(_instructions(blocks, range(len(blocks))))]


def _instructions(blocks: Sequence[sass.Block], numbers: Iterable[int]) -> list[sass.Instruction]:
    return [one for number in numbers for one in blocks[number].instructions]

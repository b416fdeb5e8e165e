"""Launch parameters of the kernels: tile shapes, warps and grid sizes, by rule instead of autotuning.

A tile is ROWS rows by BLOCK columns. A thread has 16 elements: each operand then has two 16-byte loads of bfloat16 in
flight. The forward kernel of a row norm holds less and has 32 elements a thread, which amortizes the work once a
thread; so has the backward kernel for blocks of 4,096 and 8,192 columns, whose registers do not spill. Short rows are
packed until a tile has 2,048 elements, because smaller programs are dominated by the cost of scheduling. Rows longer
than a tile are processed in blocks.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

# The longest row that a forward program holds in registers, and the longest that a backward program holds together with
# sums of the gradients of weight and bias; without these sums, a backward program holds twice as much.
FORWARD_TILE = 16384
BACKWARD_TILE = 8192
# The longest head of the rotary kernels, which hold whole heads in registers, and sums in the backward pass.
LONGEST_HEAD = 4096
_PACKED_ELEMENTS = 2048
# The limit of registers a thread of a backward kernel, so that 16 warps fit a multiprocessor.
_REGISTERS = 128


class Tile(NamedTuple):
    """The tile of a program.

    Attributes:
        rows, block: ROWS and BLOCK.
        warps: warps a program.
        whole: whether BLOCK covers a row.
        registers: the limit of registers a thread, on NVIDIA GPUs.
        stages: the number of steps of a loop over rows in flight at once; later steps are copied to shared memory.
    """

    rows: int
    block: int
    warps: int
    whole: bool
    registers: int | None = None
    stages: int = 1

    @property
    def options(self) -> dict[str, int]:
        """The launch options under Triton's names."""
        limited = self.registers is not None and torch.version.hip is None
        return {"num_warps": self.warps} | ({"maxnreg": self.registers} if limited else {})


def _next_power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _warps(elements: int) -> int:
    """A power of two, as Triton requires."""
    return 1 << min(max(elements // 512, 4), 32).bit_length() - 1


@functools.cache
def forward_tile(columns: int) -> Tile:
    """Return the tile of a forward kernel for rows of this length."""
    block = max(_next_power_of_two(columns), 16)
    if block > FORWARD_TILE:
        return Tile(1, 4096, 16, False)
    rows = max(_PACKED_ELEMENTS // block, 1)
    return Tile(rows, block, rows * block // 1024, True)


@functools.cache
def backward_tile(columns: int) -> Tile:
    """Return the tile of a backward kernel. The widest tiles have twice the threads, with half the registers each.

    In blocks of 4,096 and 8,192 columns a thread has 32 elements and twice the registers. On an H200 layer_norm+gelu
    took 0.94 of the time that 16 elements a thread take at 4,096 columns, and 0.95 at 8,192; blocks without an
    activation 0.97 to 1.01.
    """
    block = max(_next_power_of_two(columns), 16)
    if block > 2 * BACKWARD_TILE:
        return Tile(1, 4096, 16, False)
    if _PACKED_ELEMENTS < block <= BACKWARD_TILE:
        return Tile(1, block, block // 1024, True, 2 * _REGISTERS - 1)
    rows = max(_PACKED_ELEMENTS // block, 1)
    warps = _warps(rows * block)
    return Tile(rows, block, warps, True, min(_REGISTERS, 2048 // warps))


def sums_fit(columns: int, one_more: bool) -> bool:
    """Whether a program that holds a row has registers left for sums of the gradients of weight and bias.

    `one_more` says that the program holds one more operand: a gate, or an output that is written again.
    """
    return columns <= (BACKWARD_TILE // 2 if one_more else BACKWARD_TILE)


# The tile of a kernel that sums over rows in strips of columns. 64 columns of bfloat16 fill a memory transaction.
STRIP_TILE = Tile(16, 64, 4, False, _REGISTERS)


@functools.cache
def element_tile(columns: int) -> Tile:
    """Return the tile of an elementwise kernel; longer rows take several tiles."""
    block = min(max(_next_power_of_two(columns), 16), _PACKED_ELEMENTS)
    rows = _PACKED_ELEMENTS // block
    return Tile(rows, block, _warps(rows * block), columns <= block)


@functools.cache
def column_sum_tile(columns: int) -> Tile:
    """Return the tile of an elementwise kernel with one sum over rows.

    For short rows the sums take registers, so the tile has half as many rows.
    """
    tile = element_tile(columns)
    return tile._replace(rows=tile.rows // 2) if tile.block < 128 else tile


@functools.cache
def sums_tile(columns: int) -> Tile:
    """Return the tile of an elementwise kernel with two or three sums, of half as many rows as `element_tile`."""
    tile = element_tile(columns)
    return tile._replace(rows=max(tile.rows // 2, 1))


@functools.cache
def heads_tile(rotated: int, passing: int, sums: bool) -> Tile:
    """Return the tile of a kernel that holds whole heads. BLOCK counts the rotated columns, without the passing ones.

    The number of rows is rounded to a power of two, down with sums and up without. With sums and passing columns the
    limit of registers is higher.
    """
    block = max(_next_power_of_two(rotated), 2)
    width = block + (_next_power_of_two(passing) if passing else 0)
    most = max(_PACKED_ELEMENTS // width, 1)
    rows = 1 << most.bit_length() - 1 if sums else _next_power_of_two(most)
    return Tile(rows, block, _warps(rows * width), True, (168 if passing else _REGISTERS) if sums else None)


@functools.cache
def channel_tile(columns: int, planes: bool) -> Tile:
    """Return the tile of a kernel that sums over planes, or over rows whose columns are channels (channels_last).

    Two sums halve the number of elements. In channels_last, 64 columns of bfloat16 fill a memory transaction, and more
    rows keep more transactions in flight.
    """
    if planes:
        return sums_tile(columns)
    block = min(max(_next_power_of_two(columns), 16), 64)
    rows = _PACKED_ELEMENTS // block // 2
    return Tile(rows, block, _warps(rows * block), columns <= block)


@functools.cache
def processors(device: torch.device) -> int:
    """Return the number of multiprocessors of the device; in the interpreter a stand-in."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


# The shared memory in bytes available to a program where there is no GPU to query: that of an H100, or of the
# architecture that `inspect` compiles for.
recorded_shared_memory = 227 * 1024


def shared_memory(device: torch.device) -> int:
    """Return the shared memory in bytes available to a program."""
    if device.type != "cuda":
        return recorded_shared_memory
    properties = torch.cuda.get_device_properties(device)
    return max(getattr(properties, "shared_memory_per_block_optin", 0), 48 * 1024)


def _resident(tile: Tile) -> int:
    """Return the number of programs that a multiprocessor has registers for."""
    return max(2048 // (tile.registers or _REGISTERS) // tile.warps, 1)


def stages_of(tile: Tile, rows: Sequence[torch.Tensor | None], device: torch.device) -> int:
    """Return the number of steps of a loop over these rows that are in flight at once: three or one.

    Three, if two steps of all resident programs fit in three quarters of the shared memory; the rest is for reductions
    across threads. Two steps were no faster than one.
    """
    step = tile.rows * tile.block * sum(t.element_size() for t in rows if t is not None)
    room = shared_memory(device) * 3 // 4 // _resident(tile)
    return 3 if 2 * step <= room else 1


class Rows(NamedTuple):
    """Contiguous rows with strides on three levels: (stride, middle rows, middle stride, inner rows, inner stride).

    A matrix has one row on each of the two lower levels.
    """

    data: torch.Tensor | None
    strides: tuple[int, int, int, int, int]


def rows_of(rows: torch.Tensor | None) -> Rows:
    """Return the `Rows` of a (rows, columns) or (outer, middle, inner, columns) tensor."""
    if rows is None or rows.dim() == 2:
        return Rows(rows, (0 if rows is None else rows.stride(0), 1, 0, 1, 0))
    return Rows(rows, (rows.stride(0), rows.shape[1], rows.stride(1), rows.shape[2], rows.stride(2)))


class Matrix(NamedTuple):
    """A matrix and the stride of the rows."""

    data: torch.Tensor | None
    stride: int


def matrix_of(tensor: torch.Tensor | None) -> Matrix:
    return Matrix(tensor, 0 if tensor is None else tensor.stride(0))


class Dropout(NamedTuple):
    """A dropout: elements whose Philox bits reach the threshold are kept and scaled. With p = 1 the scale is 0."""

    seed: torch.Tensor | None
    threshold: int
    scale: float


def dropout_of(seed: torch.Tensor | None, p: float) -> Dropout:
    return Dropout(seed, min(int(p * 4294967296.0), 4294967295), 1 / (1 - p) if p < 1 else 0.0)


class Launch(NamedTuple):
    """A kernel, the arguments, and the number of programs."""

    kernel: triton.JITFunction
    tile: Tile
    arguments: tuple
    programs: int


# The types of other arguments of kernels.
_WITHOUT_TENSORS = {bool, int, float, str, type(None), tl.constexpr}


def _check_memory(names: Sequence[str], arguments: Sequence[object]) -> None:
    """Raise for tensors without memory, such as parameters that FSDP has sharded again, as torch does.

    A kernel would access an invalid address, after which no other kernel can run in the process.
    """
    for name, argument in zip(names, arguments, strict=True):
        kind = type(argument)
        if kind in _WITHOUT_TENSORS:
            continue
        if kind is Rows or kind is Matrix:
            argument = argument.data
        if isinstance(argument, torch.Tensor):
            # The address of a storage without memory is 0.
            if argument.data_ptr() == argument.storage_offset() * argument.itemsize and argument.numel():
                raise RuntimeError(f"{name} has elements, but its data is not allocated yet")
        elif isinstance(argument, tuple):
            _check_memory(getattr(argument, "_fields", argument), argument)


# The active recordings, innermost last.
_recordings: list[list[Launch]] = []


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Record the launches within that have tensors on torch's meta device, which can be compiled but not run.

    For one thread.
    """
    _recordings.append([])
    try:
        yield _recordings[-1]
    finally:
        _recordings.pop()


def launch(kernel: triton.JITFunction, programs: int, tile: Tile, device: torch.device, *arguments: object) -> None:
    """Launch a kernel. Its last two parameters are ROWS and BLOCK of the tile."""
    arguments = (*arguments, tile.rows, tile.block)
    if device.type == "meta":
        if _recordings:
            _recordings[-1].append(Launch(kernel, tile, arguments, programs))
        return
    _check_memory(kernel.arg_names, arguments)
    # Triton launches on torch's current device, which may differ from the tensors' device.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](*arguments, **tile.options)


def backward_programs(device: torch.device, rows: int, tile: Tile) -> tuple[int, int]:
    """Return the number of programs of a persistent grid over `rows` rows, and the number of rows of each program.

    Each program has its own row of partial weight gradients, so there are no more programs than fill the device.
    """
    return _split_rows(rows, tile, processors(device) * _resident(tile))


def strip_programs(device: torch.device, rows: int, strips: int, tile: Tile) -> tuple[int, int]:
    """Return the same as `backward_programs`, for each of `strips` strips of columns."""
    return _split_rows(rows, tile, max(processors(device) * _resident(tile) // strips, 1))


def _split_rows(rows: int, tile: Tile, most: int) -> tuple[int, int]:
    """Split rows into runs of whole tiles for at most `most` programs."""
    tiles = -(-rows // tile.rows)
    program_rows = -(-tiles // min(tiles, most)) * tile.rows
    return -(-rows // program_rows), program_rows

"""How the kernels are launched: tile shapes, warps and grid sizes, from a small table instead of autotuning.

A tile is ROWS rows by BLOCK columns. Reasons for the numbers: 16 elements a thread keep two 16-byte loads of
bfloat16 in flight for each operand and leave the registers of the widest backward tile unspilled on every
architecture; a row norm's forward kernel, which holds less, takes 32, so that what is done once a thread is done less
often; small rows are packed until a tile has 2,048 elements, because a program with less work than that spends its
time on being scheduled; rows beyond one tile are walked in blocks.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton

# The widest row that a forward program holds in registers at once, and the widest that a backward program does beside
# its sums of the gradients of weight and bias; without these, twice that.
FORWARD_TILE = 16384
BACKWARD_TILE = 8192
# The longest head that rotary kernels take: they hold it whole, and backward sums besides.
LONGEST_HEAD = 4096
_PACKED_ELEMENTS = 2048
# What a thread of a backward kernel is held to, so that 16 warps fit a multiprocessor.
_REGISTERS = 128


class Tile(NamedTuple):
    """ROWS x BLOCK elements for a program of `warps` warps; `whole` if BLOCK covers a row.

    `registers` is what a thread may have of them at most, on NVIDIA's GPUs; `stages`, how many steps of a loop over
    rows are in flight at once, those to come on their way to shared memory.
    """

    rows: int
    block: int
    warps: int
    whole: bool
    registers: int | None = None
    stages: int = 1

    @property
    def options(self) -> dict[str, int]:
        """As Triton calls them."""
        limited = self.registers is not None and torch.version.hip is None
        return {"num_warps": self.warps} | ({"maxnreg": self.registers} if limited else {})


def _next_power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _warps(elements: int) -> int:
    return min(max(elements // 512, 4), 32)


@functools.cache
def forward_tile(columns: int) -> Tile:
    """The tile of a forward kernel for rows of this length."""
    block = max(_next_power_of_two(columns), 16)
    if block > FORWARD_TILE:
        return Tile(1, 4096, 16, False)
    rows = max(_PACKED_ELEMENTS // block, 1)
    return Tile(rows, block, rows * block // 1024, True)


@functools.cache
def backward_tile(columns: int) -> Tile:
    """The tile of a backward kernel: the widest with half as many registers a thread, of twice as many threads."""
    block = max(_next_power_of_two(columns), 16)
    if block > 2 * BACKWARD_TILE:
        return Tile(1, 4096, 16, False)
    rows = max(_PACKED_ELEMENTS // block, 1)
    warps = _warps(rows * block)
    return Tile(rows, block, warps, True, min(_REGISTERS, 2048 // warps))


def sums_fit(columns: int, one_more: bool) -> bool:
    """Whether a program that holds a row has registers for sums of the gradients of weight and bias besides.

    With one more operand to hold, a gate or an output that is written again, they are fewer.
    """
    return columns <= (BACKWARD_TILE // 2 if one_more else BACKWARD_TILE)


# The tile of a kernel that sums over rows in strips of columns: 64 of bfloat16 fill a memory transaction.
STRIP_TILE = Tile(16, 64, 4, False, _REGISTERS)


@functools.cache
def element_tile(columns: int) -> Tile:
    """The tile of a kernel that goes element by element, columns beyond it in further tiles."""
    block = min(max(_next_power_of_two(columns), 16), _PACKED_ELEMENTS)
    rows = _PACKED_ELEMENTS // block
    return Tile(rows, block, _warps(rows * block), columns <= block)


@functools.cache
def column_sum_tile(columns: int) -> Tile:
    """The same where columns are summed over rows: the sums of many short rows leave room for half as many elements."""
    tile = element_tile(columns)
    return tile._replace(rows=tile.rows // 2) if tile.block < 128 else tile


@functools.cache
def sums_tile(columns: int) -> Tile:
    """The tile where two sums or three are kept: of short rows half as many as `element_tile` has."""
    tile = element_tile(columns)
    return tile._replace(rows=max(tile.rows // 2, 1))


@functools.cache
def heads_tile(turning: int, passing: int, sums: bool) -> Tile:
    """The tile of a kernel that takes whole heads: BLOCK of the columns that turn, beside those that pass.

    With sums to keep it has the power of two below the right number of rows, else the one above; and where columns
    pass, with what belongs to them besides, more registers.
    """
    block = max(_next_power_of_two(turning), 2)
    width = block + (_next_power_of_two(passing) if passing else 0)
    most = max(_PACKED_ELEMENTS // width, 1)
    rows = 1 << most.bit_length() - 1 if sums else _next_power_of_two(most)
    return Tile(rows, block, _warps(rows * width), True, (168 if passing else _REGISTERS) if sums else None)


@functools.cache
def channel_tile(columns: int, planes: bool) -> Tile:
    """The tile of a kernel that sums over planes, or over rows whose columns are channels.

    Two sums leave room for half the elements of one. Channels last, 64 columns of bfloat16 fill a memory transaction,
    and more rows at a time keep more of them in flight.
    """
    if planes:
        return sums_tile(columns)
    block = min(max(_next_power_of_two(columns), 16), 64)
    rows = _PACKED_ELEMENTS // block // 2
    return Tile(rows, block, _warps(rows * block), columns <= block)


@functools.cache
def processors(device: torch.device) -> int:
    """How many programs' worth of processors the device has; a stand-in for one in the interpreter."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


# What a program may have of a multiprocessor's shared memory where there is no GPU to ask, in bytes: an H100's, or that
# of whatever `inspect` compiles for.
recorded_shared_memory = 227 * 1024


def shared_memory(device: torch.device) -> int:
    """What a program may have of a multiprocessor's shared memory, in bytes."""
    if device.type != "cuda":
        return recorded_shared_memory
    properties = torch.cuda.get_device_properties(device)
    return max(getattr(properties, "shared_memory_per_block_optin", 0), 48 * 1024)


def _resident(tile: Tile) -> int:
    """How many programs there are registers for on a multiprocessor."""
    return max(2048 // (tile.registers or _REGISTERS) // tile.warps, 1)


def stages_of(tile: Tile, rows: Sequence[torch.Tensor | None], device: torch.device) -> int:
    """How many steps of a loop over these rows are in flight: three, if the two to come fit the shared memory of as
    many programs as there are registers for, of which a quarter is for sums across threads; else one. Two were no
    faster than one."""
    step = tile.rows * tile.block * sum(t.element_size() for t in rows if t is not None)
    room = shared_memory(device) * 3 // 4 // _resident(tile)
    return 3 if 2 * step <= room else 1


class Rows(NamedTuple):
    """Contiguous rows, and where they begin, on three levels: (stride, middle rows, middle stride, inner rows, inner
    stride). Plain matrices have one row on each of the lower levels."""

    data: torch.Tensor | None
    strides: tuple[int, int, int, int, int]


def rows_of(rows: torch.Tensor | None) -> Rows:
    """Of (rows, columns), or (outer, middle, inner, columns)."""
    if rows is None or rows.dim() == 2:
        return Rows(rows, (0 if rows is None else rows.stride(0), 1, 0, 1, 0))
    return Rows(rows, (rows.stride(0), rows.shape[1], rows.stride(1), rows.shape[2], rows.stride(2)))


class Matrix(NamedTuple):
    """A matrix, and the stride of its rows."""

    data: torch.Tensor | None
    stride: int


def matrix_of(tensor: torch.Tensor | None) -> Matrix:
    return Matrix(tensor, 0 if tensor is None else tensor.stride(0))


class Dropout(NamedTuple):
    """Philox bits from the threshold up are kept, and multiplied by the scale, which is 0 where nothing is kept."""

    seed: torch.Tensor | None
    threshold: int
    scale: float


def dropout_of(seed: torch.Tensor | None, p: float) -> Dropout:
    return Dropout(seed, min(int(p * 4294967296.0), 4294967295), 1 / (1 - p) if p < 1 else 0.0)


class Launch(NamedTuple):
    """A kernel with all that it is called with, and how many programs of it there are."""

    kernel: triton.JITFunction
    tile: Tile
    arguments: tuple
    programs: int


# The recordings that go on, the innermost last.
_recordings: list[list[Launch]] = []


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """A list of the launches within that have tensors of torch's meta device: these are not run, but can be compiled.

    For one thread.
    """
    _recordings.append([])
    try:
        yield _recordings[-1]
    finally:
        _recordings.pop()


def launch(kernel: triton.JITFunction, programs: int, tile: Tile, device: torch.device, *arguments: object) -> None:
    """Runs a kernel, whose last two parameters are the tile's."""
    arguments = (*arguments, tile.rows, tile.block)
    if device.type == "meta":
        if _recordings:
            _recordings[-1].append(Launch(kernel, tile, arguments, programs))
        return
    # Triton launches on torch's current device, which need not be the tensors'.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](*arguments, **tile.options)


def backward_programs(device: torch.device, rows: int, tile: Tile) -> tuple[int, int]:
    """How many programs share `rows` rows, and how many rows each takes: a persistent grid, fixed for a device.

    Each program has a row of partial weight gradients of its own, so there are no more than fill the device.
    """
    return _shared(rows, tile, processors(device) * _resident(tile))


def strip_programs(device: torch.device, rows: int, strips: int, tile: Tile) -> tuple[int, int]:
    """The same for each of `strips` strips of columns."""
    return _shared(rows, tile, max(processors(device) * _resident(tile) // strips, 1))


def _shared(rows: int, tile: Tile, most: int) -> tuple[int, int]:
    """Rows in runs of whole tiles, to `most` programs at most."""
    tiles = -(-rows // tile.rows)
    program_rows = -(-tiles // min(tiles, most)) * tile.rows
    return -(-rows // program_rows), program_rows

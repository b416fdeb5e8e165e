"""Every kernel that the launch tables can choose, compiled for an architecture, and what it uses."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from . import binary
from .roofline import Work
from .work import tensors_of, work_of

if TYPE_CHECKING:
    from .variants import Variant

COLUMNS = (64, 1024, 8192, 32768)
SIZES = {"bf16": 2, "fp32": 4}
_POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64"}


class Processor(NamedTuple):
    """A multiprocessor's limits, and the published bandwidth of the card it is known from, in GB/s.

    From NVIDIA's CUDA programming guide (compute capabilities), AMD's of CDNA 3, and data sheets. `reserved` is what
    the system takes of the shared memory of each block.
    """

    card: str
    bandwidth: int
    warps: int
    blocks: int
    shared: int
    registers: int = 65536
    warp: int = 32
    reserved: int = 1024

    def resident(self, warps: int, registers: int, shared: int) -> int:
        """Blocks of so many warps that there is room for, with so many registers a thread and bytes a block.

        Registers are given out to warps in units of 256, a thread's in units of 8.
        """
        by_registers = self.registers // (-(-registers // 8) * 8 * self.warp) // warps
        by_shared = self.shared // max(shared + self.reserved, 1)
        return min(by_registers, by_shared, self.warps // warps, self.blocks)


PROCESSORS = {
    "sm_80": Processor("A100 80 GB SXM", 2039, 64, 32, 164 << 10),
    "sm_86": Processor("GeForce RTX 3090", 936, 48, 16, 100 << 10),
    "sm_89": Processor("GeForce RTX 4090", 1008, 48, 24, 100 << 10),
    "sm_90": Processor("H100 SXM", 3350, 64, 32, 228 << 10),
    "sm_100": Processor("B200", 8000, 64, 32, 228 << 10),
    "sm_120": Processor("GeForce RTX 5090", 1792, 48, 24, 100 << 10),
    "gfx942": Processor("Instinct MI300X", 5300, 32, 32, 64 << 10, registers=131072, warp=64, reserved=0),
}
ARCHITECTURES = tuple(PROCESSORS)


@dataclass(frozen=True)
class Usage:
    """One kernel, compiled.

    Attributes:
        name: of the kernel, and what it computes.
        dtype: of its tensors.
        columns: the length of a row.
        warps: of a block of threads.
        registers: of a thread.
        stack, local: bytes of spills a thread.
        shared: bytes of shared memory a block, with those that it is given when it is launched.
        widths: of its global accesses, in bytes.
        instructions: those of its PTX, or of an AMD kernel's assembly.
        tensors: what its code reads and writes, once through and in accesses of 16 bytes, in tensors of the tile's
            size, weights and partial sums included.
        floor: how many of its operands are that large.
        occupancy: the share of a multiprocessor's warps that registers and shared memory leave room for.
        work: what it does for an element by its machine code, where that was asked for.
    """

    name: str
    dtype: str
    columns: int
    warps: int
    registers: int
    stack: int
    local: int
    shared: int
    widths: tuple[int, ...]
    instructions: int
    tensors: float
    floor: int
    occupancy: float
    work: Work | None = None

    @property
    def sound(self) -> bool:
        """Nothing spilled, and accesses of 16 bytes among them."""
        return self.stack == 0 and self.local == 0 and 16 in self.widths


def triton_kernels(arch: str, columns: Sequence[int] = COLUMNS, *, work: bool = False) -> Iterator[Usage]:
    """Every kernel that the launch tables choose for rows of these lengths, in bfloat16 and float32.

    Args:
        arch: one of ARCHITECTURES, such as "sm_90".
        columns: lengths of rows.
        work: whether to read the machine code, too, which takes as long again as to compile; NVIDIA's only.

    Returns:
        An iterator of `Usage`; a kernel is compiled when it is asked for.

    Raises:
        ValueError: `arch` is unknown, or an AMD one where `work` is asked for.
        ImportError: Triton is not installed.
    """
    if arch not in PROCESSORS:
        raise ValueError(f"arch is {arch!r}; expected one of {', '.join(PROCESSORS)}")
    if work and not arch.startswith("sm_"):
        raise ValueError(f"arch is {arch!r}; expected one of NVIDIA's, whose machine code can be read here")
    from ..backends.triton import launch
    from .variants import variants

    processor = PROCESSORS[arch]
    for length in columns:
        launch.recorded_shared_memory = processor.shared - processor.reserved
        by_dtype = [variants(length, dtype) for dtype in (torch.bfloat16, torch.float32)]
        for pair in zip(*by_dtype, strict=True):
            for dtype, variant in zip(SIZES, pair, strict=True):
                yield usage(variant, dtype, length, arch, work=work)


def usage(variant: "Variant", dtype: str, columns: int, arch: str, *, work: bool = False) -> Usage:
    """One kernel of `variants`, compiled."""
    processor = PROCESSORS[arch]
    compiled = compile_variant(variant, target_of(arch))
    used = binary.read(compiled)
    warps, tile = variant.launch.tile.warps, variant.launch.tile.rows * variant.launch.tile.block
    resident = processor.resident(warps, used.registers, used.shared)
    done = None
    if work:
        listing, code = binary.disassembled(compiled), compiled.asm["ttir"]
        done = work_of(listing, code, variant.launch, variant.columns, variant.elements, resident)
    return Usage(
        variant.name,
        dtype,
        columns,
        warps,
        used.registers,
        used.stack,
        used.local,
        used.shared,
        tuple(sorted(set(used.widths))),
        used.instructions,
        16 * used.widths.count(16) * processor.warp * warps / (tile * SIZES[dtype]),
        sum(tensor.numel() >= variant.elements for tensor in tensors_of(variant.launch.arguments)),
        resident * warps / processor.warps,
        done,
    )


def target_of(arch: str) -> Any:
    """As Triton names an architecture."""
    from triton.backends.compiler import GPUTarget

    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch.removeprefix("sm_")), PROCESSORS[arch].warp)
    return GPUTarget("hip", arch, PROCESSORS[arch].warp)


def compile_variant(variant: "Variant", target: Any) -> Any:
    """The kernel as it would be compiled for aligned tensors."""
    import triton
    from triton.compiler import ASTSource

    kernel, tile, arguments, _ = variant.launch
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list] = {}
    signature = {}
    for index, (parameter, argument) in enumerate(zip(kernel.params, arguments, strict=True)):
        given = triton.language.constexpr(argument) if parameter.is_constexpr else argument
        signature[parameter.name] = _specialized(given, (index,), constants, attributes)
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    options = {name: value for name, value in tile.options.items() if name != "maxnreg" or target.backend == "cuda"}
    with _as_if_there(target):
        return triton.compile(source, target=target, options=options)


@contextlib.contextmanager
def _as_if_there(target: Any) -> Iterator[None]:
    """While kernels ask which GPU they are compiled for, as those do that have instructions of NVIDIA's in them."""
    from triton.runtime import driver

    # Put back by hand: to reset it is an error where there is no GPU.
    before = driver._active
    driver.set_active(SimpleNamespace(get_current_target=lambda: target))
    try:
        yield
    finally:
        driver._active = before


def _specialized(
    argument: Any, path: tuple[int, ...], constants: dict[tuple[int, ...], Any], attributes: dict[tuple[int, ...], list]
) -> Any:
    """The type of an argument as Triton's launcher finds it, tuples element by element."""
    if isinstance(argument, torch.Tensor):
        attributes[path] = [["tt.divisibility", 16]]
        return _POINTERS[argument.dtype]
    if isinstance(argument, tuple):
        types = [_specialized(a, (*path, i), constants, attributes) for i, a in enumerate(argument)]
        return type(argument)(*types) if hasattr(argument, "_fields") else tuple(types)
    if isinstance(argument, float):
        return "fp32"
    if isinstance(argument, int) and argument != 1:
        if argument % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if argument < 1 << 31 else "i64"
    constants[path] = argument
    return "constexpr"

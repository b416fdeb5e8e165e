"""Compiles every kernel that the launch tables can choose for an architecture, and reports the resources of each."""

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
    """The limits of a multiprocessor, and the published bandwidth in GB/s of a card that has this multiprocessor.

    The figures are from NVIDIA's CUDA programming guide (compute capabilities), AMD's guide to CDNA 3, and data sheets.
    `reserved` is the shared memory that the system takes for each thread block.
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
        """Return the number of resident thread blocks.

        Registers are allocated to a warp in units of 256, that is to a thread in units of 8.

        Args:
            warps: warps a block.
            registers: registers a thread.
            shared: bytes of shared memory a block.
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
    """The resources of one compiled kernel.

    Attributes:
        name: the name of the kernel and of the block that the kernel computes.
        dtype: the dtype of the tensors.
        columns: the length of a row.
        warps: warps a thread block.
        registers: registers a thread.
        stack, local: bytes of spills a thread.
        shared: bytes of shared memory a thread block, dynamic shared memory included.
        widths: the widths of the accesses to global memory, in bytes.
        instructions: the number of instructions in the PTX, or in the assembly of an AMD kernel.
        tensors: the bytes of all 16-byte accesses, each counted once, over the bytes of a tile; accesses to weights and
            partial sums count too.
        floor: the number of operands as large as the input.
        occupancy: the share of a multiprocessor's warps that registers and shared memory leave room for.
        work: the work an element by the machine code, if requested.
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
        """Whether nothing spills and some accesses are 16 bytes wide."""
        return self.stack == 0 and self.local == 0 and 16 in self.widths


def triton_kernels(arch: str, columns: Sequence[int] = COLUMNS, *, work: bool = False) -> Iterator[Usage]:
    """Compile every kernel that the launch tables choose for rows of these lengths, in bfloat16 and float32.

    Args:
        arch: one of ARCHITECTURES, such as "sm_90".
        columns: lengths of rows.
        work: whether to analyse the machine code too, which takes as long as compilation; NVIDIA only.

    Returns:
        A lazy iterator of `Usage`.

    Raises:
        ValueError: `arch` is unknown, or `work` is requested for an AMD architecture.
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
    """Compile one kernel of `variants` and return its resources."""
    processor = PROCESSORS[arch]
    compiled = compile_variant(variant, target_of(arch))
    resources = binary.read(compiled)
    warps, tile = variant.launch.tile.warps, variant.launch.tile.rows * variant.launch.tile.block
    resident = processor.resident(warps, resources.registers, resources.shared)
    kernel_work = None
    if work:
        listing, code = binary.disassembled(compiled), compiled.asm["ttir"]
        kernel_work = work_of(listing, code, variant.launch, variant.columns, variant.elements, resident)
    return Usage(
        name=variant.name,
        dtype=dtype,
        columns=columns,
        warps=warps,
        registers=resources.registers,
        stack=resources.stack,
        local=resources.local,
        shared=resources.shared,
        widths=tuple(sorted(set(resources.widths))),
        instructions=resources.instructions,
        tensors=16 * resources.widths.count(16) * processor.warp * warps / (tile * SIZES[dtype]),
        floor=sum(tensor.numel() >= variant.elements for tensor in tensors_of(variant.launch.arguments)),
        occupancy=resident * warps / processor.warps,
        work=kernel_work,
    )


def target_of(arch: str) -> Any:
    """Return Triton's target for an architecture."""
    from triton.backends.compiler import GPUTarget

    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch.removeprefix("sm_")), PROCESSORS[arch].warp)
    return GPUTarget("hip", arch, PROCESSORS[arch].warp)


def compile_variant(variant: "Variant", target: Any) -> Any:
    """Compile a kernel as Triton's launcher would for tensors aligned to 16 bytes."""
    import triton
    from triton.compiler import ASTSource

    kernel, tile, arguments, _ = variant.launch
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list] = {}
    signature = {}
    for index, (parameter, argument) in enumerate(zip(kernel.params, arguments, strict=True)):
        value = triton.language.constexpr(argument) if parameter.is_constexpr else argument
        signature[parameter.name] = _specialized(value, (index,), constants, attributes)
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    options = {name: value for name, value in tile.options.items() if name != "maxnreg" or target.backend == "cuda"}
    with active_target(target):
        return triton.compile(source, target=target, options=options)


@contextlib.contextmanager
def active_target(target: Any) -> Iterator[None]:
    """Make `target` Triton's current target, which kernels with inline PTX query while they are compiled."""
    from triton.runtime import driver

    # `driver.reset_active` would raise without a GPU, so the attribute is restored directly.
    before = driver._active
    driver.set_active(SimpleNamespace(get_current_target=lambda: target))
    try:
        yield
    finally:
        driver._active = before


def _specialized(
    argument: Any, path: tuple[int, ...], constants: dict[tuple[int, ...], Any], attributes: dict[tuple[int, ...], list]
) -> Any:
    """Return the type of an argument as Triton's launcher specializes it; of a tuple, the types of the elements."""
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

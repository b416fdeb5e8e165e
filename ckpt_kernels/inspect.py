"""What the GPU kernels use, found without a GPU: each is compiled for an architecture, and its binary is read.

For Triton every kernel that the launch tables can choose; for the CUDA library, what it was built with. Triton must not
be in its interpreter (TRITON_INTERPRET) in the process that compiles.
"""

import json
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from .backends.triton.variants import Variant

COLUMNS = (64, 1024, 8192, 32768)
_SIZES = {"bf16": 2, "fp32": 4}
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


_PROCESSORS = {
    "sm_80": Processor("A100 80 GB SXM", 2039, 64, 32, 164 << 10),
    "sm_86": Processor("GeForce RTX 3090", 936, 48, 16, 100 << 10),
    "sm_89": Processor("GeForce RTX 4090", 1008, 48, 24, 100 << 10),
    "sm_90": Processor("H100 SXM", 3350, 64, 32, 228 << 10),
    "sm_100": Processor("B200", 8000, 64, 32, 228 << 10),
    "sm_120": Processor("GeForce RTX 5090", 1792, 48, 24, 100 << 10),
    "gfx942": Processor("Instinct MI300X", 5300, 32, 32, 64 << 10, registers=131072, warp=64, reserved=0),
}
ARCHITECTURES = tuple(_PROCESSORS)


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
        shared: bytes of shared memory a block.
        widths: of its global accesses, in bytes.
        instructions: those of its PTX, or of an AMD kernel's assembly.
        tensors: what its code reads and writes, once through and in accesses of 16 bytes, in tensors of the tile's
        size,
            weights and partial sums included.
        floor: how many of its operands are that large.
        occupancy: the share of a multiprocessor's warps that registers and shared memory leave room for.
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

    @property
    def sound(self) -> bool:
        """Nothing spilled, and accesses of 16 bytes among them."""
        return self.stack == 0 and self.local == 0 and 16 in self.widths


def triton_kernels(arch: str, columns: Sequence[int] = COLUMNS) -> Iterator[Usage]:
    """Every kernel that the launch tables choose for rows of these lengths, in bfloat16 and float32.

    Args:
        arch: one of ARCHITECTURES, such as "sm_90".
        columns: lengths of rows.

    Returns:
        An iterator of `Usage`; a kernel is compiled when it is asked for.

    Raises:
        ValueError: `arch` is unknown.
        ImportError: Triton is not installed.
    """
    if arch not in _PROCESSORS:
        raise ValueError(f"arch is {arch!r}; expected one of {', '.join(_PROCESSORS)}")
    from .backends.triton import launch
    from .backends.triton.variants import variants

    target = _target(arch)
    processor = _PROCESSORS[arch]
    for length in columns:
        launch.recorded_shared_memory = processor.shared - processor.reserved
        by_dtype = [variants(length, dtype) for dtype in (torch.bfloat16, torch.float32)]
        for pair in zip(*by_dtype, strict=True):
            for dtype, variant in zip(_SIZES, pair, strict=True):
                yield _usage(variant, dtype, length, compile_variant(variant, target), _PROCESSORS[arch])


def _target(arch: str) -> Any:
    from triton.backends.compiler import GPUTarget

    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch.removeprefix("sm_")), _PROCESSORS[arch].warp)
    return GPUTarget("hip", arch, _PROCESSORS[arch].warp)


def compile_variant(variant: "Variant", target: Any) -> Any:
    """The kernel as it would be compiled for aligned tensors."""
    import triton
    from triton.compiler import ASTSource

    kernel, tile, arguments = variant.launch
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list] = {}
    signature = {}
    for index, (parameter, argument) in enumerate(zip(kernel.params, arguments, strict=True)):
        given = triton.language.constexpr(argument) if parameter.is_constexpr else argument
        signature[parameter.name] = _specialized(given, (index,), constants, attributes)
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    options = {name: value for name, value in tile.options.items() if name != "maxnreg" or target.backend == "cuda"}
    return triton.compile(source, target=target, options=options)


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


def _large_operands(argument: Any, elements: int) -> int:
    """How many tensors of that many elements there are, or more."""
    if isinstance(argument, tuple):
        return sum(_large_operands(a, elements) for a in argument)
    return int(isinstance(argument, torch.Tensor) and argument.numel() >= elements)


class _Binary(NamedTuple):
    """What is read from a compiled kernel; `widths` has the bytes of every access of global memory."""

    registers: int
    stack: int
    local: int
    shared: int
    widths: list[int]
    instructions: int


def _of_nvidia(compiled: Any) -> _Binary:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        used = _numbers(_run("cuobjdump", "--dump-resource-usage", file.name))
    code = compiled.asm["ptx"]
    accesses = re.findall(r"(?:ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)", code)
    widths = [int(count or 1) * int(bits) // 8 for count, bits in accesses]
    # Copies to shared memory, of steps of a loop that are to come.
    widths += [int(size, 0) for size in re.findall(r"cp\.async\.c[ag]\.[^;]*\], (0x\w+)", code)]
    instructions = len(re.findall(r"^\s+(?!\.)[^/\n]*;", code, re.MULTILINE))
    return _Binary(used["REG"], used["STACK"], used["LOCAL"], used["SHARED"], widths, instructions)


def _of_amd(compiled: Any) -> _Binary:
    code = compiled.asm["amdgcn"]
    used = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)", code)}
    sizes = {"dword": 4, "short": 2, "ushort": 2, "sshort": 2, "byte": 1, "ubyte": 1, "sbyte": 1}
    accesses = re.findall(
        r"^\s+(?:global|buffer|flat)_(?:load|store)_(dword|[su]?(?:short|byte))(?:x(\d))?", code, re.MULTILINE
    )
    widths = [sizes[kind] * int(count or 1) for kind, count in accesses]
    return _Binary(
        used["vgpr_count"],
        used["private_segment_fixed_size"],
        4 * used["vgpr_spill_count"],
        compiled.metadata.shared,
        widths,
        len(re.findall(r"^\t[a-z]\w+", code, re.MULTILINE)),
    )


def _usage(variant: "Variant", dtype: str, columns: int, compiled: Any, processor: Processor) -> Usage:
    binary = _of_nvidia(compiled) if "cubin" in compiled.asm else _of_amd(compiled)
    _, shape, arguments = variant.launch
    warps, tile = shape.warps, shape.rows * shape.block
    return Usage(
        variant.name,
        dtype,
        columns,
        warps,
        binary.registers,
        binary.stack,
        binary.local,
        binary.shared,
        tuple(sorted(set(binary.widths))),
        binary.instructions,
        16 * binary.widths.count(16) * processor.warp * warps / (tile * _SIZES[dtype]),
        _large_operands(arguments, variant.elements),
        _occupancy(warps, binary.registers, binary.shared, processor),
    )


def _occupancy(warps: int, registers: int, shared: int, processor: Processor) -> float:
    """Registers are given out to warps in units of 256, a thread's in units of 8."""
    by_registers = processor.registers // (-(-registers // 8) * 8 * processor.warp) // warps
    by_shared = processor.shared // max(shared + processor.reserved, 1)
    blocks = min(by_registers, by_shared, processor.warps // warps, processor.blocks)
    return blocks * warps / processor.warps


@dataclass(frozen=True)
class Library:
    """The kernels of the CUDA library for one architecture.

    Attributes:
        arch: the architecture.
        kernels: how many.
        registers: the most that one of them uses.
        with_stack: how many have a stack.
        stack: the most bytes of one.
    """

    arch: str
    kernels: int
    registers: int
    with_stack: int
    stack: int


def cuda_library() -> list[Library]:
    """What the CUDA library was built with.

    Returns:
        A list of `Library`, one for each architecture; empty where the library was not built.
    """
    found = sorted(pathlib.Path(__file__).parent.glob("_C_cuda.*so"))
    if not found:
        return []
    by_arch: dict[str, list[dict[str, int]]] = {}
    arch = ""
    for line in _run("cuobjdump", "--dump-resource-usage", str(found[0])).splitlines():
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = ")
        elif "REG:" in line:
            by_arch.setdefault(arch, []).append(_numbers(line))
    return [
        Library(
            arch,
            len(kernels),
            max(k["REG"] for k in kernels),
            sum(k["STACK"] + k["LOCAL"] > 0 for k in kernels),
            max(k["STACK"] + k["LOCAL"] for k in kernels),
        )
        for arch, kernels in by_arch.items()
    ]


def report(usages: Sequence[Usage], libraries: Sequence[Library], arch: str) -> str:
    """As a table."""
    processor = _PROCESSORS[arch]
    head = ("kernel", "columns", "dtype", "warps", "registers", "spills", "shared", "occupancy", "instructions")
    rows = [(*head, "accesses", "tensors", "floor", "estimate")]
    for usage in usages:
        spilled = usage.stack + usage.local
        # Of a tensor of 2**26 elements, at the published bandwidth and no faster.
        seconds = usage.floor * (_SIZES[usage.dtype] << 26) / (processor.bandwidth * 1e9)
        rows.append(
            (
                usage.name,
                str(usage.columns),
                usage.dtype,
                str(usage.warps),
                str(usage.registers),
                str(spilled),
                str(usage.shared),
                f"{usage.occupancy:.0%}",
                str(usage.instructions),
                "/".join(map(str, usage.widths)),
                f"{usage.tensors:.2f}",
                str(usage.floor),
                f"{seconds * 1e3:.3f} ms",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    bad = [usage for usage in usages if not usage.sound]
    lines += [
        "",
        f"{len(usages)} kernels for {arch}, of which {len(bad)} spill or have no accesses of 16 bytes.",
        "columns: the length of a row. warps: of a block. registers: of a thread. spills: bytes of a thread that",
        "registers had no room for, which should be 0. shared: bytes of a block. occupancy: the share of a",
        "multiprocessor's warps that registers and shared memory leave room for. instructions: of the code, before the",
        "assembler. accesses: the widths in bytes of those of global memory, of which 16 should be one.",
        "tensors: what the code reads and writes, once through and in accesses of 16 bytes, as tensors of the tile's",
        "size; weights, which all programs share, and partial sums are in it. floor: operands of that size.",
        f"estimate, not measured: what the floor takes for 2**26 elements at the published bandwidth of a "
        f"{processor.card}, {processor.bandwidth} GB/s.",
    ]
    lines += [
        f"CUDA library, {one.arch}: {one.kernels} kernels, at most {one.registers} registers; {one.with_stack} have a "
        f"stack, of at most {one.stack} bytes."
        for one in libraries
    ] or ["CUDA library: not built."]
    return "\n".join(lines)


def to_json(usages: Sequence[Usage], libraries: Sequence[Library]) -> str:
    return json.dumps({"triton": [asdict(u) for u in usages], "cuda": [asdict(one) for one in libraries]}, indent=1)


def _numbers(text: str) -> dict[str, int]:
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def _run(tool: str, *arguments: str) -> str:
    """What one of the tools that Triton brings along prints."""
    import triton

    path = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    done = subprocess.run([path, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{tool} failed: {done.stderr.strip()[-500:]}")
    return done.stdout

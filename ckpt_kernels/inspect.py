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

if TYPE_CHECKING:
    from .backends.triton.variants import Variant

COLUMNS = (64, 1024, 8192, 32768)
# Operands that are not of the storage type, and arguments that are not whole numbers.
_DTYPES = {"SEED": "i64"} | dict.fromkeys(("MEAN", "RSTD", "SQUARES", "DW", "DB", "C", "FIRST", "SECOND"), "fp32")
# Those as large as the input; what else there is is small, or shared by all programs.
_LARGE = frozenset("X RESIDUAL GATE VALUE OTHER Y RESIDUAL_OUT DY DH DX DRESIDUAL DGATE DVALUE DOTHER".split())
_FLOATS = ("eps", "weight_offset", "scale")
_SIZES = {"bf16": 2, "fp32": 4}


class Processor(NamedTuple):
    """A multiprocessor's limits, and the published bandwidth of the card it is known from, in GB/s.

    From NVIDIA's CUDA programming guide (compute capabilities) and data sheets.
    """

    card: str
    bandwidth: int
    warps: int
    blocks: int
    shared: int


_PROCESSORS = {
    "80": Processor("A100 80 GB SXM", 2039, 64, 32, 164 << 10),
    "90": Processor("H100 SXM", 3350, 64, 32, 228 << 10),
    "100": Processor("B200", 8000, 64, 32, 228 << 10),
}
ARCHITECTURES = tuple(f"sm_{arch}" for arch in _PROCESSORS)
_REGISTERS = 65536


@dataclass(frozen=True)
class Usage:
    """One kernel, compiled.

    `stack` and `local` are bytes of spills a thread; `widths` those of its global accesses; `instructions` those of its
    PTX. `tensors` is what its code reads and writes, once through and in accesses of 16 bytes, in tensors of the tile's
    size, weights and partial sums included, and `floor` how many of its operands are that large. `occupancy` is the
    share of a multiprocessor's warps that its registers and shared memory leave room for.
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

    `arch` is a compute capability without its dot: "80", "90", "100". Raises ValueError for another, and ImportError
    where Triton is not installed.
    """
    if arch not in _PROCESSORS:
        raise ValueError(f"arch is {arch!r}; expected one of {', '.join(_PROCESSORS)}")
    from triton.backends.compiler import GPUTarget

    from .backends.triton.variants import variants

    target = GPUTarget("cuda", int(arch), 32)
    for length in columns:
        for variant in variants(length):
            for dtype in _SIZES:
                yield _usage(variant, dtype, length, compile_variant(variant, dtype, target), _PROCESSORS[arch])


def compile_variant(variant: "Variant", dtype: str, target: Any) -> Any:
    """The kernel as the launcher would have it compiled for aligned tensors."""
    import triton
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    options = variant.options | {"ROWS": variant.tile.rows, "BLOCK": variant.tile.block}
    for index, name in enumerate(variant.kernel.arg_names):
        if name in options or name in variant.absent:
            signature[name] = "constexpr"
            constants[(index,)] = options.get(name)
        elif name.isupper():
            signature[name] = "*" + _DTYPES.get(name, dtype)
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif name.endswith("places"):
            # Of a plain matrix: the lower levels have one row each, which the launcher makes constants.
            signature[name] = ("i32", "constexpr", "i32", "constexpr", "i32")
            constants |= {(index, 1): 1, (index, 3): 1}
            attributes |= {(index, level): [["tt.divisibility", 16]] for level in (0, 2, 4)}
        elif name in _FLOATS:
            signature[name] = "fp32"
        else:
            signature[name] = "i64" if name == "threshold" else "i32"
            # As the launcher finds the sizes and strides of aligned tensors.
            if name.endswith("stride") or name == "columns":
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(variant.kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options={"num_warps": variant.tile.warps})


def _usage(variant: "Variant", dtype: str, columns: int, compiled: Any, processor: Processor) -> Usage:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        used = _numbers(_run("cuobjdump", "--dump-resource-usage", file.name))
    code = compiled.asm["ptx"]
    accesses = re.findall(r"(?:ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)", code)
    widths = [int(count or 1) * int(bits) // 8 for count, bits in accesses]
    warps, tile = variant.tile.warps, variant.tile.rows * variant.tile.block
    return Usage(
        variant.name,
        dtype,
        columns,
        warps,
        used["REG"],
        used["STACK"],
        used["LOCAL"],
        used["SHARED"],
        tuple(sorted(set(widths))),
        len(re.findall(r"^\s+(?!\.)[^/\n]*;", code, re.MULTILINE)),
        16 * widths.count(16) * 32 * warps / (tile * _SIZES[dtype]),
        len(_LARGE.intersection(variant.kernel.arg_names) - set(variant.absent)),
        _occupancy(warps, used["REG"], used["SHARED"], processor),
    )


def _occupancy(warps: int, registers: int, shared: int, processor: Processor) -> float:
    """Registers are given out to warps in units of 256, a thread's in units of 8."""
    by_registers = _REGISTERS // (-(-registers // 8) * 8 * 32) // warps
    by_shared = processor.shared // (shared + 1024)
    blocks = min(by_registers, by_shared, processor.warps // warps, processor.blocks)
    return blocks * warps / processor.warps


@dataclass(frozen=True)
class Library:
    """The kernels of the CUDA library for one architecture: how many, the most registers, and those with a stack."""

    arch: str
    kernels: int
    registers: int
    with_stack: int
    stack: int


def cuda_library() -> list[Library]:
    """What the CUDA library was built with; empty where it was not built."""
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
        f"{len(usages)} kernels for sm_{arch}, of which {len(bad)} spill or have no accesses of 16 bytes.",
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

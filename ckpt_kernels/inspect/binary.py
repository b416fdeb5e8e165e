"""Reads registers, stack, shared memory and access widths from the binaries of kernels."""

import pathlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..libraries import library


class Binary(NamedTuple):
    """The resources of a compiled kernel.

    Attributes:
        registers: registers a thread.
        stack, local: bytes a thread.
        shared: bytes of shared memory a thread block, dynamic shared memory included.
        widths: the bytes of every access to global memory.
        instructions: the number of instructions in the PTX, or in the assembly of an AMD kernel.
    """

    registers: int
    stack: int
    local: int
    shared: int
    widths: list[int]
    instructions: int


def read(compiled: Any) -> Binary:
    """Return the resources of a kernel that Triton has compiled."""
    return _read_nvidia(compiled) if "cubin" in compiled.asm else _read_amd(compiled)


def disassembled(compiled: Any) -> str:
    """Return the machine code (SASS) of a kernel for NVIDIA GPUs, as nvdisasm lists it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return run_tool("nvdisasm", "--print-code", file.name)


def _read_nvidia(compiled: Any) -> Binary:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        used = _numbers(run_tool("cuobjdump", "--dump-resource-usage", file.name))
    code = compiled.asm["ptx"]
    accesses = re.findall(r"(?:ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)", code)
    widths = [int(count or 1) * int(bits) // 8 for count, bits in accesses]
    # Asynchronous copies to shared memory, which a pipelined loop issues for later steps.
    widths += [int(size, 0) for size in re.findall(r"cp\.async\.c[ag]\.[^;]*\], (0x\w+)", code)]
    instructions = len(re.findall(r"^\s+(?!\.)[^/\n]*;", code, re.MULTILINE))
    return Binary(used["REG"], used["STACK"], used["LOCAL"], compiled.metadata.shared, widths, instructions)


def _read_amd(compiled: Any) -> Binary:
    code = compiled.asm["amdgcn"]
    used = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)", code)}
    sizes = {"dword": 4, "short": 2, "ushort": 2, "sshort": 2, "byte": 1, "ubyte": 1, "sbyte": 1}
    accesses = re.findall(
        r"^\s+(?:global|buffer|flat)_(?:load|store)_(dword|[su]?(?:short|byte))(?:x(\d))?", code, re.MULTILINE
    )
    return Binary(
        used["vgpr_count"],
        used["private_segment_fixed_size"],
        4 * used["vgpr_spill_count"],
        compiled.metadata.shared,
        [sizes[kind] * int(count or 1) for kind, count in accesses],
        len(re.findall(r"^\t[a-z]\w+", code, re.MULTILINE)),
    )


@dataclass(frozen=True)
class Library:
    """The kernels of the CUDA library for one architecture.

    Attributes:
        arch: the architecture.
        kernels: the number of kernels.
        registers: the largest number of registers a thread of any kernel.
        with_stack: the number of kernels with a stack.
        stack: the largest stack of any kernel, in bytes.
    """

    arch: str
    kernels: int
    registers: int
    with_stack: int
    stack: int


def cuda_library() -> list[Library]:
    """Read the kernels of the CUDA library.

    Returns:
        A list of `Library`, one for each architecture; empty if the library is not built.
    """
    path = library("_C_cuda")
    if path is None:
        return []
    by_arch: dict[str, list[dict[str, int]]] = {}
    arch = ""
    for line in run_tool("cuobjdump", "--dump-resource-usage", str(path)).splitlines():
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


def _numbers(text: str) -> dict[str, int]:
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def run_tool(tool: str, *arguments: str) -> str:
    """Run a tool of Triton's package, such as nvdisasm, and return the output."""
    import triton

    path = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    done = subprocess.run([path, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{tool} failed: {done.stderr.strip()[-500:]}")
    return done.stdout

"""Compiles every kernel that the launch tables can choose, without a GPU, and prints what each one uses, as JSON.

Run by test_triton_compile.py in a process of its own, because Triton must not be in its interpreter here.
Argument: "cuda:90", "hip:gfx942", ...
"""

import json
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ckpt_kernels.backends.triton.bias_act import bias_act_backward_kernel, bias_act_forward_kernel
from ckpt_kernels.backends.triton.channel_norm import (
    channel_backward_kernel,
    channel_forward_kernel,
    plane_moments_kernel,
    plane_sums_kernel,
    row_moments_kernel,
    row_sums_kernel,
)
from ckpt_kernels.backends.triton.glu import glu_backward_kernel, glu_forward_kernel
from ckpt_kernels.backends.triton.launch import (
    Tile,
    backward_tile,
    channel_tile,
    column_sum_tile,
    element_tile,
    forward_tile,
)
from ckpt_kernels.backends.triton.long_row_norm import long_row_norm_backward_kernel, long_row_norm_forward_kernel
from ckpt_kernels.backends.triton.row_norm import row_norm_backward_kernel, row_norm_forward_kernel

CUOBJDUMP = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# Operands that are not of the storage type, and arguments that are not whole numbers.
DTYPES = {"SEED": "i64"} | dict.fromkeys(("MEAN", "RSTD", "SQUARES", "DW", "DB", "C", "FIRST", "SECOND"), "fp32")
FLOATS = ("eps", "weight_offset", "scale")


@dataclass(frozen=True)
class Variant:
    """One kernel with the operands that it does without and its options."""

    name: str
    kernel: triton.JITFunction
    tile: Tile
    absent: Sequence[str]
    options: dict[str, object]


def row_norm_variants(columns: int) -> Iterator[Variant]:
    defaults = {
        "PRE_ACTIVATION": "identity",
        "ACTIVATION": "identity",
        "GATE_FIRST": False,
        "CAST": False,
        "GIVEN": False,
    }
    for block, options, without, backward_without in (
        ("layer_norm+gelu", {"ACTIVATION": "gelu"}, "RESIDUAL GATE SEED RESIDUAL_OUT", "DH GATE SEED DRESIDUAL DGATE"),
        (
            "silu+rms_norm",
            {"PRE_ACTIVATION": "silu"},
            "RESIDUAL GATE B SEED RESIDUAL_OUT MEAN",
            "DH GATE B SEED MEAN DRESIDUAL DGATE DB",
        ),
        ("add_layer_norm+dropout", {}, "GATE", "GATE DGATE"),
        ("gated_rms_norm", {"ACTIVATION": "silu"}, "RESIDUAL B SEED RESIDUAL_OUT MEAN", "DH B SEED MEAN DRESIDUAL DB"),
    ):
        tile = forward_tile(columns)
        kernel = row_norm_forward_kernel if tile.whole else long_row_norm_forward_kernel
        yield Variant(f"{block} forward", kernel, tile, without.split(), defaults | options)
        if block.startswith("layer_norm"):
            yield Variant(f"{block} again", kernel, tile, without.split(), defaults | options | {"GIVEN": True})
        # A gate is one more operand to hold, and so is the output where it is written again.
        for rewrites in (False, True) if block.startswith("layer_norm") else (False,):
            tile = backward_tile(columns, "GATE" not in without or rewrites)
            kernel = row_norm_backward_kernel if tile.whole else long_row_norm_backward_kernel
            name = f"{block} backward{' and output' if rewrites else ''}"
            absent = [*backward_without.split(), *(() if rewrites else ("Y",))]
            yield Variant(name, kernel, tile, absent, defaults | options)


def element_variants(columns: int) -> Iterator[Variant]:
    tile = element_tile(columns)
    for turns in (False, True):
        options, name = {"ACTIVATION": "silu", "TURNS": turns}, "interleaved glu" if turns else "glu"
        yield Variant(f"{name} forward", glu_forward_kernel, tile, (), options)
        yield Variant(f"{name} backward", glu_backward_kernel, tile, ("Y",), options)
        yield Variant(f"{name} backward and output", glu_backward_kernel, tile, (), options)
    for name, without in (("bias_act", ("SEED",)), ("bias_act+dropout", ())):
        options, tile = {"ACTIVATION": "gelu"}, element_tile(columns)
        yield Variant(f"{name} forward", bias_act_forward_kernel, tile, without, options)
        tile = column_sum_tile(columns)
        yield Variant(f"{name} backward", bias_act_backward_kernel, tile, (*without, "Y"), options)
        yield Variant(f"{name} backward and output", bias_act_backward_kernel, tile, (*without, "DB"), options)


def channel_variants(columns: int) -> Iterator[Variant]:
    """Planes of this many elements, and rows of this many channels."""
    for planes in (True, False):
        name = "planes" if planes else "channels last"
        options = {"ACTIVATION": "silu", "BY_SAMPLE": not planes}
        sums_kernel = plane_sums_kernel if planes else row_sums_kernel
        moments_kernel = plane_moments_kernel if planes else row_moments_kernel
        tile = channel_tile(columns, planes)
        yield Variant(f"{name} moments", moments_kernel, tile, (), {})
        yield Variant(f"{name} sums", sums_kernel, tile, ("OTHER",), options | {"BY_OUTPUT": False})
        tile, options = element_tile(columns), options | {"PLANES": planes}
        yield Variant(f"{name} forward", channel_forward_kernel, tile, (), options)
        yield Variant(f"{name} backward", channel_backward_kernel, tile, (), options | {"BY_OUTPUT": True})


def compile_variant(variant: Variant, dtype: str, target: GPUTarget) -> object:
    signature, constants, attributes = {}, {}, {}
    options = variant.options | {"ROWS": variant.tile.rows, "BLOCK": variant.tile.block}
    for index, name in enumerate(variant.kernel.arg_names):
        if name in options or name in variant.absent:
            signature[name] = "constexpr"
            constants[(index,)] = options.get(name)
        elif name.isupper():
            signature[name] = "*" + DTYPES.get(name, dtype)
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif name.endswith("places"):
            # Of a plain matrix: the lower levels have one row each, which the launcher makes constants.
            signature[name] = ("i32", "constexpr", "i32", "constexpr", "i32")
            constants |= {(index, 1): 1, (index, 3): 1}
            attributes |= {(index, level): [["tt.divisibility", 16]] for level in (0, 2, 4)}
        elif name in FLOATS:
            signature[name] = "fp32"
        else:
            signature[name] = "i64" if name == "threshold" else "i32"
            # As the launcher finds the sizes and strides of aligned tensors.
            if name.endswith("stride") or name == "columns":
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(variant.kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options={"num_warps": variant.tile.warps})


def resources(compiled) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        printed = subprocess.run([CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", printed)}
    accesses = re.findall(r"(?:ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)", compiled.asm["ptx"])
    widths = [int(count or 1) * int(bits) // 8 for count, bits in accesses]
    return found | {"widths": sorted(set(widths))}


def main() -> None:
    kind, _, arch = sys.argv[1].partition(":")
    target = GPUTarget("cuda", int(arch), 32) if kind == "cuda" else GPUTarget("hip", arch, 64)
    results = {}
    for columns in map(int, sys.argv[2].split(",")):
        for variant in (*row_norm_variants(columns), *element_variants(columns), *channel_variants(columns)):
            for dtype in ("bf16", "fp32"):
                compiled = compile_variant(variant, dtype, target)
                used = resources(compiled) if kind == "cuda" else {"binary": len(compiled.asm["hsaco"])}
                results[f"{variant.name} {dtype} {columns}"] = used
    print(json.dumps(results))


if __name__ == "__main__":
    main()

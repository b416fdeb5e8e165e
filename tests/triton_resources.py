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

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ckpt_kernels.backends.triton.launch import backward_tile, forward_tile
from ckpt_kernels.backends.triton.long_row_norm import long_row_norm_backward_kernel, long_row_norm_forward_kernel
from ckpt_kernels.backends.triton.row_norm import row_norm_backward_kernel, row_norm_forward_kernel

CUOBJDUMP = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
FORWARD_DTYPES = {"MEAN": "fp32", "RSTD": "fp32", "SEED": "i64"}
BACKWARD_DTYPES = FORWARD_DTYPES | {"DW": "fp32", "DB": "fp32"}
FLOATS = ("eps", "weight_offset", "scale")
OPTIONS = {"PRE_ACTIVATION": "identity", "ACTIVATION": "identity", "GATE_FIRST": False, "CAST": False}

# Which operands each block does without, and its options.
FORWARD_ABSENT = {
    "layer_norm+gelu": (("RESIDUAL", "GATE", "SEED", "RESIDUAL_OUT"), {"ACTIVATION": "gelu"}),
    "silu+rms_norm": (("RESIDUAL", "GATE", "B", "SEED", "RESIDUAL_OUT", "MEAN"), {"PRE_ACTIVATION": "silu"}),
    "add_layer_norm+dropout": (("GATE",), {}),
    "gated_rms_norm": (("RESIDUAL", "B", "SEED", "RESIDUAL_OUT", "MEAN"), {"ACTIVATION": "silu"}),
}
BACKWARD_ABSENT = {
    "layer_norm+gelu": (("DH", "GATE", "SEED", "DRESIDUAL", "DGATE"), {"ACTIVATION": "gelu"}),
    "silu+rms_norm": (("DH", "GATE", "B", "SEED", "MEAN", "DRESIDUAL", "DGATE", "DB"), {"PRE_ACTIVATION": "silu"}),
    "add_layer_norm+dropout": (("GATE", "DGATE"), {}),
    "gated_rms_norm": (("DH", "B", "SEED", "MEAN", "DRESIDUAL", "DB"), {"ACTIVATION": "silu"}),
}


def compile_kernel(kernel, absent, options, tile, dtype, dtypes, target):
    signature, constants, attributes = {}, {}, {}
    options = OPTIONS | options | {"ROWS": tile.rows, "BLOCK": tile.block}
    for index, name in enumerate(kernel.arg_names):
        if name in options or name in absent:
            signature[name] = "constexpr"
            constants[(index,)] = options.get(name)
        elif name.isupper():
            signature[name] = "*" + dtypes.get(name, dtype)
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif name in FLOATS:
            signature[name] = "fp32"
        else:
            signature[name] = "i64" if name == "threshold" else "i32"
            # As the launcher finds the sizes and strides of aligned tensors.
            if name.endswith("stride") or name == "columns":
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options={"num_warps": tile.warps})


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
    for direction, table, whole, long, tile_for, dtypes in (
        (
            "forward",
            FORWARD_ABSENT,
            row_norm_forward_kernel,
            long_row_norm_forward_kernel,
            lambda columns, gated: forward_tile(columns),
            FORWARD_DTYPES,
        ),
        (
            "backward",
            BACKWARD_ABSENT,
            row_norm_backward_kernel,
            long_row_norm_backward_kernel,
            backward_tile,
            BACKWARD_DTYPES,
        ),
    ):
        for columns in map(int, sys.argv[2].split(",")):
            for block, (absent, options) in table.items():
                tile = tile_for(columns, "GATE" not in absent)
                for dtype in ("bf16", "fp32"):
                    compiled = compile_kernel(
                        whole if tile.whole else long, absent, options, tile, dtype, dtypes, target
                    )
                    name = f"{direction} {block} {dtype} {columns}"
                    results[name] = resources(compiled) if kind == "cuda" else {"binary": len(compiled.asm["hsaco"])}
    print(json.dumps(results))


if __name__ == "__main__":
    main()

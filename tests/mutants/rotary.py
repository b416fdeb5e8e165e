"""Faults in the rotations, in C++ and in CUDA."""

from .mutant import Mutant

_ROTARY_PARTS = "tests/test_rotary.py -k 'layout_and_part and {}'"
ROTARY = (
    Mutant(
        "pairs turn back as they turned",
        "csrc/cpu/rotary_rows.h",
        "if («back») return {x.first * c1 + x.second * s2",
        "false",
        _ROTARY_PARTS.format("native and 128"),
    ),
    Mutant(
        "both elements of a pair turn by the first one's sine",
        "csrc/cpu/rotary_rows.h",
        "s2 = load(«sin2 + j», lanes)",
        "sin1 + j",
        _ROTARY_PARTS.format("native and 128"),
    ),
    Mutant(
        "the columns after the rotated ones begin where these do",
        "csrc/cpu/rotary_rows.h",
        "pass(«end», a.columns);",
        "a.start",
        _ROTARY_PARTS.format("native and 80"),
    ),
    Mutant(
        "rows are streamed at any column",
        "csrc/cpu/rotary_rows.h",
        "a.start * int64_t(sizeof(U)) % 64 == 0",
        "true",
        "tests/test_streaming.py -k 'second and aligned'",
    ),
    Mutant(
        "the table of the next sample is that of this one",
        "csrc/cpu/rotary_rows.h",
        "«++place.outer;»",
        ";",
        "tests/test_rotary.py -k 'tables_are_broadcast and native'",
    ),
    Mutant(
        "a table that is converted has one row for all samples",
        "csrc/cpu/rotary.cpp",
        "given.rows.stride ? «a.rows / (a.middle * a.inner)» : 1",
        "1",
        "tests/test_rotary.py -k 'tables_are_broadcast and native'",
    ),
    Mutant(
        "the weight's gradient is summed of what the rounding before the weight has not seen",
        "csrc/cpu/rotary_rows.h",
        "const Vec<S> seen = «rounded_if<S, T>(a.cast_before_weight, x_hat)»;",
        "x_hat",
        "tests/test_rotary.py -k 'rounded_before_the_weight and native'",
    ),
    Mutant(
        "a layer norm's gradient is an RMSNorm's",
        "csrc/cpu/rotary_rows.h",
        "a.norm == HeadNorm::layer ? double(sum.total() / S(a.columns)) : 0.0",
        "0.0",
        _ROTARY_PARTS.format("native and layer"),
    ),
    Mutant(
        "pairs turn back as they turned, on CUDA",
        "csrc/cuda/rotary_kernels.cuh",
        "second * («back» ? sin[VEC + i] : -sin[i])",
        "false",
        _ROTARY_PARTS.format("cuda_on_host and 128"),
    ),
    Mutant(
        "16 bytes of a table are read at any address",
        "csrc/cuda/rotary_launch.cuh",
        "reinterpret_cast<uintptr_t>(rows.data) % bytes == 0",
        "true",
        "tests/test_rotary.py -k 'tables_at_any_address and cuda_on_host'",
    ),
    Mutant(
        "lines of a block are not added up",
        "csrc/cuda/rotary_kernels.cuh",
        "other < «lines»; ++other",
        "1",
        "tests/test_rotary.py -k 'many_rows and cuda_on_host'",
    ),
    Mutant(
        "sums of lines are read before all are written",
        "csrc/cuda/rotary_kernels.cuh",
        "«__syncthreads();»\n    if (takes_part && line == 0)",
        ";",
        "tests/test_rotary.py -k 'many_rows and cuda_on_host'",
    ),
    Mutant(
        "sums of the bias are written before those of the weight are read",
        "csrc/cuda/rotary_kernels.cuh",
        "    }\n    «__syncthreads();»\n  };",
        ";",
        "tests/test_rotary.py -k 'many_rows and cuda_on_host'",
        "On the host threads run in their order, and a sum reads only of threads after its own.",
    ),
)

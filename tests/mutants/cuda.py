"""Faults in the CUDA kernels."""

from .mutant import Mutant
from .selections import DROPPED, EDGES, STORED

_ODD = "tests/test_cuda_on_host.py -k 'float32 or dtype0'"
CUDA = (
    Mutant(
        "16 bytes are read at any address",
        "csrc/cuda/elements.cuh",
        "reinterpret_cast<uintptr_t>(p) % 16 == 0",
        "true",
        _ODD,
    ),
    Mutant(
        "16 bytes are read however far rows are apart",
        "csrc/cuda/elements.cuh",
        "rows.stride * sizeof(T) % 16 == 0",
        "true",
        _ODD,
    ),
    Mutant(
        "16 bytes are read however far heads are apart, on the middle level",
        "csrc/cuda/elements.cuh",
        "rows.middle_stride * sizeof(T) % 16 == 0",
        "true",
        "tests/test_cuda_on_host.py -k heads",
    ),
    Mutant(
        "16 bytes are read however far heads are apart, on the inner level",
        "csrc/cuda/elements.cuh",
        "rows.inner_stride * sizeof(T) % 16 == 0",
        "true",
        "tests/test_cuda_on_host.py -k heads",
    ),
    Mutant(
        "threads of the grid take one turn",
        "csrc/cuda/elements.cuh",
        "return int64_t(gridDim.x) * block_threads;",
        "return int64_t(1) << 40;",
        EDGES.format("cuda_on_host and bias_act and 1009"),
    ),
    Mutant(
        "a second turn begins a thread further",
        "csrc/cuda/elements.cuh",
        "return int64_t(gridDim.x) * block_threads;",
        "return int64_t(gridDim.x) * block_threads + 1;",
        EDGES.format("cuda_on_host and bias_act and 1009"),
    ),
    Mutant(
        "teams take one turn",
        "csrc/cuda/team.cuh",
        "return int64_t(gridDim.x) * (block_threads / size);",
        "return int64_t(1) << 40;",
        EDGES.format("cuda_on_host and layer_norm and 1x70x16"),
    ),
    Mutant(
        "a sum over a block is read before all of it is written",
        "csrc/cuda/team.cuh",
        "«__syncthreads();»\n    float total = 0;",
        ";",
        EDGES.format("cuda_on_host and rms_norm and 20011"),
    ),
    Mutant(
        "a sum over a block is written again before all have read it",
        "csrc/cuda/team.cuh",
        "// The next sum overwrites the partial sums.\n    «__syncthreads();»",
        ";",
        EDGES.format("cuda_on_host and layer_norm and 20011"),
    ),
    Mutant(
        "moments of a block are read before all are written",
        "csrc/cuda/team.cuh",
        "«__syncthreads();»\n    Moments total",
        ";",
        EDGES.format("cuda_on_host and layer_norm and 20011"),
    ),
    Mutant(
        "moments of a block are written again before all have read them",
        "csrc/cuda/team.cuh",
        "total.merge(partial[warp]);\n    «__syncthreads();»",
        ";",
        EDGES.format("cuda_on_host and layer_norm and 20011"),
    ),
    Mutant(
        "sums over rows are read before all are written",
        "csrc/cuda/channel_norm_kernels.cuh",
        "«__syncthreads();»\n    if (line != 0) return;",
        ";",
        "tests/test_channel_norm.py -k 'every_shape and cuda_on_host and channels_last'",
    ),
    Mutant(
        "the last, shorter piece has as many rows as the others",
        "csrc/channel_norm.h",
        "return «end < size ? end : size»;",
        "end",
        "tests/test_channel_norm.py -k 'every_shape and cuda_on_host and 131'",
    ),
    Mutant(
        "alpha's gradient is that of alpha * x, without x",
        "csrc/cpu/dyt_rows.h",
        "sum.part[slot.index] += s * x;",
        "sum.part[slot.index] += s;",
        EDGES.format("native and dyt and 7x1x16"),
    ),
    Mutant(
        "alpha's gradient is that of a block's first thread",
        "csrc/cuda/dyt_kernels.cuh",
        "alpha_sum = Team<false>::sum(alpha_sum);",
        ";",
        EDGES.format("cuda_on_host and dyt and 7x1x16"),
    ),
    Mutant(
        "bias_act writes its output again without the dropout factor, on CUDA",
        "csrc/cuda/bias_act_kernels.cuh",
        "«drop<VEC>(a, row, j, y);»\n    store<VEC>(a.output.row<T>(row) + j, y);\n  }\n  differentiate",
        ";",
        DROPPED.format("cuda_on_host and mlp"),
    ),
    Mutant(
        "the sum with the residual is normalised before it is rounded, on CUDA",
        "csrc/cuda/row_norm_kernels.cuh",
        "store<VEC>(residual_out.row<T>(row) + j, u);\n    «load<VEC>(residual_out.row<const T>(row) + j, u);»",
        ";",
        STORED.format("cuda_on_host"),
    ),
    Mutant(
        "eight elements of a thread are dropped by four draws",
        "csrc/cuda/elements.cuh",
        "uint32_t(j / 4) + «quad»",
        "0",
        "tests/test_row_norm.py -k every_backend_draws",
    ),
)

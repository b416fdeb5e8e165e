"""The faults, and which tests are to notice each.

In `find`, which must be in the file once, «» marks what is replaced where it is not all. Of C++ and CUDA sources that
is an expression, or a statement with its semicolon, because both it and its replacement are compiled.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One fault: what is replaced by what, the pytest arguments of the tests that are to fail by it, and, if none can,
    the reason."""

    name: str
    file: str
    find: str
    replace: str
    tests: str
    reason: str = ""

    @property
    def is_compiled(self) -> bool:
        return self.file.startswith("csrc/")

    @property
    def is_in_library(self) -> bool:
        """Of CUDA's kernels the tests have a build of their own."""
        return self.is_compiled and not self.file.startswith("csrc/cuda/")

    def parts(self, text: str) -> tuple[str, str, str]:
        """What is before the fault, what it replaces, and what comes after."""
        before, mark, rest = self.find.partition("«")
        original, _, after = rest.partition("»") if mark else (self.find, "", "")
        before = before if mark else ""
        whole = before + original + after
        if text.count(whole) != 1:
            raise ValueError(f"{self.file} has {text.count(whole)} times {whole!r}; expected it once")
        start = text.index(whole) + len(before)
        return text[:start], original, text[start + len(original) :]

    def applied(self, text: str) -> str:
        before, _, after = self.parts(text)
        return before + self.replace + after

    def switched(self, text: str, number: int) -> str:
        """The file with both, the fault where `ckpt_mutant` has its number."""
        before, original, after = self.parts(text)
        if original.endswith(";"):
            both = f"{{ if (ckpt_mutant == {number}) {{ {self.replace} }} else {{ {original} }} }}"
        else:
            both = f"(ckpt_mutant == {number} ? ({self.replace}) : ({original}))"
        return before + both + after


_OPERAND = "csrc/cpu/row_norm_operand.h"
_BACKWARD = "csrc/cpu/row_norm_backward_rows.h"
_DROPPED = "tests/test_linear.py -k 'every_activation_and_dropout and gelu-all and {}'"
_MASKS = "tests/test_row_norm.py -k 'dropout_gradients and {}'"
_STORED = "tests/test_row_norm.py -k 'sum_as_it_is_stored and {}'"
_EDGES = "tests/test_contract_numbers.py -k 'test_edge_sizes and {}'"

NATIVE = (
    Mutant(
        "bias_act writes its output again without the dropout factor",
        "csrc/cpu/bias_act_rows.h",
        "factor ? y * load(factor + j, lanes) : y",
        "y",
        _DROPPED.format("native and mlp"),
    ),
    Mutant(
        "bias_act's gradient goes past the mask",
        "csrc/cpu/bias_act_rows.h",
        "if (factor) «g = g * load(factor + j, lanes);»",
        ";",
        "tests/test_bias_act.py -k 'dropout_gradients and native'",
    ),
    Mutant(
        "glu writes its output again without the gate",
        "csrc/cpu/glu_rows.h",
        "store(output + j, «factor * x.second», lanes)",
        "x.second",
        _DROPPED.format("native and gated"),
    ),
    Mutant(
        "gate and value that take turns: half of a row's last elements",
        "csrc/cpu/vec_pairs.h",
        "for (int64_t i = 0; i < «2 * lanes.count»; ++i) padded[i]",
        "lanes.count",
        "tests/test_glu.py -k 'two_halves and native and interleaved'",
    ),
    Mutant(
        "the backward pass takes the mask of the first 512 columns for all",
        _BACKWARD,
        "dropout_factors(a.dropout, row, «j0», n, slope.value)",
        "0",
        _MASKS.format("native"),
    ),
    Mutant(
        "the sum with the residual is normalised before it is rounded",
        _OPERAND,
        "load(residual + j, lanes) + load(z + j, lanes);\n          sum.put(j0 + j, total, lanes);\n"
        "          store(z + j, «round_to<S, T>(total)», Full<S>{});",
        "total",
        _STORED.format("native"),
    ),
    Mutant(
        "of three rows beyond the tiles of four, one counts twice",
        _BACKWARD,
        "r.sum_h = r.sum_h_x_hat = Vec<S>(0.0);\n      if («i < live»)",
        "i < live || live == 3",
        _EDGES.format("native and 7x1x16"),
    ),
    Mutant(
        "a norm that is not centred loses the gradient's mean",
        _BACKWARD,
        "a.centered ? sum_lanes(r.sum_h) / S(a.columns) : S(0)",
        "sum_lanes(r.sum_h) / S(a.columns)",
        _EDGES.format("native and rms_norm and 7x1x16"),
    ),
    Mutant(
        "the gradient of the sum is streamed though it is read again",
        _BACKWARD,
        "if (a.grad_residual) «grad_input.streams = false;»",
        ";",
        _MASKS.format("native"),
        "It is slower, and right.",
    ),
    Mutant(
        "the output is written again without the rounding before the weight",
        _BACKWARD,
        "rounded = «rounded_if<S, T>(cast, x_hat)»;\n      Vec<S> grad",
        "x_hat",
        "tests/test_linear.py -k 'rounded_before_the_weight and native'",
    ),
    Mutant(
        "the last, shorter piece of a channels-last norm counts whole",
        "csrc/cpu/channel_statistics.h",
        "piece + 1 < sets.pieces ? piece_rows : size - (sets.pieces - 1) * piece_rows",
        "piece_rows",
        "tests/test_channel_norm.py -k 'every_shape and native and 131'",
    ),
    Mutant(
        "how far the means of pieces are apart counts once a piece",
        "csrc/cpu/channel_statistics.h",
        "deviation[set] += squares[i] + «elements(piece) * apart * apart»;",
        "apart * apart",
        "tests/test_channel_norm.py -k 'every_shape and native and 131'",
    ),
    Mutant(
        "results are streamed whatever their address",
        "csrc/cpu/vec_stream.h",
        "reinterpret_cast<uintptr_t>(row) % 64 == 0",
        "true",
        "tests/test_streaming.py",
    ),
    Mutant(
        "the elements beyond a row's last whole vector count as if they were there",
        "csrc/cpu/vec.h",
        "if («i >= count») a.v[i] = 0;",
        "false",
        _EDGES.format("native and layer_norm and 1009"),
    ),
    Mutant(
        "a long row's last piece begins where the row does",
        "csrc/cpu/row_tasks.h",
        "const int64_t first = «i % pieces * piece»;",
        "0",
        "tests/test_bias_act.py -k every_backend_draws",
    ),
    Mutant(
        "rows of the next group are summed with this one's",
        "csrc/cpu/row_tasks.h",
        "return «last < group_end ? last : group_end»;",
        "last",
        "tests/test_contract_numbers.py -k 'many_rows'",
    ),
    Mutant(
        "hardswish slopes at -3",
        "csrc/math/activations.h",
        "select(«x <= T(-3)», T(0), inner)",
        "x < T(-3)",
        "tests/test_activations.py -k 'whole_range and hardswish and native'",
    ),
    Mutant(
        "softplus is the identity above 10",
        "csrc/math/activations.h",
        "return select(«x > T(20)», x, select(x > T(0), x, T(0)) + log1p_unit(e));",
        "x > T(10)",
        "tests/test_activations.py -k 'whole_range and softplus and native'",
    ),
    Mutant(
        "nine rounds of Philox",
        "csrc/math/philox.h",
        "round < «10»",
        "9",
        "tests/test_row_norm.py -k every_backend_draws",
    ),
)

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
        _EDGES.format("cuda_on_host and bias_act and 1009"),
    ),
    Mutant(
        "a second turn begins a thread further",
        "csrc/cuda/elements.cuh",
        "return int64_t(gridDim.x) * block_threads;",
        "return int64_t(gridDim.x) * block_threads + 1;",
        _EDGES.format("cuda_on_host and bias_act and 1009"),
    ),
    Mutant(
        "teams take one turn",
        "csrc/cuda/team.cuh",
        "return int64_t(gridDim.x) * (block_threads / size);",
        "return int64_t(1) << 40;",
        _EDGES.format("cuda_on_host and layer_norm and 1x70x16"),
    ),
    Mutant(
        "a sum over a block is read before all of it is written",
        "csrc/cuda/team.cuh",
        "«__syncthreads();»\n    float total = 0;",
        ";",
        _EDGES.format("cuda_on_host and rms_norm and 20011"),
    ),
    Mutant(
        "a sum over a block is written again before all have read it",
        "csrc/cuda/team.cuh",
        "// The next sum writes the partial sums again.\n    «__syncthreads();»",
        ";",
        _EDGES.format("cuda_on_host and layer_norm and 20011"),
    ),
    Mutant(
        "moments of a block are read before all are written",
        "csrc/cuda/team.cuh",
        "«__syncthreads();»\n    Moments total",
        ";",
        _EDGES.format("cuda_on_host and layer_norm and 20011"),
    ),
    Mutant(
        "moments of a block are written again before all have read them",
        "csrc/cuda/team.cuh",
        "total.merge(partial[warp]);\n    «__syncthreads();»",
        ";",
        _EDGES.format("cuda_on_host and layer_norm and 20011"),
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
        _EDGES.format("native and dyt and 7x1x16"),
    ),
    Mutant(
        "alpha's gradient is that of a block's first thread",
        "csrc/cuda/dyt_kernels.cuh",
        "alpha_sum = Team<false>::sum(alpha_sum);",
        ";",
        _EDGES.format("cuda_on_host and dyt and 7x1x16"),
    ),
    Mutant(
        "bias_act writes its output again without the dropout factor, on CUDA",
        "csrc/cuda/bias_act_kernels.cuh",
        "«drop<VEC>(a, row, j, y);»\n    store<VEC>(a.output.row<T>(row) + j, y);\n  }\n  differentiate",
        ";",
        _DROPPED.format("cuda_on_host and mlp"),
    ),
    Mutant(
        "the sum with the residual is normalised before it is rounded, on CUDA",
        "csrc/cuda/row_norm_kernels.cuh",
        "store<VEC>(residual_out.row<T>(row) + j, u);\n    «load<VEC>(residual_out.row<const T>(row) + j, u);»",
        ";",
        _STORED.format("cuda_on_host"),
    ),
    Mutant(
        "eight elements of a thread are dropped by four draws",
        "csrc/cuda/elements.cuh",
        "uint32_t(j / 4) + «quad»",
        "0",
        "tests/test_row_norm.py -k every_backend_draws",
    ),
)

_TILES = "ckpt_kernels/backends/triton/row_norm_tiles.py"
_HEADS = "ckpt_kernels/backends/triton/rotary_tiles.py"
TRITON = (
    Mutant(
        "bias_act writes its output again without the dropout factor, in Triton",
        "ckpt_kernels/backends/triton/bias_act.py",
        "result = result * factor\n        if y.data is not None:",
        "result = result\n        if y.data is not None:",
        _DROPPED.format("triton and mlp"),
    ),
    Mutant(
        "bias_act's gradient goes past the mask, in Triton",
        "ckpt_kernels/backends/triton/bias_act.py",
        "g = g * factor",
        "g = g",
        "tests/test_bias_act.py -k 'dropout_gradients and triton'",
    ),
    Mutant(
        "alpha's gradient is that of alpha * x, without x, in Triton",
        "ckpt_kernels/backends/triton/dyt.py",
        "dalpha += s * u",
        "dalpha += s",
        _EDGES.format("triton and dyt and 7x1x16"),
    ),
    Mutant(
        "glu writes its output again without the gate, in Triton",
        "ckpt_kernels/backends/triton/glu.py",
        "mask, factor * v)",
        "mask, v)",
        _DROPPED.format("triton and gated"),
    ),
    Mutant(
        "the backward pass takes the mask of the first columns for all, in Triton",
        _TILES,
        "du = du * dropout_factor(norm.dropout, row, «start», ROWS",
        "0",
        _MASKS.format("triton"),
    ),
    Mutant(
        "the sum with the residual is normalised before it is rounded, in Triton",
        _TILES,
        "load(norm.residual, row, column, mask) + x)«.to(RESIDUAL_OUT.dtype.element_ty)»",
        "",
        _STORED.format("triton"),
    ),
    Mutant(
        "an activation is seen by the statistics where there is no element, in Triton",
        _TILES,
        "u = «tl.where(mask, activate(u, chosen.pre_activation), 0.0)»",
        "activate(u, chosen.pre_activation)",
        "tests/test_contract_numbers.py -k 'every_activation and triton-float32 and sigmoid-'",
    ),
    Mutant(
        "hardswish slopes at -3, in Triton",
        "ckpt_kernels/backends/triton/activations.py",
        "tl.where(x <= -3.0, 0.0,",
        "tl.where(x < -3.0, 0.0,",
        "tests/test_activations.py -k 'whole_range and hardswish and triton'",
    ),
    Mutant(
        "a piece of rows goes on into the next sample, in Triton",
        "ckpt_kernels/backends/triton/channel_norm.py",
        "end = «tl.minimum(begin + pieces.rows, (piece // pieces.count + 1) * pieces.size)»",
        "begin + pieces.rows",
        "tests/test_channel_norm.py -k 'every_shape and triton and 131'",
    ),
    Mutant(
        "an interleaved row reads half of its elements, in Triton",
        "ckpt_kernels/backends/triton/glu.py",
        "(row < shape.rows) & (column < «2 * shape.columns»)",
        "shape.columns",
        "tests/test_glu.py -k 'two_halves and triton and interleaved'",
    ),
    Mutant(
        "a rotation's transpose takes the entries of the rotation, in Triton",
        _HEADS,
        "head[0] * cos1 + head[1] * «sin2»",
        "sin1",
        "tests/test_rotary_triton.py -k 'every_layout and halves-halves-8-plain'",
    ),
    Mutant(
        "the mean of a head leaves out the columns that pass, in Triton",
        _HEADS,
        "tl.sum(head[0] + head[1], 1)« + tl.sum(head[2], 1)»",
        "",
        "tests/test_rotary_triton.py -k 'in_part and 8-0-halves-rms'",
    ),
    Mutant(
        "pairs that are not there are as far from 0 as the mean is, in Triton",
        _HEADS,
        "first, second = «tl.where(pairs, head[0] - mean, 0.0)»",
        "head[0] - mean",
        "tests/test_rotary_triton.py -k 'in_part and 13-6-3-halves-layer'",
    ),
)

_RECOMPUTE = "ckpt_kernels/recompute/discarder.py"
_VIEWS = "tests/test_recompute.py -k more_than_strides"
_BAD = "tests/test_row_norm.py -k bad_input"
PYTHON = (
    Mutant(
        "a negative view of an output is rebuilt as the output",
        _RECOMPUTE,
        "tensor.is_neg()",
        "False",
        _VIEWS,
    ),
    Mutant(
        "a view in another dtype is rebuilt in the output's", _RECOMPUTE, "tensor.dtype != entry.dtype", "False", _VIEWS
    ),
    Mutant(
        "a view in another dtype is rebuilt in that of torch's own result",
        _RECOMPUTE,
        "tensor.dtype != root.dtype",
        "False",
        _VIEWS,
    ),
    Mutant(
        "an output is forgotten with its tensor, though its memory lives",
        "ckpt_kernels/recompute/entries.py",
        "entry is not None and «not entry.storage.expired()»",
        "entry.output() is not None",
        "tests/test_recompute.py -k outlives",
    ),
    Mutant(
        "a cast is made again of what the block made, whatever was written to it",
        "ckpt_kernels/recompute/provenance.py",
        "output == 0 and block.is_unwritten()",
        "output == 0",
        "tests/test_recompute.py -k cast_of_what_was_written",
    ),
    Mutant(
        "writes that the graph does not know are not counted",
        "ckpt_kernels/recompute/provenance.py",
        "version - block.version != len(nodes)",
        "False",
        "tests/test_recompute.py tests/test_provenance_writes.py -k 'written or write or unseen'",
    ),
    Mutant(
        "a kept tensor may be written to",
        "ckpt_kernels/recompute/recipes.py",
        "if self.tensor._version != self.version",
        "if False",
        "tests/test_recompute.py -k write_to_what_is_kept",
    ),
    Mutant(
        "a rebuilt output waits for one reader more",
        "ckpt_kernels/recompute/recipes.py",
        "waiting = [c for c in self._live() if «c is not claim and »c.served != where]",
        "",
        "tests/test_recompute.py tests/test_recompute_graphs.py -k freed",
    ),
    Mutant(
        "a gated MLP writes its output again without dropout",
        "ckpt_kernels/ops/linear_blocks.py",
        "return gradients, None if product is None else «dropped(product)»",
        "product",
        _DROPPED.format("reference and gated"),
    ),
    Mutant(
        "a gated MLP's gradient goes past the mask",
        "ckpt_kernels/ops/linear_blocks.py",
        "glu.gradient(«dropped(grad)»,",
        "grad",
        _DROPPED.format("reference and gated"),
    ),
    Mutant(
        "the last product of an MLP runs again, though nothing needs it",
        "ckpt_kernels/ops/linear.py",
        "operands = products_of(input, firsts, ctx.dtype)\n        inner_needs",
        "operands = products_of(input, firsts, ctx.dtype)\n"
        "        product_of(ctx.block.forward(operands)[0], weight, None, ctx.dtype)\n        inner_needs",
        "tests/test_linear.py -k one_product_less",
    ),
    Mutant(
        "an MLP drops out in eval",
        "ckpt_kernels/nn/mlp.py",
        "last.bias,\n            activation=self.activation,\n            dropout_p=self.dropout,\n"
        "            training=«self.training»",
        "True",
        "tests/test_linear.py -k test_modules",
    ),
    Mutant(
        "a fused call passes over what is called before its parts",
        "ckpt_kernels/nn/by_parts.py",
        'held["_forward_hooks"] or «held["_forward_pre_hooks"]»',
        "False",
        "tests/test_linear_parts.py -k 'computed_before or dropout_between'",
    ),
    Mutant(
        "a trace records what saved-tensor hooks do",
        "ckpt_kernels/recompute/contexts.py",
        "is_recorded = torch.compiler.is_compiling() or «torch._C._get_tracing_state() is not None»",
        "False",
        "tests/test_transforms_modules.py -k 'convolutions_each_time and output'",
    ),
    Mutant(
        "dropout in eval",
        "ckpt_kernels/functional/checks.py",
        "p = p if training else 0.0",
        "p = p",
        "tests/test_row_norm.py tests/test_bias_act.py -k 'zero_and_one and reference'",
    ),
    Mutant(
        "eps of an RMSNorm in float64 is float32's",
        "ckpt_kernels/functional/checks.py",
        "torch.finfo(«torch.float64 if wide else torch.float32»).eps",
        "torch.float32",
        "tests/test_row_norm.py -k eps_none",
    ),
    Mutant(
        "a scale may be of other samples",
        "ckpt_kernels/functional/checks.py",
        "!= shape or «samples != lead[: len(samples)]»",
        "False",
        _BAD,
    ),
    Mutant(
        "a scale may have other columns",
        "ckpt_kernels/functional/checks.py",
        "if «tuple(tensor.shape[-len(shape) :]) != shape» or samples",
        "False",
        _BAD,
    ),
    Mutant(
        "a shift may be anywhere",
        "ckpt_kernels/functional/modulated_row_norm.py",
        'check_modulation(shift, "shift", input, normalized_shape)',
        "pass",
        _BAD,
    ),
    Mutant(
        "scale and shift may be of different samples",
        "ckpt_kernels/functional/modulated_row_norm.py",
        "scale.numel() != shift.numel()",
        "False",
        _BAD,
    ),
    Mutant(
        "a modulated norm's weight may have any shape",
        "ckpt_kernels/functional/modulated_row_norm.py",
        'that of scale, {shape_of(scale)}")\n    «check_coefficient(weight, "weight", input, normalized_shape)»',
        "pass",
        _BAD,
    ),
    Mutant(
        "a scale's gradient alone lacks the bias's part",
        "ckpt_kernels/ops/row_norm.py",
        "need_offset = «wanted.scale or »wanted.shift",
        "",
        "tests/test_contract_memory.py -k each_gradient_alone",
    ),
    Mutant(
        "a gate's gradient alone is not computed where the gate comes first",
        "ckpt_kernels/ops/row_norm.py",
        "both = options.gate_first and («wanted.input or wanted.gate»)",
        "wanted.input",
        "tests/test_contract_memory.py -k each_gradient_alone",
    ),
    Mutant(
        "the last, shorter piece counts whole, in the reference",
        "ckpt_kernels/backends/reference/channel_norm.py",
        "counts[-1] = «size - (pieces - 1) * piece_rows»",
        "piece_rows",
        "tests/test_channel_norm.py -k 'every_shape and reference and 131'",
    ),
)

MUTANTS = (*PYTHON, *TRITON, *NATIVE, *CUDA, *ROTARY)

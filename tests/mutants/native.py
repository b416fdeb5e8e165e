"""Faults in the C++ of the CPU."""

from .mutant import Mutant
from .selections import DROPPED, EDGES, MASKS, STORED

_OPERAND = "csrc/cpu/row_norm_operand.h"
_BACKWARD = "csrc/cpu/row_norm_backward_rows.h"
NATIVE = (
    Mutant(
        "bias_act writes its output again without the dropout factor",
        "csrc/cpu/bias_act_rows.h",
        "factor ? y * load(factor + j, lanes) : y",
        "y",
        DROPPED.format("native and mlp"),
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
        "store(output + j, «factor * w», lanes)",
        "w",
        DROPPED.format("native and gated"),
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
        MASKS.format("native"),
    ),
    Mutant(
        "the sum with the residual is normalised before it is rounded",
        _OPERAND,
        "load(residual + j, lanes) + load(z + j, lanes);\n          sum.put(j0 + j, total, lanes);\n"
        "          store(z + j, «round_to<S, T>(total)», Full<S>{});",
        "total",
        STORED.format("native"),
    ),
    Mutant(
        "of three rows beyond the tiles of four, one counts twice",
        _BACKWARD,
        "r.sum_h = r.sum_h_x_hat = 0;\n      if («i < live»)",
        "i < live || live == 3",
        EDGES.format("native and 7x1x16"),
    ),
    Mutant(
        "a norm that is not centred loses the gradient's mean",
        _BACKWARD,
        "a.centered ? S(r.sum_h / double(a.columns)) : S(0)",
        "S(r.sum_h / double(a.columns))",
        EDGES.format("native and rms_norm and 7x1x16"),
    ),
    Mutant(
        "the gradient of the sum is streamed though it is read again",
        _BACKWARD,
        "if (a.grad_residual) «grad_input.streams = false;»",
        ";",
        MASKS.format("native"),
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
        EDGES.format("native and layer_norm and 1009"),
    ),
    Mutant(
        "a long row's last piece begins where the row does",
        "csrc/cpu/row_tasks.h",
        "Part{row, row + 1, «i % pieces * piece», last",
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
    Mutant(
        "a tile of a map goes on in the next sample",
        "csrc/cpu/map_norm.cpp",
        "if (end > sample_end) «end = sample_end;»",
        "{}",
        "tests/test_map_norm.py -k 'of_rows and native and float32'",
    ),
    Mutant(
        "along planes a layer norm is an RMS norm",
        "csrc/cpu/map_norm_rows.h",
        "if (means) «d = d - load(means + j, lanes);»",
        "{}",
        "tests/test_map_norm.py -k 'of_rows and native and float32'",
    ),
)

"""Faults in the Triton kernels."""

from .mutant import Mutant
from .selections import DROPPED, EDGES, MASKS, STORED

_TILES = "ckpt_kernels/backends/triton/row_norm_tiles.py"
_HEADS = "ckpt_kernels/backends/triton/rotary_tiles.py"
TRITON = (
    Mutant(
        "bias_act writes its output again without the dropout factor, in Triton",
        "ckpt_kernels/backends/triton/bias_act.py",
        "result = result * factor\n        if y.data is not None:",
        "result = result\n        if y.data is not None:",
        DROPPED.format("triton and mlp"),
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
        EDGES.format("triton and dyt and 7x1x16"),
    ),
    Mutant(
        "glu writes its output again without the gate, in Triton",
        "ckpt_kernels/backends/triton/glu.py",
        "mask, factor * v)",
        "mask, v)",
        DROPPED.format("triton and gated"),
    ),
    Mutant(
        "the backward pass takes the mask of the first columns for all, in Triton",
        _TILES,
        "du = du * dropout_factor(norm.dropout, row, «start», ROWS",
        "0",
        MASKS.format("triton"),
    ),
    Mutant(
        "the sum with the residual is normalised before it is rounded, in Triton",
        _TILES,
        "load(norm.residual, row, column, mask) + x)«.to(RESIDUAL_OUT.dtype.element_ty)»",
        "",
        STORED.format("triton"),
    ),
    Mutant(
        "an activation is seen by the statistics where there is no element, in Triton",
        _TILES,
        "u = «tl.where(mask, activate(u, chosen.pre_activation), 0.0)»",
        "activate(u, chosen.pre_activation)",
        "tests/test_contract_numbers.py -k 'every_activation and triton-float32-sigmoid'",
    ),
    Mutant(
        "hardswish slopes at -3, in Triton",
        "ckpt_kernels/backends/triton/piecewise.py",
        "tl.where(x <= -3.0, 0.0,",
        "tl.where(x < -3.0, 0.0,",
        "tests/test_activations.py -k 'whole_range and hardswish and triton'",
    ),
    Mutant(
        "a piece of rows goes on into the next sample, in Triton",
        "ckpt_kernels/backends/triton/channel_norm_tiles.py",
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

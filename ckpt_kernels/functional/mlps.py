"""MLPs: one or two products of the input, a block that reads them, and a product of the block's output.

Each function takes `recompute`, the level of `functional.linear`, and `tiles`, the number of parts in which rows are
processed.
"""

import math

import torch
from torch import Tensor

from .. import ops, thin
from ..activations import Activation, activation_name
from ..arguments import count_or_none, untraced
from .checks import check_tensor, dropout_seed, shape_of
from .linear import check_linear, dtypes_of, last_dimension, level_name


def mlp(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    activation: Activation = "gelu",
    dropout_p: float = 0.0,
    training: bool = True,
    recompute: str = "output",
    tiles: int | None = None,
) -> Tensor:
    r"""Linear, activation, dropout, linear.

    .. math::
        y = \mathrm{dropout}(\mathrm{act}(x W_1^\top + b_1))\, W_2^\top + b_2

    Args:
        input: x, `(*, in)`; float32, bfloat16, float16 or float64.
        weight1: `(hidden, in)`, of the input's dtype.
        bias1: `(hidden)`, of the input's dtype, or None.
        weight2: `(out, hidden)`, of the input's dtype.
        bias2: `(out)`, of the input's dtype, or None.
        activation: act.
        dropout_p: the probability of dropping an element between the products.
        training: False switches dropout off.
        recompute: "block", "output" or "all".
        tiles: the number of parts in which rows are processed; None means one, or the number given to `convert`. In
            both passes the tensors between the products exist for one part at a time, and each part draws its own
            dropout. The gradients of weights are summed over the parts in float32 for 16-bit types, else in their own.

    Returns:
        `(*, out)`, of the input's dtype.

    Kept for backward:
        The input; at "output" and "block" also the first product, `(*, hidden)`; at "block" also the input of the
        second product, `(*, hidden)`.

    Raises:
        RuntimeError: a shape, dtype or device is not as described above.
        ValueError: the activation or level is unknown; `dropout_p` is outside [0, 1]; `tiles` is not positive, or is
            more than 1 at "block", where the tensors between the products are kept whole.
        TypeError: an argument is not of the expected type.

    Example:
        >>> x, w1, w2 = (torch.randn(shape, requires_grad=True) for shape in [(8, 16), (64, 16), (16, 64)])
        >>> y = F.mlp(x, w1, None, w2, None)
        >>> torch.allclose(y, torch.nn.functional.gelu(x @ w1.T) @ w2.T, atol=1e-4)
        True
        >>> for level in ("block", "output", "all"):
        ...     kept = saved_bytes(lambda: F.mlp(x, w1, None, w2, None, recompute=level))
        ...     print(level, (kept - w1.nbytes - w2.nbytes) / x.nbytes)
        block 9.0
        output 5.0
        all 1.0

    Source:
        Vaswani et al., "Attention Is All You Need", 2017; the levels: Chen et al., "Training Deep Nets with Sublinear
        Memory Cost", 2016, at the grain of kernels.
    """
    tensors = (input, weight1, bias1, weight2, bias2)
    call = "mlp", tensors, (activation, dropout_p, training, recompute)
    count = tiles_for(tiles, recompute)
    block = thin.plan_of(*call) if count == 1 else None
    if block is not None:
        return ops.linear.linear_block_linear(block, input, (weight1, bias1), weight2, bias2, recompute)
    level_name(recompute)
    check_tensor(input, "input", nested=True)
    check_linear(weight1, bias1, "weight1", "bias1", last_dimension(input), input)
    check_linear(weight2, bias2, "weight2", "bias2", weight1.shape[0], input)
    p, seeds = _seeds(input, count, dropout_p, training)
    name = activation_name(activation)
    blocks = [ops.linear_blocks.act_block(name, seed, p) for seed in seeds]
    if count > 1:
        return ops.tiles.tiled_mlp(blocks, input, (weight1, bias1), weight2, bias2, recompute)
    thin.remember(thin.linear.act_block(dtypes_of(*tensors), name, p), *call)
    return ops.linear.linear_block_linear(blocks[0], input, (weight1, bias1), weight2, bias2, recompute)


def gated_mlp(
    input: Tensor,
    gate_weight: Tensor,
    value_weight: Tensor | None,
    weight: Tensor,
    gate_bias: Tensor | None = None,
    value_bias: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    activation: Activation = "silu",
    layout: str = "gate_first",
    dropout_p: float = 0.0,
    training: bool = True,
    recompute: str = "output",
    tiles: int | None = None,
) -> Tensor:
    r"""Two products of the input, one of which gates the other, dropout, and a third product.

    .. math::
        y = \mathrm{dropout}(\mathrm{act}(x W_g^\top + b_g) \odot (x W_v^\top + b_v))\, W^\top + b

    Args:
        input: x, `(*, in)`; float32, bfloat16, float16 or float64.
        gate_weight: W_g, `(hidden, in)`, of the input's dtype; if `value_weight` is None, both weights packed,
            `(2 * hidden, in)`.
        value_weight: W_v, `(hidden, in)`, of the input's dtype, or None.
        weight: W, `(out, hidden)`, of the input's dtype.
        gate_bias: b_g, `(hidden)`, or both biases packed, `(2 * hidden)`; or None.
        value_bias: b_v, `(hidden)`, or None.
        bias: b, `(out)`, or None.
        activation: act, applied to the gate.
        layout: how gate and value are packed: "gate_first", "value_first" or "interleaved"; see `packed_glu`.
        dropout_p: the probability of dropping an element of the last product's input.
        training: False switches dropout off.
        recompute: "block", "output" or "all".
        tiles: the number of parts in which rows are processed; see `mlp`.

    Returns:
        `(*, out)`, of the input's dtype.

    Kept for backward:
        The input; at "output" and "block" also gate and value, each `(*, hidden)`; at "block" also the input of the
        last product, `(*, hidden)`.

    Raises:
        RuntimeError: a shape, dtype or device is not as described above.
        ValueError: the activation, layout or level is unknown; `dropout_p` is outside [0, 1]; `value_bias` is given
            and `value_weight` is None; or `tiles` is not positive, or is more than 1 at "block", where the tensors
            between the products are kept whole.
        TypeError: an argument is not of the expected type.

    Example:
        >>> x, gate, up, down = (torch.randn(s, requires_grad=True) for s in [(8, 16), (64, 16), (64, 16), (16, 64)])
        >>> y = F.gated_mlp(x, gate, up, down)
        >>> torch.allclose(y, (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T, atol=1e-3)
        True
        >>> for level in ("block", "output", "all"):
        ...     kept = saved_bytes(lambda: F.gated_mlp(x, gate, up, down, recompute=level))
        ...     print(level, (kept - 3 * gate.nbytes) / x.nbytes)
        block 13.0
        output 9.0
        all 1.0

    Source:
        Shazeer, "GLU Variants Improve Transformer", 2020; the levels: Chen et al., "Training Deep Nets with Sublinear
        Memory Cost", 2016, at the grain of kernels.
    """
    tensors = (input, gate_weight, value_weight, weight, gate_bias, value_bias, bias)
    call = "gated_mlp", tensors, (activation, layout, dropout_p, training, recompute)
    count = tiles_for(tiles, recompute)
    block = thin.plan_of(*call) if count == 1 else None
    firsts: tuple[Tensor | None, ...] = (gate_weight, gate_bias)
    if block is not None:
        firsts = firsts if value_weight is None else (*firsts, value_weight, value_bias)
        return ops.linear.linear_block_linear(block, input, firsts, weight, bias, recompute)
    level_name(recompute)
    ops.glu.layout_name(layout)
    check_tensor(input, "input", nested=True)
    check_linear(gate_weight, gate_bias, "gate_weight", "gate_bias", last_dimension(input), input)
    hidden = gate_weight.shape[0]
    if value_weight is not None:
        check_linear(value_weight, value_bias, "value_weight", "value_bias", last_dimension(input), input)
        firsts += (value_weight, value_bias)
        if value_weight.shape != gate_weight.shape:
            raise RuntimeError(
                f"value_weight has shape {shape_of(value_weight)}; expected gate_weight's, {shape_of(gate_weight)}"
            )
    elif value_bias is not None:
        raise ValueError("value_bias is given; expected None where value_weight is")
    elif hidden % 2:
        raise RuntimeError(f"gate_weight has shape {shape_of(gate_weight)}; expected an even first dimension")
    else:
        hidden //= 2
    check_linear(weight, bias, "weight", "bias", hidden, input)
    p, seeds = _seeds(input, count, dropout_p, training)
    name, packed = activation_name(activation), value_weight is None
    blocks = [ops.linear_blocks.glu_block(name, layout, seed, p) for seed in seeds]
    if count > 1:
        return ops.tiles.tiled_mlp(blocks, input, firsts, weight, bias, recompute)
    thin.remember(thin.linear.glu_block(dtypes_of(*tensors), name, layout, p, packed), *call)
    return ops.linear.linear_block_linear(blocks[0], input, firsts, weight, bias, recompute)


# A linear layer's weight and bias.
Layer = tuple[Tensor, Tensor | None]


def known_mlp(input: Tensor, first: Layer, last: Layer, activation: str, p: float, recompute: str) -> Tensor | None:
    """The output of `mlp` without checks, if a like call has passed them before; else None."""
    if tiles_for(None, recompute) != 1:
        return None
    block = thin.plan_of("mlp", (input, *first, *last), (activation, p, True, recompute))
    return None if block is None else ops.linear.linear_block_linear(block, input, first, *last, recompute)


def known_gated_mlp(
    input: Tensor, gate: Layer, value: Layer, last: Layer, activation: str, p: float, recompute: str
) -> Tensor | None:
    """As `known_mlp`, for `gated_mlp`."""
    if tiles_for(None, recompute) != 1:
        return None
    tensors = (input, gate[0], value[0], last[0], gate[1], value[1], last[1])
    block = thin.plan_of("gated_mlp", tensors, (activation, "gate_first", p, True, recompute))
    return None if block is None else ops.linear.linear_block_linear(block, input, (*gate, *value), *last, recompute)


def tiles_for(tiles: int | None, recompute: str) -> int:
    """The number of tiles of a call: the argument, or if None, the context's number. At "block" it must be one."""
    is_block = isinstance(recompute, str) and recompute == "block"
    tiles = count_or_none(untraced(tiles), "tiles")
    if tiles is None:
        return 1 if is_block else ops.tiles.tiles_now()
    if tiles > 1 and is_block:
        raise ValueError(f"tiles is {tiles} and recompute is 'block'; expected a level that discards outputs")
    return tiles


def _seeds(input: Tensor, tiles: int, dropout_p: float, training: bool) -> tuple[float, list[Tensor | None]]:
    """The probability of dropout, and a seed for each tile. There are no more tiles than rows."""
    # For one tile the rows are not counted, because a compiler may not know their number. Compiled calls have one tile
    # anyway, and jagged tensors are processed as one.
    is_whole = tiles == 1 or input.is_nested or torch.compiler.is_compiling()
    count = 1 if is_whole else max(1, min(tiles, math.prod(input.shape[:-1])))
    drawn = [dropout_seed(input, dropout_p, training) for _ in range(count)]
    return drawn[0][0], [seed for _, seed in drawn]

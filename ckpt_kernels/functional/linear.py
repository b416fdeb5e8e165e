"""Blocks and the linear layers that read them, MLPs among them.

Each takes `recompute`, which says how far the backward pass goes back:

- "block" keeps what the composition of the blocks and of F.linear keeps.
- "output" (the default) lets go of the output of the block that a linear layer reads; the block's gradient kernel
  writes it again in the pass that it makes anyway.
- "all" lets go of the products before the block too, and runs these again, but never the last one. Where there is none
  before the block, it is the same as "output".

Weights may be frozen: one that wants no gradient costs neither a product nor a kept tensor. Under autocast the products
are computed as those of F.linear; what is kept is the operand itself, not the copy that was cast. Gradients of
gradients, and torch.compile, go through the composition.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops, thin
from ..activations import Activation, activation_name
from ..levels import OF_FUNCTIONS
from .checks import (
    autocast,
    check_coefficient,
    check_device,
    check_input,
    check_tensor,
    dropout_seed,
    number,
    rms_eps,
    shape_of,
)

NORMS = ("layer_norm", "rms_norm")


def norm_linear(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor | Sequence[Tensor],
    bias: Tensor | Sequence[Tensor | None] | None = None,
    eps: float | None = None,
    *,
    norm: str = "layer_norm",
    activation: Activation = "identity",
    pre_activation: Activation = "identity",
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
    recompute: str = "output",
) -> Tensor | tuple[Tensor, ...]:
    r"""A norm, an activation, and one linear layer that reads the result, or several.

    .. math::
        y_i = \mathrm{act}(\mathrm{norm}(\mathrm{pre}(x)))\, W_i^\top + b_i

    Args:
        input: x, `(*, in)`; float32, bfloat16, float16 or float64.
        normalized_shape: `in`; one dimension.
        norm_weight: `(in)`, or None.
        norm_bias: `(in)`, or None; None for "rms_norm".
        weight: W, `(out, in)`, of the input's dtype; or a sequence of such, whose `out` may differ.
        bias: b, `(out)`, of the input's dtype; or one, or None, for each weight.
        eps: of the norm; None is 1e-5 for "layer_norm" and the default of `rms_norm` for "rms_norm".
        norm: "layer_norm" or "rms_norm".
        activation: act, applied to the normalised value.
        pre_activation: pre, applied to the input.
        weight_offset: of "rms_norm"; see `rms_norm`.
        cast_before_weight: of "rms_norm"; see `rms_norm`.
        recompute: "block", "output" or "all", which is the same as "output" here.

    Returns:
        `(*, out)`, of the input's dtype; a tuple of such where `weight` is a sequence.

    Kept for backward:
        The input and one or two numbers a row; at "block" also what the linear layers read, `(*, in)`.

    Raises:
        RuntimeError: a tensor has another shape, dtype or device than said above.
        ValueError: an activation, the norm or the level is unknown; or an argument is given that the norm does not
            have.
        TypeError: an argument is no tensor, or no number.

    Example:
        >>> x, weight = torch.randn(8, 64, requires_grad=True), torch.randn(32, 64, requires_grad=True)
        >>> y = F.norm_linear(x, 64, None, None, weight, norm="rms_norm")
        >>> torch.allclose(y, torch.nn.functional.rms_norm(x, (64,)) @ weight.T, atol=1e-4)
        True
        >>> saved_bytes(lambda: F.norm_linear(x, 64, None, None, weight, norm="rms_norm")) == (
        ...     x.nbytes + 4 * 8 + weight.nbytes
        ... )
        True

    Source:
        The levels: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, at the grain of kernels.
    """
    single = isinstance(weight, Tensor)
    weights, biases = _as_sequences(weight, bias)
    tensors = (input, norm_weight, norm_bias, *weights, *biases)
    given = (normalized_shape, eps, norm, activation, pre_activation, weight_offset, cast_before_weight, recompute)
    block = thin.plan_of("norm_linear", tensors, (single, len(weights), given))
    if block is not None:
        outputs = _block_linear(block, tensors[:3], weights, biases, recompute)
        return outputs[0] if single else outputs
    level_name(recompute)
    columns = check_input(input, normalized_shape)
    check_coefficient(norm_weight, "norm_weight", input, normalized_shape)
    check_coefficient(norm_bias, "norm_bias", input, normalized_shape)
    centered = norm_name(norm) == "layer_norm"
    if columns != input.shape[-1]:
        raise RuntimeError(f"normalized_shape is {normalized_shape}; expected one dimension")
    if not centered and norm_bias is not None:
        raise ValueError("norm_bias is given; expected None where norm is 'rms_norm'")
    if centered and (weight_offset or cast_before_weight):
        raise ValueError("weight_offset or cast_before_weight is given; expected neither where norm is 'layer_norm'")
    pre, post = activation_name(pre_activation, "pre_activation"), activation_name(activation)
    eps = (1e-5 if eps is None else number(eps, "eps")) if centered else rms_eps(input, eps)
    for w, b in zip(weights, biases, strict=True):
        check_linear(w, b, "weight", "bias", columns, input)
    options = (columns, eps, centered, pre, post, number(weight_offset, "weight_offset"), bool(cast_before_weight))
    block = ops.linear_blocks.norm_block(*options)
    known = thin.linear.norm_block(_dtypes(input, *weights, *biases), input, (norm_weight, norm_bias), options)
    thin.remember(known, "norm_linear", tensors, (single, len(weights), given))
    operands = autocast(input, norm_weight, norm_bias)
    outputs = _block_linear(block, operands, weights, biases, recompute)
    return outputs[0] if single else outputs


def _as_sequences(
    weight: Tensor | Sequence[Tensor], bias: Tensor | Sequence[Tensor | None] | None
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    single = isinstance(weight, Tensor)
    if not single and not isinstance(weight, Sequence):
        raise TypeError(f"weight is {weight!r}; expected a tensor or a sequence of them")
    weights: tuple[Tensor, ...] = (weight,) if isinstance(weight, Tensor) else tuple(weight)
    biases: tuple[Any, ...] = (bias,) * len(weights) if single or bias is None else tuple(bias)
    if len(biases) != len(weights):
        raise ValueError(f"bias has {len(biases)} tensors; expected one for each of {len(weights)} weights")
    return weights, biases


def act_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation = "gelu",
    dropout_p: float = 0.0,
    training: bool = True,
    recompute: str = "output",
) -> Tensor:
    r"""An activation, dropout, and the linear layer that reads the result.

    .. math::
        y = \mathrm{dropout}(\mathrm{act}(x))\, W^\top + b

    Args:
        input: x, `(*, in)`; float32, bfloat16, float16 or float64.
        weight: W, `(out, in)`, of the input's dtype.
        bias: b, `(out)`, of the input's dtype, or None.
        activation: act.
        dropout_p: the probability with which an element of act(x) is dropped.
        training: False switches dropout off.
        recompute: "block", "output" or "all", which is the same as "output" here.

    Returns:
        `(*, out)`, of the input's dtype.

    Kept for backward:
        The input, and no dropout mask; at "block" also what the linear layer reads, `(*, in)`.

    Raises:
        RuntimeError: a tensor has another shape, dtype or device than said above.
        ValueError: activation or level are unknown, or `dropout_p` is outside [0, 1].
        TypeError: an argument is no tensor, or no number.

    Example:
        >>> x, weight = torch.randn(8, 64), torch.randn(32, 64)
        >>> y = F.act_linear(x, weight, activation="gelu")
        >>> torch.allclose(y, torch.nn.functional.gelu(x) @ weight.T, atol=1e-4)
        True

    Source:
        The levels: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, at the grain of kernels.
    """
    call = "act_linear", (input, weight, bias), (activation, dropout_p, training, recompute)
    block = thin.plan_of(*call)
    if block is not None:
        return _block_linear(block, (input,), (weight,), (bias,), recompute)[0]
    level_name(recompute)
    check_tensor(input, "input", nested=True)
    check_linear(weight, bias, "weight", "bias", _last(input), input)
    p, seed = dropout_seed(input, dropout_p, training)
    name = activation_name(activation)
    thin.remember(thin.linear.act_block(_dtypes(input, weight, bias), name, p), *call)
    block = ops.linear_blocks.act_block(name, seed, p)
    return _block_linear(block, (input,), (weight,), (bias,), recompute)[0]


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
        dropout_p: the probability with which an element between the products is dropped.
        training: False switches dropout off.
        recompute: "block", "output" or "all".
        tiles: how many parts the rows are taken in; None is one, or what `convert` was given. What is between the
            products is there for one part at a time, in both passes, and each part draws a dropout of its own. The
            gradients of weights are added up in float32.

    Returns:
        `(*, out)`, of the input's dtype.

    Kept for backward:
        The input; but for "all" the first product, `(*, hidden)`; at "block" what the second product reads too,
        `(*, hidden)`.

    Raises:
        RuntimeError: a tensor has another shape, dtype or device than said above.
        ValueError: activation or level are unknown; `dropout_p` is outside [0, 1]; `tiles` is no positive number, or is
            given at "block", where what is between the products is kept whole.
        TypeError: an argument is no tensor, or no number.

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
    check_linear(weight1, bias1, "weight1", "bias1", _last(input), input)
    check_linear(weight2, bias2, "weight2", "bias2", weight1.shape[0], input)
    p, seed = dropout_seed(input, dropout_p, training)
    name = activation_name(activation)
    if count > 1:
        seeds = [seed, *(dropout_seed(input, dropout_p, training)[1] for _ in range(count - 1))]
        blocks = [ops.linear_blocks.act_block(name, each, p) for each in seeds]
        return ops.tiles.tiled_mlp(blocks, input, (weight1, bias1), weight2, bias2, recompute)
    thin.remember(thin.linear.act_block(_dtypes(*tensors), name, p), *call)
    block = ops.linear_blocks.act_block(name, seed, p)
    return ops.linear.linear_block_linear(block, input, (weight1, bias1), weight2, bias2, recompute)


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
        gate_weight: W_g, `(hidden, in)`, of the input's dtype; where `value_weight` is None `(2 * hidden, in)`, and
            packs both.
        value_weight: W_v, `(hidden, in)`, of the input's dtype, or None.
        weight: W, `(out, hidden)`, of the input's dtype.
        gate_bias: b_g, `(hidden)`, or `(2 * hidden)` where both are packed; or None.
        value_bias: b_v, `(hidden)`, or None.
        bias: b, `(out)`, or None.
        activation: act, applied to the gate.
        layout: how gate and value are packed: "gate_first", "value_first" or "interleaved"; see `packed_glu`.
        dropout_p: the probability with which an element that the last product reads is dropped.
        training: False switches dropout off.
        recompute: "block", "output" or "all".
        tiles: how many parts the rows are taken in; None is one, or what `convert` was given. What is between the
            products is there for one part at a time, in both passes, and each part draws a dropout of its own. The
            gradients of weights are added up in float32.

    Returns:
        `(*, out)`, of the input's dtype.

    Kept for backward:
        The input; but for "all" gate and value, 2 `(*, hidden)`; at "block" what the last product reads too, `(*,
        hidden)`.

    Raises:
        RuntimeError: a tensor has another shape, dtype or device than said above.
        ValueError: activation, layout or level are unknown; `dropout_p` is outside [0, 1]; `value_bias` is given
            where `value_weight` is None; or `tiles` is no positive number, or is given at "block", where what is
            between the products is kept whole.
        TypeError: an argument is no tensor, or no number.

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
    check_linear(gate_weight, gate_bias, "gate_weight", "gate_bias", _last(input), input)
    hidden = gate_weight.shape[0]
    if value_weight is not None:
        check_linear(value_weight, value_bias, "value_weight", "value_bias", _last(input), input)
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
    p, seed = dropout_seed(input, dropout_p, training)
    name, packed = activation_name(activation), value_weight is None
    if count > 1:
        seeds = [seed, *(dropout_seed(input, dropout_p, training)[1] for _ in range(count - 1))]
        blocks = [ops.linear_blocks.glu_block(name, layout, each, p) for each in seeds]
        return ops.tiles.tiled_mlp(blocks, input, firsts, weight, bias, recompute)
    thin.remember(thin.linear.glu_block(_dtypes(*tensors), name, layout, p, packed), *call)
    block = ops.linear_blocks.glu_block(name, layout, seed, p)
    return ops.linear.linear_block_linear(block, input, firsts, weight, bias, recompute)


def level_name(recompute: str) -> str:
    """`recompute`, if it is one of `OF_FUNCTIONS`; else ValueError."""
    if recompute not in OF_FUNCTIONS:
        raise ValueError(f"recompute is {recompute!r}; expected one of {', '.join(OF_FUNCTIONS)}")
    return recompute


def tiles_for(tiles: int | None, recompute: str) -> int:
    """How many tiles a call takes, which at "block" has to be one: told, or from the context."""
    if tiles is None:
        return 1 if recompute == "block" else ops.tiles.tiles_now()
    if not isinstance(tiles, int) or tiles < 1:
        raise ValueError(f"tiles is {tiles!r}; expected a positive whole number, or None")
    if tiles > 1 and recompute == "block":
        raise ValueError(f"tiles is {tiles} and recompute is 'block'; expected recompute 'output' or 'all'")
    return tiles


def norm_name(norm: str) -> str:
    """`norm`, if it is one of `NORMS`; else ValueError."""
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}; expected one of {', '.join(NORMS)}")
    return norm


def _block_linear(
    block: ops.linear_blocks.Block,
    operands: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    recompute: str,
) -> tuple[Tensor, ...]:
    compute = ops.linear.composed_linear if recompute == "block" else ops.linear.block_linear
    return compute(block, operands, weights, biases)


def _dtypes(*tensors: Tensor | None) -> set[torch.dtype]:
    return {t.dtype for t in tensors if t is not None}


def _last(input: Tensor) -> int:
    if input.dim() == 0:
        raise RuntimeError("input has shape (); expected at least one dimension")
    return input.shape[-1]


def check_linear(
    weight: Tensor, bias: Tensor | None, weight_name: str, bias_name: str, columns: int, input: Tensor
) -> None:
    _check_operand(weight, weight_name, input)
    if weight.dim() != 2 or weight.shape[1] != columns:
        raise RuntimeError(f"{weight_name} has shape {shape_of(weight)}; expected (out, {columns})")
    if bias is None:
        return
    _check_operand(bias, bias_name, input)
    if shape_of(bias) != shape_of(weight)[:1]:
        raise RuntimeError(f"{bias_name} has shape {shape_of(bias)}; expected {shape_of(weight)[:1]}")


def _check_operand(tensor: Tensor, argument: str, input: Tensor) -> None:
    check_tensor(tensor, argument)
    check_device(tensor, argument, input)
    if tensor.dtype != input.dtype and not ops.operands.is_autocast(input):
        raise RuntimeError(f"{argument} has dtype {tensor.dtype}; expected the input's, {input.dtype}")

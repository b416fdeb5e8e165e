"""Blocks fused with the linear layers that read them; `mlps` has the MLPs.

Each function takes `recompute`, the tensors that the backward pass recomputes:

- "block" keeps the same tensors as the composition of the blocks and F.linear.
- "output" (the default) discards the output of the block that a linear layer reads. The block's gradient kernel
  recomputes this output in a pass that the kernel makes anyway.
- "all" also discards the products before the block, and runs them again, but never the last product. Without a product
  before the block, "all" is the same as "output".

Weights may be frozen: a weight that requires no gradient costs neither a product nor a kept tensor. Under autocast the
products are computed as those of F.linear, and the operand itself is kept, not the cast copy. Gradients of gradients,
and torch.compile, use the composition.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops, thin
from ..activations import Activation, activation_name
from ..arguments import flag, number, one_of
from ..autocast import is_autocast
from ..levels import OF_FUNCTIONS
from .checks import (
    autocast,
    check_coefficient,
    check_device,
    check_input,
    check_tensor,
    dropout_seed,
    normalized,
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
        weight: W, `(out, in)`, of the input's dtype; or a sequence of such weights, whose `out` may differ.
        bias: b, `(out)`, of the input's dtype, or None; for several weights None or a sequence of biases and None.
        eps: the epsilon of the norm; None means 1e-5 for "layer_norm" and the default of `rms_norm` for "rms_norm".
        norm: "layer_norm" or "rms_norm".
        activation: act, applied to the normalised value.
        pre_activation: pre, applied to the input.
        weight_offset: for "rms_norm" only; see `rms_norm`.
        cast_before_weight: for "rms_norm" only; see `rms_norm`.
        recompute: "block", "output" or "all", which is the same as "output" here.

    Returns:
        `(*, out)`, of the input's dtype; a tuple of such tensors if `weight` is a sequence.

    Kept for backward:
        The input and one or two numbers per row; at "block" also the input of the linear layers, `(*, in)`.

    Raises:
        RuntimeError: a shape, dtype or device is not as described above.
        ValueError: an activation, the norm or the level is unknown; or an argument is given that the norm does not
            take.
        TypeError: an argument is not of the expected type.

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
        outputs = of_plan(recompute)(block, tensors[:3], weights, biases)
        return outputs[0] if single else outputs
    level_name(recompute)
    columns = check_input(input, normalized_shape)
    check_coefficient(norm_weight, "norm_weight", input, normalized_shape)
    check_coefficient(norm_bias, "norm_bias", input, normalized_shape)
    centered = norm_name(norm) == "layer_norm"
    if len(normalized(normalized_shape)) != 1:
        raise RuntimeError(f"normalized_shape is {normalized_shape}; expected one dimension")
    if not centered and norm_bias is not None:
        raise ValueError("norm_bias is given; expected None where norm is 'rms_norm'")
    offset, cast = number(weight_offset, "weight_offset"), flag(cast_before_weight, "cast_before_weight")
    if centered and (offset or cast):
        raise ValueError("weight_offset or cast_before_weight is given; expected neither where norm is 'layer_norm'")
    pre, post = activation_name(pre_activation, "pre_activation"), activation_name(activation)
    eps = (1e-5 if eps is None else number(eps, "eps")) if centered else rms_eps(input, eps)
    for w, b in zip(weights, biases, strict=True):
        check_linear(w, b, "weight", "bias", input.shape[-1], input)
    options = (columns, eps, centered, pre, post, offset, cast)
    block = ops.linear_blocks.norm_block(*options)
    known = thin.linear.norm_block(dtypes_of(input, *weights, *biases), input, (norm_weight, norm_bias), options)
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
    if not single and bias is not None and not isinstance(bias, Sequence):
        raise TypeError(f"bias is {type(bias).__name__}; expected a sequence, as weight is, or None")
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
        dropout_p: the probability of dropping an element of act(x).
        training: False switches dropout off.
        recompute: "block", "output" or "all", which is the same as "output" here.

    Returns:
        `(*, out)`, of the input's dtype.

    Kept for backward:
        The input, and no dropout mask; at "block" also the input of the linear layer, `(*, in)`.

    Raises:
        RuntimeError: a shape, dtype or device is not as described above.
        ValueError: the activation or level is unknown, or `dropout_p` is outside [0, 1].
        TypeError: an argument is not of the expected type.

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
        return of_plan(recompute)(block, (input,), (weight,), (bias,))[0]
    level_name(recompute)
    check_tensor(input, "input", nested=True)
    check_linear(weight, bias, "weight", "bias", last_dimension(input), input)
    p, seed = dropout_seed(input, dropout_p, training)
    name = activation_name(activation)
    thin.remember(thin.linear.act_block(dtypes_of(input, weight, bias), name, p), *call)
    block = ops.linear_blocks.act_block(name, seed, p)
    return _block_linear(block, (input,), (weight,), (bias,), recompute)[0]


def level_name(recompute: str) -> str:
    """Return `recompute` if it is one of `OF_FUNCTIONS`; else raise ValueError."""
    return one_of(recompute, OF_FUNCTIONS, "recompute")


def norm_name(norm: str) -> str:
    """Return `norm` if it is one of `NORMS`; else raise ValueError."""
    return one_of(norm, NORMS, "norm")


def _block_linear(
    block: ops.linear_blocks.Block,
    operands: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    recompute: str,
) -> tuple[Tensor, ...]:
    compute = ops.linear.composed_linear if recompute == "block" else ops.linear.block_linear
    return compute(block, operands, weights, biases)


def of_plan(recompute: str) -> Callable[..., tuple[Tensor, ...]]:
    """The op for a block with a plan. A plan is found only where nothing but autograd sees the ops."""
    is_fused = recompute != "block" and torch.is_grad_enabled()
    return ops.linear.fused_block_linear if is_fused else ops.linear.composed_linear


def dtypes_of(*tensors: Tensor | None) -> set[torch.dtype]:
    return {t.dtype for t in tensors if t is not None}


def last_dimension(input: Tensor) -> int:
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
    if tensor.dtype != input.dtype and not is_autocast(input):
        raise RuntimeError(f"{argument} has dtype {tensor.dtype}; expected the input's, {input.dtype}")

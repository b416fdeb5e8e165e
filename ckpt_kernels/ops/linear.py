"""Blocks and the linear layers that read them, with nothing kept in between but the block's input.

A Linear keeps what it reads for the gradient of its weight. Here that is a block's output, which the block's gradient
kernel writes again as it goes: it has the block's input in registers anyway, so that no pass over memory is added.
Matrix products are torch's. Weights are kept as they are given, never the copies that autocast casts, and one that
wants no gradient has none computed and nothing kept for it.

Where somebody must see the ops one by one (torch.compile, torch.func, tensor subclasses) the plain composition
computes the same.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import recompute
from . import bias_act, glu, row_norm
from .operands import is_autocast
from .pinned import pinned_function
from .registration import is_plain, is_transformed

# torch's own, whatever somebody puts in its place later: the backward passes here are those of that.
linear_of_torch = F.linear

# Products


def product_dtype(input: Tensor) -> torch.dtype:
    """What a Linear that reads `input` computes in here: autocast's type, or the input's own."""
    if is_autocast(input) and input.dtype != torch.float64:
        return torch.get_autocast_dtype(input.device.type)
    return input.dtype


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def product_of(input: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    operands = (input.to(dtype), weight.to(dtype), _cast(bias, dtype))
    if not is_autocast(input):
        return linear_of_torch(*operands)
    with torch.autocast(input.device.type, enabled=False):
        return linear_of_torch(*operands)


def _as_no_view(output: Tensor) -> Tensor:
    """The same memory, but no view: F.linear may return a view of a matrix, and what an autograd.Function returns may
    be written to in place only if it is none."""
    return output if output._base is None else torch.ops.aten._unsafe_view.default(output, output.shape)


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.flatten(0, -2) if tensor.dim() > 1 else tensor.unsqueeze(0)


def grad_input_of(grad: Tensor, weight: Tensor) -> Tensor:
    return (_matrix(grad) @ weight.to(grad.dtype)).reshape(*grad.shape[:-1], weight.shape[1])


def _grad_weight(grad: Tensor, input: Tensor, weight_dtype: torch.dtype) -> Tensor:
    return (_matrix(grad).t() @ _matrix(input).to(grad.dtype)).to(weight_dtype)


def _grad_bias(grad: Tensor, bias_dtype: torch.dtype) -> Tensor:
    return (grad.sum(tuple(range(grad.dim() - 1))) if grad.dim() > 1 else grad).to(bias_dtype)


class _Linear(torch.autograd.Function):
    """F.linear that keeps its operands themselves, not what autocast makes of them."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        wants_input, wants_weight = ctx.needs_input_grad[:2]
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.input_dtype, ctx.weight_dtype = input.dtype, weight.dtype
        ctx.save_for_backward(input if wants_weight else None, weight if wants_input else None)
        return _as_no_view(product_of(input, weight, bias, dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        input, weight = ctx.saved_tensors
        grad_input = grad_weight = grad_bias = None
        if weight is not None:
            grad_input = grad_input_of(grad, weight).to(ctx.input_dtype)
        if input is not None:
            grad_weight = _grad_weight(grad, input, ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = _grad_bias(grad, ctx.bias_dtype)
        return grad_input, grad_weight, grad_bias, None


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear. Under autocast, keeps input and weight as they are instead of cast copies of them."""
    if not is_autocast(input) or not is_fused(input, weight, bias):
        return linear_of_torch(input, weight, bias)
    return _Linear.apply(input, weight, bias, product_dtype(input))


def recomputed_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear. Within `discard_outputs` what reads its output keeps a recipe that runs the product again."""
    output = linear(input, weight, bias)
    if recompute.thread.active:
        product = functools.partial(product_of, dtype=product_dtype(input))
        recompute.record(output, (product, (input, weight, bias)))
    return output


# Blocks


class Block(NamedTuple):
    """A block between products, of some operands.

    `forward(operands)` gives the output and what else the gradient needs; `backward(grad_output, operands, rest,
    wanted, rewrite)` the operands' gradients and, if asked to rewrite it, the output; it may write over grad_output,
    so that no more stands in memory than in eager torch's backward pass. `composed(operands)` is the block
    as the op that autograd sees.
    """

    forward: Callable[[Sequence[Tensor | None]], tuple[Tensor, tuple[Tensor, ...]]]
    backward: Callable[..., tuple[list[Tensor | None], Tensor | None]]
    composed: Callable[[Sequence[Tensor | None]], Tensor]


def act_block(activation: str, seed: Tensor | None, dropout_p: float) -> Block:
    """Of (input,): dropout(activation(input))."""
    options = bias_act.Options(activation, dropout_p)

    def forward(operands: Sequence[Tensor | None]) -> tuple[Tensor, tuple[Tensor, ...]]:
        return bias_act.bias_act.forward(operands[0], None, seed, options)[0], ()

    def backward(grad: Tensor, operands: Sequence[Tensor | None], rest: tuple, wanted: Sequence[bool], rewrite: bool):
        grad_input, output = bias_act.gradient(grad, operands[0], seed, options, wanted[0], rewrite)
        return [grad_input], output

    return Block(forward, backward, lambda operands: bias_act.bias_act(operands[0], None, seed, options))


def glu_block(activation: str, layout: str, seed: Tensor | None, dropout_p: float) -> Block:
    """Of (gate, value), or of (packed,): dropout(activation(gate) * value)."""
    options, drop = glu.PackedOptions(activation, layout), bias_act.Options("identity", dropout_p)

    def dropped(product: Tensor) -> Tensor:
        return product if seed is None else bias_act.bias_act.forward(product, None, seed, drop)[0]

    def forward(operands: Sequence[Tensor | None]) -> tuple[Tensor, tuple[Tensor, ...]]:
        return dropped(glu.forward(operands, options)), ()

    def backward(grad: Tensor, operands: Sequence[Tensor | None], rest: tuple, wanted: Sequence[bool], rewrite: bool):
        gradients, product = glu.gradient(dropped(grad), operands, options, wanted, rewrite)
        return gradients, None if product is None else dropped(product)

    def composed(operands: Sequence[Tensor | None]) -> Tensor:
        if len(operands) == 2:
            product = glu.glu(*operands, glu.Options(activation))
        else:
            product = glu.packed_glu(*operands, options)
        return product if seed is None else bias_act.bias_act(product, None, seed, drop)

    return Block(forward, backward, composed)


def norm_block(*options: Any) -> Block:
    """Of (input, weight, bias): a row norm; options as of `RowNormOptions`."""
    options, op = row_norm.RowNormOptions(*options), row_norm.row_norm

    def forward(operands: Sequence[Tensor | None]) -> tuple[Tensor, tuple[Tensor, ...]]:
        output, _, *statistics = op.forward(*_norm_operands(*operands), options)
        return output, tuple(statistics)

    def backward(grad: Tensor, operands: Sequence[Tensor | None], rest: tuple, wanted: Sequence[bool], rewrite: bool):
        kept = row_norm.Kept(operands[0], None, None, None, *operands[1:], None, *rest)
        wanted = (wanted[0], *(False,) * 4, *wanted[1:])
        found, output = op.gradients_and_output((grad, None), kept, options, wanted, rewrite)
        return [found[0], *found[5:]], output

    return Block(forward, backward, lambda operands: op(*_norm_operands(*operands), options)[0])


def _norm_operands(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, ...]:
    """Those of the row-norm op: no residual, gate, scale, shift and seed."""
    return input, None, None, None, None, weight, bias, None


# A block, and the products that read it


@pinned_function
class _BlockLinear(torch.autograd.Function):
    """Products of a block's output, of which the block's operands are kept, and not the output."""

    @staticmethod
    def forward(ctx: Any, block: Block, count: int, dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        operands, weights, biases = _parted(tensors, count)
        output, rest = block.forward(operands)
        ctx.block, ctx.count, ctx.kinds = block, count, [None if t is None else t.dtype for t in tensors]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*operands, *weights, *rest)
        return tuple(_as_no_view(product_of(output, w, b, dtype)) for w, b in zip(weights, biases, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        needs = ctx.needs_input_grad[3:]
        first = len(needs) - 2 * ctx.count
        # Once: who unpacks may compute.
        saved = ctx.saved_tensors
        operands, weights, rest = saved[:first], saved[first : first + ctx.count], saved[first + ctx.count :]
        if by_composition(grads):
            found = through_composition(_composed(ctx.block), grads, operands, weights, needs, ctx.kinds)
        else:
            found = _block_linear_gradients(ctx.block, grads, operands, weights, rest, needs, ctx.kinds)
        return None, None, None, *found


def _parted(tensors: Sequence[Any], count: int) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    """The block's operands, the weights and the biases of `count` products."""
    first = len(tensors) - 2 * count
    return tensors[:first], tensors[first : first + count], tensors[first + count :]


def _block_linear_gradients(
    block: Block,
    grads: Sequence[Tensor | None],
    operands: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    rest: tuple[Tensor, ...],
    needs: Sequence[bool],
    kinds: Sequence[torch.dtype | None],
) -> list[Tensor | None]:
    """The gradients of operands, weights and biases; the block's output comes out of its gradient kernel."""
    operand_needs, weight_needs, bias_needs = _parted(needs, len(weights))
    _, _, bias_kinds = _parted(kinds, len(weights))
    there = [(g, w) for g, w in zip(grads, weights, strict=True) if g is not None]
    rewrite = any(g is not None and n for g, n in zip(grads, weight_needs, strict=True))
    if not there:
        return [None] * len(needs)
    found, output = [None] * len(operands), None
    if any(operand_needs):
        # The output's dtype, which under autocast is not the products'.
        grad_output = grad_of_shared(there, operands[0].dtype)
        found, output = block.backward(grad_output, operands, rest, operand_needs, rewrite)
        found = [g if n else None for g, n in zip(found, operand_needs, strict=True)]
    elif rewrite:
        # Whoever unpacked them may have negated them lazily, which a block for small calls takes to be ruled out.
        output, _ = block.forward([None if t is None else t.resolve_neg() for t in operands])
    for grad, weight, need in zip(grads, weights, weight_needs, strict=True):
        found.append(_grad_weight(grad, output, weight.dtype) if need and grad is not None else None)
    for grad, need, kind in zip(grads, bias_needs, bias_kinds, strict=True):
        found.append(_grad_bias(grad, kind) if need and grad is not None else None)
    return found


def grad_of_shared(there: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Tensor:
    """The gradient of what several products read, added up in autograd's order: the last product's first."""
    parts = [grad_input_of(g, w).to(dtype) for g, w in reversed(there)]
    total = parts[0]
    for part in parts[1:]:
        total = total.add_(part)
    return total


def _composed(block: Block) -> Callable[[Sequence[Tensor | None], Sequence[Tensor], torch.dtype], list[Tensor]]:
    def products(operands: Sequence[Tensor | None], weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        output = block.composed(operands)
        return [product_of(output, w, None, dtype) for w in weights]

    return products


def through_composition(
    compose: Callable[[Sequence[Tensor | None], Sequence[Tensor], torch.dtype], list[Tensor]],
    grads: Sequence[Tensor | None],
    operands: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    needs: Sequence[bool],
    kinds: Sequence[torch.dtype | None],
) -> list[Tensor | None]:
    """The same by operators that torch sees, as a graph for gradients of gradients: those of the composition. Biases
    add, and have none there."""
    create_graph = torch.is_grad_enabled()
    operand_needs, weight_needs, bias_needs = _parted(needs, len(weights))
    _, _, bias_kinds = _parted(kinds, len(weights))
    pairs_needed = [*zip(operands, operand_needs, strict=True), *zip(weights, weight_needs, strict=True)]
    dtype = next((g.dtype for g in grads if g is not None), operands[0].dtype)
    with torch.enable_grad():
        # Through a view of each, because the derivatives asked for are partial.
        views = [t.view_as(t) if t is not None and n else t for t, n in pairs_needed]
        outputs = compose(views[: len(operands)], views[len(operands) :], dtype)
    pairs = [(y, g) for y, g in zip(outputs, grads, strict=True) if g is not None and y.requires_grad]
    sources = [v for v, (_, n) in zip(views, pairs_needed, strict=True) if n]
    found = iter(
        torch.autograd.grad(
            [y for y, _ in pairs],
            sources,
            [g for _, g in pairs],
            create_graph=create_graph,
            allow_unused=True,
        )
        if sources and pairs
        else [None] * len(sources)
    )
    result = [next(found) if n else None for _, n in pairs_needed]
    for grad, need, kind in zip(grads, bias_needs, bias_kinds, strict=True):
        result.append(_grad_bias(grad, kind) if need and grad is not None else None)
    return result


def block_linear(
    block: Block, operands: Sequence[Tensor | None], weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """The block's output times each weight, plus bias. Keeps the operands; see the module."""
    # Without a gradient to find for an operand, the output is the least there is to keep.
    if not any(t is not None and t.requires_grad for t in operands) or not is_fused(*operands, *weights, *biases):
        return composed_linear(block, operands, weights, biases)
    dtype = product_dtype(operands[0])

    def product(weight: Tensor, bias: Tensor | None, *operands: Tensor | None) -> Tensor:
        return product_of(block.forward(operands)[0], weight, bias, dtype)

    is_announced = len(weights) == 1 and announced(product, weights[0], biases[0], *operands)
    first, *others = _BlockLinear.apply(block, len(weights), dtype, *operands, *weights, *biases)
    return recorded(first, is_announced), *others


def announced(product: Callable[..., Tensor], *tensors: Tensor | None) -> bool:
    """That a last product, which a norm may read, runs again within a layer."""
    return bool(recompute.thread.active) and recompute.announce_in_layer(
        (lambda *again: _as_no_view(product(*again)), tensors)
    )


def recorded(output: Tensor, is_announced: bool) -> Tensor:
    if is_announced:
        recompute.record(output)
    return output


def composed_linear(
    block: Block, operands: Sequence[Tensor | None], weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """The same, of the block as an op and F.linear, which keeps the output."""
    output = block.composed(operands)
    return tuple(linear_of_torch(output, w, b) for w, b in zip(weights, biases, strict=True))


# Products, a block, a product


@pinned_function
class _LinearBlockLinear(torch.autograd.Function):
    """One or two products of the input, a block of these, a product of the block: of all this the input is kept.

    The first products run again in the backward pass, the last does not: its result is not needed.
    """

    @staticmethod
    def forward(ctx: Any, block: Block, dtype: torch.dtype, input: Tensor, *tensors: Tensor | None) -> Tensor:
        *firsts, weight, bias = tensors
        operands = products_of(input, firsts, dtype)
        output, _ = block.forward(operands)
        ctx.block, ctx.dtype = block, dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(input, *firsts, weight)
        return _as_no_view(product_of(output, weight, bias, dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        input, *firsts, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:]
        grad_bias = _grad_bias(grad, ctx.bias_dtype) if needs[-1] else None
        if by_composition((grad,)):
            tensors = [input, *firsts, weight]

            def compose(operands: Sequence[Tensor | None], weights: Sequence[Tensor], dtype: torch.dtype):
                inner = products_of(operands[0], operands[1:], dtype)
                return [product_of(ctx.block.composed(inner), weights[0], None, dtype)]

            kinds = [None if t is None else t.dtype for t in (*tensors, None)]
            found = through_composition(compose, (grad,), tensors[:-1], tensors[-1:], (*needs[:-1], False), kinds)
            return None, None, *found[:-1], grad_bias
        wants_input, *first_needs = needs[:-2]
        operands = products_of(input, firsts, ctx.dtype)
        inner_needs = [wants_input or any(first_needs[i : i + 2]) for i in range(0, len(firsts), 2)]
        kinds = [*(t.dtype for t in operands), weight.dtype, None]
        wanted = (*inner_needs, needs[-2], False)
        inner = _block_linear_gradients(ctx.block, (grad,), operands, (weight,), (), wanted, kinds)
        del operands
        found: list[Tensor | None] = []
        there = []
        for index, (w, b) in enumerate(zip(firsts[::2], firsts[1::2], strict=True)):
            g = inner[index]
            there.append((g, w))
            found.append(_grad_weight(g, input, w.dtype) if first_needs[2 * index] else None)
            found.append(_grad_bias(g, b.dtype) if first_needs[2 * index + 1] else None)
        grad_input = grad_of_shared(there, input.dtype) if wants_input else None
        return None, None, grad_input, *found, inner[len(inner_needs)], grad_bias


def products_of(input: Tensor, firsts: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor]:
    """The products by (weight, bias, weight, bias, ...)."""
    return [product_of(input, w, b, dtype) for w, b in zip(firsts[::2], firsts[1::2], strict=True)]


def linear_block_linear(
    block: Block, input: Tensor, firsts: Sequence[Tensor | None], weight: Tensor, bias: Tensor | None, recompute: str
) -> Tensor:
    """block(products of the input by `firsts`) times weight, plus bias; `firsts` is weight, bias, and so on.

    Keeps what `recompute` says: "block" all that is between, "output" the products, "all" the input alone.
    """
    if recompute == "all" and is_fused(input, *firsts, weight, bias):
        dtype = product_dtype(input)

        def product(weight: Tensor, bias: Tensor | None, input: Tensor, *firsts: Tensor | None) -> Tensor:
            return product_of(block.forward(products_of(input, firsts, dtype))[0], weight, bias, dtype)

        is_announced = announced(product, weight, bias, input, *firsts)
        return recorded(_LinearBlockLinear.apply(block, dtype, input, *firsts, weight, bias), is_announced)
    operands = [linear(input, w, b) for w, b in zip(firsts[::2], firsts[1::2], strict=True)]
    compute = composed_linear if recompute == "block" else block_linear
    return compute(block, operands, (weight,), (bias,))[0]


def is_fused(*tensors: Tensor | None) -> bool:
    """Whether there is something to keep, and nobody must see the ops one by one."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    return is_plain(tensors) and not is_transformed()


def by_composition(grads: Sequence[Tensor | None]) -> bool:
    """Whether a backward pass is to be seen: for gradients of gradients, and where the gradients are batches."""
    if torch.is_grad_enabled() or is_transformed():
        return True
    return any(g is not None and torch._C._functorch.is_legacy_batchedtensor(g) for g in grads)

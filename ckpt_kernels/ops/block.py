"""A block, declared once: the op, the op of the gradients, their schemas, autograd rules and recipe follow."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import recompute
from ..backends import reference
from .operands import contiguous
from .registration import Registered, joined

_SCHEMA_TYPES = {int: "SymInt", float: "float", bool: "bool", str: "str"}


class NoOptions(NamedTuple):
    """The options of a block that only takes tensors."""


class Block(Registered):
    """The op of a block. A subclass declares the block:

    - `name`, and `operands`: the schema of the tensors. The first `differentiable` of them have gradients.
    - `options`: a NamedTuple class of all arguments that are no tensors, if there are any.
    - `results`: the names of the results; see `Registered` for how many a call returns, and how many have gradients.
    - `kept`, `kept_options`: the schema and options that the gradient needs, if they are not operands and options.
    - `elementwise`: whether the op is elementwise, so that matrix products that it reads are worth running again if
      memory is short.
    - `empty`: allocates the results, and serves as the fake function; `forward` computes them.
    - `gradients(grads, kept, options, wanted)`: the gradients of the differentiable operands, None where not wanted.
    - `composition`: the same results by differentiable torch ops.
    - overrides of the methods defined here.
    """

    name: str
    operands: str
    differentiable: int
    options: type = NoOptions
    results: Sequence[str] = ("output",)
    kept: str | None = None
    kept_options: type | None = None
    has_recipe = True

    def __init__(self) -> None:
        self.kept = self.kept or self.operands
        self.kept_options = self.kept_options or self.options
        super().__init__(self.name, self.operands, _schema(self.options), self.results)
        self.gradient_op = _Gradient(self)

    def empty(self, *arguments: Any) -> Sequence[Tensor | None]:
        raise NotImplementedError

    def gradients(
        self, grads: Sequence[Tensor | None], kept: Sequence[Tensor | None], options: Any, wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        raise NotImplementedError

    def keep(self, arguments: Sequence[Any], results: Sequence[Tensor | None], wanted: Sequence[bool]) -> tuple:
        """The tensors that are kept for backward, and the options of the gradient."""
        return arguments[:-1], arguments[-1]

    def recipe(self, ctx: Any, arguments: Sequence[Any], results: Sequence[Tensor | None]) -> recompute.Announcement:
        """A function and the kept tensors from which the function recomputes the first result; None if that is
        impossible."""
        options = arguments[-1]
        return lambda *operands: self.forward(*operands, options)[0], tuple(arguments[:-1])

    def differentiated(
        self, grads: Sequence[Tensor | None], kept: Sequence[Tensor | None], options: Any, wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """The gradients, computed by the gradient op; None where not wanted."""
        results = self.gradient_op(*grads, *kept, (options, wanted))
        return [g if w else None for g, w in zip(results, wanted, strict=True)]

    def empty_gradients(
        self, grads: Sequence[Tensor | None], kept: Sequence[Tensor | None], options: Any, wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """Allocates the gradients, each contiguous and in the shape of the kept operand."""
        return [contiguous(t) if w and t is not None else None for t, w in zip(kept, wanted, strict=False)]

    def first_order(
        self, grads: Sequence[Tensor | None], kept: Sequence[Tensor | None], options: Any, wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """The same gradients as a differentiable graph, if all operands are kept and have gradients."""
        return reference.gradients(lambda *operands: self.composition(*operands, options), kept, grads, wanted)

    # Derived from the declaration.

    def flattened(self, options: Any) -> tuple:
        return options

    def structured(self, flat: Sequence[Any]) -> Any:
        return self.options(*flat)

    def setup_context(self, ctx: Any, arguments: Sequence[Any], results: Sequence[Tensor | None]) -> None:
        kept, ctx.options = self.keep(arguments, results, ctx.needs_input_grad)
        ctx.save_for_backward(*kept)

    def backward(self, ctx: Any, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        # There are at most two gradients.
        if grads[0] is None and grads[-1] is None:
            return (None,) * self.differentiable
        wanted = list(ctx.needs_input_grad[: self.differentiable])
        return self.differentiated(grads, ctx.saved_tensors, ctx.options, wanted)


class _Gradient(Registered):
    """The op of a block's gradients. The gradients of this op are those of the reference.

    The tensors of the op are the gradients of the block's differentiable results, and the tensors that the block keeps.
    The options are the gradient's options, and which gradients are wanted. Results that are not wanted are None.
    """

    def __init__(self, block: Block) -> None:
        self.block = block
        self.returned = block.differentiable
        self._incoming = block.differentiable_results
        self.differentiable_results = block.differentiable
        grads = [f"Tensor{'?' if i else ''} grad_{name}" for i, name in enumerate(block.results[: self._incoming])]
        results = [f"grad_{operand.split()[-1]}" for operand in block.operands.split(", ")[: block.differentiable]]
        options = joined(_schema(block.kept_options), "bool[] wanted")
        super().__init__(f"{block.name}_backward", ", ".join((*grads, block.kept)), options, results)

    def _call_block(self, method: Callable[..., Any], arguments: Sequence[Any]) -> Any:
        """Calls a method of the block with gradients, kept tensors, options and wanted flags."""
        options, wanted = arguments[-1]
        return method(arguments[: self._incoming], arguments[self._incoming : -1], options, wanted)

    def forward(self, *arguments: Any) -> Sequence[Tensor | None]:
        options, wanted = arguments[-1]
        return tuple(self.block.gradients(arguments[: self._incoming], arguments[self._incoming : -1], options, wanted))

    def empty(self, *arguments: Any) -> Sequence[Tensor | None]:
        return self._call_block(self.block.empty_gradients, arguments)

    def composition(self, *arguments: Any) -> Sequence[Tensor | None]:
        with torch.enable_grad():
            arguments = [a.view_as(a) if isinstance(a, Tensor) else a for a in arguments]
        return tuple(self._call_block(self.block.first_order, arguments))

    def flattened(self, options: tuple[Any, list[bool]]) -> tuple:
        return *options[0], options[1]

    def structured(self, flat: Sequence[Any]) -> tuple[Any, list[bool]]:
        return self.block.kept_options(*flat[:-1]), flat[-1]

    def setup_context(self, ctx: Any, arguments: Sequence[Any], results: Sequence[Tensor | None]) -> None:
        *tensors, ctx.options = arguments
        ctx.save_for_backward(*tensors)

    def backward(self, ctx: Any, grad_gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        tensors = list(ctx.saved_tensors)
        wanted = [index for index, needed in enumerate(ctx.needs_input_grad[: len(tensors)]) if needed]
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # Differentiate with respect to a view of each tensor: the derivatives are partial, and one tensor may be
            # computed from another (a gradient from an output).
            for index in wanted:
                tensors[index] = tensors[index].view_as(tensors[index])
            first = self._call_block(self.block.first_order, (*tensors, ctx.options))
            pairs = [
                (g, gg)
                for g, gg in zip(first, grad_gradients, strict=True)
                if g is not None and gg is not None and g.requires_grad
            ]
            second_order = iter(
                torch.autograd.grad(
                    [g for g, _ in pairs],
                    [tensors[index] for index in wanted],
                    [gg for _, gg in pairs],
                    create_graph=create_graph,
                    allow_unused=True,
                )
                if pairs
                else [None] * len(wanted)
            )
        return [next(second_order) if index in wanted else None for index in range(len(tensors))]


def _schema(options: type) -> str:
    """The schema of a NamedTuple class of options."""
    return ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in options.__annotations__.items())

"""Recipes so cheap that a tensor at a layer's boundary need not be kept: one block, and torch's own cheap ops after it.

Such a recipe reads tensors that are kept, and runs no product, so that the next layer does not run parts of this one.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import Tensor

from .entries import Entries
from .recipes import Claim, FromGraph, Recipe, Step
from .rules import RULES, Rule


class Product:
    """A function of a recipe that runs a matrix product."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function

    def __call__(self, *operands: Any) -> Tensor:
        return self.function(*operands)


class RecipeSource(Protocol):
    """The interface of a context that this module asks for recipes."""

    all_entries: Entries
    rules: dict[str, Rule]

    def source_of(self, tensor: Tensor) -> Recipe | Tensor | None: ...


def has_cheap_recipe(tensor: Tensor, source: RecipeSource) -> bool:
    """Whether the tensor has such a recipe: a recorded one, or one that the autograd graph shows."""
    entry = source.all_entries.of(tensor)
    recorded = None if entry is None else entry.recipe()
    if recorded is not None:
        return recorded.depth == 1
    rules, source.rules = source.rules, RULES
    try:
        traced = source.source_of(tensor)
    finally:
        source.rules = rules
    if not isinstance(traced, Recipe) or not isinstance(traced.rebuild, FromGraph):
        return False
    (step, *_) = traced.rebuild.bound
    claims = list(_claims_of(step)) if isinstance(step, Step) else []
    return bool(claims) and all(_is_cheap(claim.recipe, tensor) for claim in claims)


def _is_cheap(recipe: Recipe, tensor: Tensor) -> bool:
    """Whether a recipe is that of a block, whose output is no larger than the tensor: the input of a block before a
    pooling is larger than the pooled tensor, and would be kept in the place of that."""
    is_of_block = recipe.depth == 1 and not isinstance(recipe.rebuild, Product | FromGraph)
    return is_of_block and recipe.layout is not None and math.prod(recipe.layout[0]) <= tensor.numel()


def _claims_of(step: Step) -> Iterator[Claim]:
    """The claims among the operands of a step and of the steps before it."""
    for operand in step.operands:
        content: Any = getattr(operand, "content", operand)
        if isinstance(content, Step):
            yield from _claims_of(content)
        elif isinstance(content, Claim):
            yield content

"""The recipes for which a tensor at a layer's boundary is not kept: one block, and cheap ops after it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ckpt_kernels import functional as F
from ckpt_kernels.recompute import discard_outputs, discarding, note
from ckpt_kernels.recompute.cheap_recipes import has_cheap_recipe

from .conftest import DEVICE
from .conversion import WIDTH, random_tensor


def normed(x: Tensor) -> Tensor:
    return F.rms_norm(x, (WIDTH,), torch.ones(WIDTH, device=DEVICE))


def scaled(x: Tensor) -> Tensor:
    note(y := x * 3.0, x, 3.0)
    return y


def summed(x: Tensor, other: Tensor) -> Tensor:
    note(y := x + other, x, other)
    return y


def product(x: Tensor) -> Tensor:
    """A product that a layer computes again."""
    weight = torch.full((WIDTH, WIDTH), 0.1, device=DEVICE).requires_grad_()
    return F.act_linear(x, weight, activation="silu")


# By name: the tensor of an input, and whether the tensor has such a recipe.
MADE: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "a block": (normed, True),
    "a block, scaled": (lambda x: scaled(normed(x)), True),
    "a block, scaled twice": (lambda x: scaled(scaled(normed(x))), True),
    "two blocks": (lambda x: normed(normed(x)), False),
    "two blocks, scaled": (lambda x: scaled(normed(normed(x))), False),
    "two blocks, scaled twice": (lambda x: scaled(scaled(normed(normed(x)))), False),
    "a sum with two blocks": (lambda x: summed(normed(x), normed(normed(x))), False),
    "a product of torch": (lambda x: x @ x.T, False),
    "the sine of a product of torch, scaled": (lambda x: scaled((x @ x.T).sin()), False),
    "a product, scaled": (lambda x: scaled(product(x)), False),
}


@pytest.mark.parametrize("name", MADE)
def test_which_tensors_have_a_cheap_recipe(name: str) -> None:
    make, is_cheap = MADE[name]
    x = random_tensor(16, WIDTH).requires_grad_()
    with discard_outputs():
        discarder: Any = discarding()
        with discarder.at("layer"):
            made = make(x)
            rules = discarder.rules
            assert has_cheap_recipe(made, discarder) == is_cheap
            assert discarder.rules is rules


def test_the_first_call_of_a_block_has_the_same_recipes_as_later_calls() -> None:
    """Later calls take a shorter way, and a layer that runs twice must keep the same tensors both times."""
    x = random_tensor(4, 8, 5, 5).requires_grad_()

    def normed(x: Tensor) -> Tensor:
        # A value of eps that no other call has had.
        return F.batch_norm(x, None, None, training=True, eps=0.0123, activation="relu")

    found = []
    for _ in range(3):
        with discard_outputs():
            made = summed(normed(x), normed(x))
            found.append(has_cheap_recipe(made, discarding()))
    assert found == [True] * 3

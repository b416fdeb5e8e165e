"""The C fast path of `recompute` records outputs, and the versions of biases, as the Python code does."""

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor, nn

from ckpt_kernels import functional as F
from ckpt_kernels import recompute
from ckpt_kernels.recompute import active, announcing, biases, fast_path, hooks
from ckpt_kernels.recompute.entries import Block
from ckpt_kernels.recompute.recipes import Claim, Recipe

from .discarded_outputs import random_tensor, shows_saved
from .packed_cells import cells_of, python_only

pytestmark = [
    pytest.mark.skipif(fast_path.library is None, reason="there is no _thin here"),
    pytest.mark.skipif(not shows_saved, reason="this torch does not show what nodes hold"),
]


def test_a_context_that_another_thread_closed_removes_its_hooks() -> None:
    context = recompute.discard_outputs()
    context.__enter__()
    thread = threading.Thread(target=context.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    assert hooks.top_hooks() is not None
    x = random_tensor(4).requires_grad_()
    _ = x * x
    assert hooks.top_hooks() is None


def test_a_noted_operand_needs_no_recipe() -> None:
    """A small shift, which a product made: the recipe of the sum copies the shift."""
    x, weight = random_tensor(64, 32).requires_grad_(), random_tensor(32, 32, seed=1).requires_grad_()
    small = random_tensor(1, 32, seed=2)
    for context in (contextlib.nullcontext(), python_only()):
        with context, recompute.discard_outputs():
            h, shift = F.layer_norm(x, 32), small @ weight
            total = h + shift
            announcing.note(total, h, shift)
            read = TF.linear(total, weight)
            assert Claim in [type(cell.content) for name, _, cell in cells_of(read) if name == read.grad_fn.name()]


class Announcing(torch.autograd.Function):
    """Announces a recipe for the first result of `compute`, and saves so many tensors; with -1, the result."""

    @staticmethod
    def forward(ctx: Any, compute: Callable[..., Tensor], saved: int, total: Any, *tensors: Tensor) -> Tensor:
        output = compute(*tensors)
        second = None if total is None else (tensors[0], (compute, tensors))
        announcing.announce((compute, tensors), False, second)
        ctx.save_for_backward(*(tensors[:saved] if saved >= 0 else [output]))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        raise NotImplementedError


def doubled(x: Tensor, *others: Tensor) -> Tensor:
    return x * 2


def last_rows(x: Tensor, *others: Tensor) -> Tensor:
    return torch.cat([x, x * 2])[x.shape[0] :]


def foreign_hooks() -> contextlib.AbstractContextManager:
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)


# The function, the number of saved tensors, whether there is a second result, and a change of the context.
ANNOUNCED: dict[str, tuple[Callable[..., Tensor], int, Any, dict[str, bool]]] = {
    "usual": (doubled, 1, None, {}),
    "offset": (last_rows, 1, None, {}),
    "empty": (lambda x, *others: (x * 2)[:0], 1, None, {}),
    "nothing saved": (doubled, 0, None, {}),
    "the result is saved": (doubled, -1, None, {}),
    "several processes": (doubled, 1, None, {"may_be_sharded": True}),
    "closed": (doubled, 1, None, {"is_closed": True}),
    "paused": (doubled, 1, None, {"is_paused": True}),
    "a total": (doubled, 1, True, {}),
    "a total in a layer": (doubled, 1, True, {"is_in_layer": True}),
}


OTHERS: dict[str, Callable[[Tensor, Tensor], Sequence[Tensor]]] = {
    "none": lambda x, weight: (),
    "a leaf": lambda x, weight: (weight,),
    "a product": lambda x, weight: (x @ weight,),
    "a small product": lambda x, weight: (x @ weight[:, :1],),
    "a block's output": lambda x, weight: (F.layer_norm(x, 8),),
    "a view": lambda x, weight: (x.t(),),
}


@pytest.mark.parametrize("inside", (contextlib.nullcontext, foreign_hooks, torch.no_grad))
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("case", ANNOUNCED)
def test_announcements_equal_pythons(case: str, other: str, inside: Callable[[], Any]) -> None:
    """With another operand, which nothing saves."""
    compute, saved, total, options = ANNOUNCED[case]

    def run() -> list[Any]:
        x, weight = random_tensor(8, 8).requires_grad_(), random_tensor(8, 8, seed=1).requires_grad_()
        with recompute.discard_outputs():
            discarder = active.thread.active[-1]
            given = [x, *OTHERS[other](x, weight)]
            for name, value in options.items():
                setattr(discarder, name, value)
            with inside():
                output = Announcing.apply(compute, saved, total, *given)
                announced = discarder.announced
                found = [None if announced is None else (len(announced.saved), type(announced.total))]
                announcing.record(output)
            block = getattr(output.grad_fn, "recomputed_block", "none")
            recipe = block.entry.recipe() if isinstance(block, Block) else block
            found += [
                discarder.announced,
                type(recipe),
                len(discarder.all_entries),
                discarder in active.thread.active,
            ]
            if isinstance(recipe, Recipe):
                found += [recipe.depth, recipe.layout, [type(operand) for operand in recipe.operands]]
        return found

    found = run()
    with python_only():
        assert found == run()


def test_versions_of_biases_equal_pythons() -> None:
    shared = nn.Linear(4, 4)
    module = nn.Sequential(
        shared, nn.BatchNorm1d(4), nn.ModuleList([shared, nn.Sequential(nn.Linear(4, 4, bias=False))])
    )
    module.register_parameter("nothing", None)
    shared.bias.data = shared.bias.data.clone()
    with torch.no_grad():
        shared.bias.add_(1)
    found, expected = fast_path.biases(module), biases.versions_in(module)
    assert found == expected is not None and len(expected) == 3
    assert fast_path.biases(nn.Linear(2, 2, bias=False)) == {}
    module.append(nn.LazyLinear(3))
    assert fast_path.biases(module) is None
    assert fast_path.biases(object()) is None

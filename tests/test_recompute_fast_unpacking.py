"""The C fast path of `recompute` unpacks cells, and runs recipes, as the Python code does."""

import contextlib
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor, nn

from ckpt_kernels import backends, recompute
from ckpt_kernels import functional as F
from ckpt_kernels.recompute import active, fast_path
from ckpt_kernels.recompute.announcements import Announced
from ckpt_kernels.recompute.cells import Cell, Kept
from ckpt_kernels.recompute.hooks import seekers
from ckpt_kernels.recompute.recipes import LONGEST_CHAIN, Claim, Recipe, geometry_of, layout_of

from .discarded_outputs import random_tensor, same_bits, shows_saved
from .packed_cells import python_only

pytestmark = [
    pytest.mark.skipif(fast_path.library is None, reason="there is no _thin here"),
    pytest.mark.skipif(not shows_saved, reason="this torch does not show what nodes hold"),
]


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "a write": lambda t: t.detach().mul_(2),
    "freed memory": lambda t: t.untyped_storage().resize_(0),
    "other data": lambda t: setattr(t, "data", torch.zeros_like(t)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_the_same_error(change: str) -> None:
    def run() -> list[Any]:
        x, weight = random_tensor(4, 32).requires_grad_(), nn.Parameter(random_tensor(32, 32))
        with recompute.discard_outputs():
            output = TF.linear(F.layer_norm(x * 1, 32), weight).sum()
        CHANGES[change](weight)
        try:
            return [g.tolist() for g in torch.autograd.grad(output, (x, weight))]
        except RuntimeError as error:
            return [str(error)]

    found = run()
    with python_only():
        assert found == run()
    assert (len(found) == 1) == (change != "other data")


class Made:
    """A recipe for a tensor of 4 x 4, unpacked by C or by Python, which records how it runs."""

    def __init__(self, make: Callable[[Tensor], Tensor] = Tensor.clone, start: int = 0) -> None:
        self.make = make
        self.runs: list[tuple[str, bool, bool]] = []
        whole = random_tensor(4, 4)
        self.recipe = Recipe(self.rebuild, [Kept(whole, True), None], 1, layout_of(whole))
        self.claim = Claim(self.recipe, geometry_of(whole[start:]))
        self.cell = Cell(self.claim, None, 0, None)

    def rebuild(self, kept: Tensor, nothing: None) -> Tensor:
        self.runs.append((backends.chosen(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        return self.make(kept)

    def unpacked(self, unpack: Callable[[Cell], Tensor]) -> Any:
        try:
            found = unpack(self.cell)
        except RuntimeError as error:
            return str(error)
        return found.dtype, found.tolist(), geometry_of(found), found.is_inference(), found.requires_grad, self.runs


AROUND: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
    "nothing": contextlib.nullcontext,
    "gradients": torch.enable_grad,
    "inference": torch.inference_mode,
    "another backend": lambda: backends.serving("reference"),
}


@pytest.mark.parametrize("around", AROUND)
def test_recipes_run_as_in_python(around: str) -> None:
    in_c, in_python = Made(), Made()
    with torch.no_grad(), AROUND[around]():
        found, expected = in_c.unpacked(fast_path.library.unpack), in_python.unpacked(lambda cell: cell.get())
    assert found == expected
    assert in_c.runs == [(backends.chosen(), False, False)]


@pytest.mark.parametrize("start", (0, 1))
@pytest.mark.parametrize(
    "make",
    (
        Tensor.clone,
        lambda kept: kept.t().contiguous().t(),
        lambda kept: torch.cat([kept[:1], kept])[1:],
        Tensor.double,
        lambda kept: kept[:2].clone(),
    ),
    ids=("as it was", "other strides", "an offset", "another dtype", "another shape"),
)
def test_tensors_made_again_are_laid_out_as_in_python(make: Callable[[Tensor], Tensor], start: int) -> None:
    with torch.no_grad():
        found = Made(make, start).unpacked(fast_path.library.unpack)
        expected = Made(make, start).unpacked(lambda cell: cell.get())
    assert found == expected


def test_an_interrupt_in_a_recipe_is_raised() -> None:
    def interrupted(kept: Tensor) -> Tensor:
        raise KeyboardInterrupt

    made = Made(interrupted)
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        fast_path.library.unpack(made.cell)
    assert len(made.runs) == 1


def test_only_the_thread_that_seeks_identities_gets_no_values() -> None:
    made, own = Made(), threading.get_ident()
    with torch.no_grad():
        seekers.append(own)
        try:
            assert fast_path.library.unpack(made.cell).numel() == 0 and not made.runs
        finally:
            seekers.remove(own)
        seekers.append(own + 1)
        try:
            assert fast_path.library.unpack(made.cell).numel() == 16 and made.runs
        finally:
            seekers.remove(own + 1)


@pytest.mark.parametrize("is_first_gone", (False, True))
def test_two_claims_are_served_by_one_run(is_first_gone: bool) -> None:
    made = Made()
    cells = [made.cell, Cell(Claim(made.recipe, made.claim.geometry), None, 0, None)]
    found: list[Tensor] = []

    def unpack(gradient: Tensor) -> None:
        found.append(fast_path.library.unpack(cells[0]))
        if is_first_gone:
            del cells[0], made.cell, made.claim
        found.append(fast_path.library.unpack(cells[-1]))

    x = torch.ones(1, requires_grad=True)
    x.register_hook(unpack)
    (x * 1).backward()
    assert len(made.runs) == 1 and same_bits(*found)


def test_no_announcement_outlives_its_op() -> None:
    def count() -> int:
        gc.collect()
        return sum(type(each) is Announced for each in gc.get_objects())

    before = count()
    with recompute.discard_outputs():
        h = random_tensor(4, 8).requires_grad_()
        for _ in range(3):
            h = F.layer_norm(h, 8)
        assert count() == before
    assert count() == before


@pytest.mark.parametrize("depth", (LONGEST_CHAIN, LONGEST_CHAIN + 1))
def test_the_length_of_chains_is_that_of_python(depth: int) -> None:
    with recompute.discard_outputs():
        h = F.layer_norm(random_tensor(4, 8).requires_grad_(), 8)
        discarder = active.thread.active[-1]
        h.grad_fn.recomputed_block.entry.recipe().depth = depth
        found, expected = fast_path.library.packer(discarder)(h), discarder.pack(h)
    assert type(found.content) is type(expected.content) is (Kept if depth > LONGEST_CHAIN else Claim)

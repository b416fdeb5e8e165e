"""Tensors at the boundaries of layers, and copies: which of them a context keeps, and which stand for others."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor

from ckpt_kernels.recompute import copied, discard_outputs, discarding
from ckpt_kernels.recompute.cells import Kept

from .discarded_outputs import ROWS, WIDTH, Parameters, assert_unchanged, normed, random_tensor, rows  # noqa: F401
from .packed_cells import python_only


@pytest.fixture
def discarder() -> Iterator[Any]:
    with discard_outputs():
        yield discarding()


def test_tensors_that_are_no_boundaries(discarder: Any, x: Tensor) -> None:
    """A tensor that a block can make again, one without a gradient, and objects that are no dense tensors."""
    for other in (normed(x), x.detach(), (x * 1).to_sparse(), 3):
        discarder.hold(other)
        assert not discarder.boundaries
    discarder.hold(made := x * 1)
    assert discarder.boundaries.of(made) is not None


def test_a_copy_stands_for_a_whole_boundary_alone(discarder: Any, x: Tensor) -> None:
    discarder.hold(made := x * 1)
    boundary = discarder.boundaries.of(made)
    part = copied(made[1:])
    assert discarder.boundaries.of(part) is None
    whole = copied(made)
    assert discarder.boundaries.of(whole).original is boundary
    discarder.pack(whole[1:])
    assert boundary.copy is None
    cell = discarder.pack(whole)
    assert boundary.copy is cell


def test_a_boundary_is_kept_as_it_is(discarder: Any) -> None:
    """A float32 copy of 16 bits is kept in 16 bits elsewhere."""
    x = random_tensor(ROWS, WIDTH, dtype=torch.bfloat16).requires_grad_()
    boundary, other = x.float(), x.float()
    discarder.hold(boundary)
    assert isinstance(discarder.pack(boundary).content, Kept)
    assert not isinstance(discarder.pack(other).content, Kept)


def test_a_copy_of_a_part_has_the_values_of_the_part(x: Tensor) -> None:
    p = Parameters()
    assert_unchanged(lambda: TF.linear(copied(normed(x)[ROWS // 2 :]), p["a"]), [x, p["a"]])


@pytest.fixture(params=[python_only, contextlib.nullcontext], ids=["python", "as it is"])
def path(request: pytest.FixtureRequest) -> Iterator[None]:
    """The Python code, and the C code where that is built."""
    with request.param():
        yield


@pytest.mark.usefixtures("path")
def test_complex_views_of_float32_copies_are_kept() -> None:
    """Of the copy itself 16 bits would be enough."""
    x = random_tensor(ROWS, WIDTH, dtype=torch.bfloat16).requires_grad_()

    def call() -> Tensor:
        c = torch.view_as_complex(x.float().view(-1, 2))
        return torch.view_as_real(c * c.sin())

    call()
    assert_unchanged(call, [x])


@pytest.mark.usefixtures("path")
@pytest.mark.filterwarnings("ignore:.*nested tensors")
def test_nested_tensors_are_kept() -> None:
    parts = [random_tensor(count, WIDTH).requires_grad_() for count in (3, 5)]
    p = Parameters()

    def call() -> Tensor:
        nested = torch.nested.as_nested_tensor(parts)
        return torch.nested.to_padded_tensor(TF.linear(TF.silu(nested), p["a"]), 0.0)

    call()
    assert_unchanged(call, [*parts, p["a"]])


def test_an_output_within_a_larger_tensor_has_no_recipe(discarder: Any, x: Tensor) -> None:
    """A tensor that is computed again begins at the start of its memory."""
    for output, has_recipe in (((x * 1)[1:], False), (x[1:] * 1, True), (x.detach() * 1, False)):
        discarder.record(output, (lambda given: given[1:] * 1, (x,)))
        assert (discarder.all_entries.of(output) is not None) is has_recipe

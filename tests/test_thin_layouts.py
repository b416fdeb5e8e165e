"""Small calls by plans, for tensors in other memory layouts, give the same bits as the full path."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import ckpt_kernels.nn as ours
from ckpt_kernels import functional, recompute
from ckpt_kernels.thin import direct

from .call_plans import Counted, full_path

pytestmark = [
    pytest.mark.skipif(not direct.is_available, reason="calls cannot be made directly here"),
    pytest.mark.usefixtures("without_plans"),
]


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "columns first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "rows in another order": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "parts of rows": lambda t: torch.cat([t, t], -1)[..., :64],
    "some rows": lambda t: torch.cat([t, t], 1)[:, :3],
}


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("of_gradient", STRIDES)
def test_row_norms_of_any_strides_run_by_a_plan(counted: Counted, strides: str, of_gradient: str) -> None:
    norm = ours.LayerNorm(64)
    x, grad = torch.randn(2, 3, 64), torch.randn(2, 3, 64)
    assert norm(x).is_contiguous()  # makes the plan

    def step() -> list[Tensor]:
        input = STRIDES[strides](x).requires_grad_()
        with recompute.discard_outputs():
            output = norm(input)
            product = output @ weight
        (read,) = torch.autograd.grad(product.sum(), weight, retain_graph=True)
        return [output, read, *torch.autograd.grad(output, [input, *norm.parameters()], STRIDES[of_gradient](grad))]

    weight = torch.randn(64, 2, requires_grad=True)
    found = step()
    assert counted.served == 1
    with full_path():
        expected = step()
    assert all(map(torch.equal, found, expected)) and [t.stride() for t in found] == [t.stride() for t in expected]


MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "planes": Tensor.contiguous,
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "some channels": lambda t: torch.cat([t, t], 1)[:, :4],
}


BLOCKS_OF_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda t: functional.bias_act(t, activation="silu"),
    "relu": lambda t: functional.bias_act(t, activation="relu"),
    "a group norm": lambda t: functional.group_norm(t, 2, activation="silu"),
}


@pytest.mark.parametrize("of_gradient", MAPS)
@pytest.mark.parametrize("maps", MAPS)
@pytest.mark.parametrize("block", BLOCKS_OF_MAPS)
def test_blocks_of_maps_in_any_layout_give_the_bits_of_the_full_path(
    counted: Counted, block: str, maps: str, of_gradient: str
) -> None:
    x, grad = torch.randn(2, 4, 5, 3), torch.randn(2, 4, 5, 3)
    weight = torch.randn(3, 2, requires_grad=True)
    call = BLOCKS_OF_MAPS[block]
    call(x)  # makes the plan

    def step() -> list[Tensor]:
        input = MAPS[maps](x).requires_grad_()
        with recompute.discard_outputs():
            output = call(input)
            product = output @ weight
        (read,) = torch.autograd.grad(product.sum(), weight, retain_graph=True)
        return [output, read, *torch.autograd.grad(output, input, MAPS[of_gradient](grad))]

    found = step()
    assert counted.served == (maps != "some channels")
    with full_path():
        expected = step()
    assert all(map(torch.equal, found, expected)) and [t.stride() for t in found] == [t.stride() for t in expected]


@pytest.mark.parametrize("of_residual", MAPS)
@pytest.mark.parametrize("maps", ["planes", "channels last"])
def test_a_residual_in_any_layout_gives_the_bits_of_the_full_path(maps: str, of_residual: str) -> None:
    x, residual, grad = torch.randn(3, 2, 4, 5, 3)

    def step() -> list[Tensor]:
        inputs = [MAPS[maps](x).requires_grad_(), MAPS[of_residual](residual).requires_grad_()]
        output = functional.batch_norm(inputs[0], None, None, training=True, activation="silu", residual=inputs[1])
        return [output, *torch.autograd.grad(output, inputs, grad)]

    step()  # makes the plan
    found = step()
    with full_path():
        expected = step()
    assert all(map(torch.equal, found, expected)) and [t.stride() for t in found] == [t.stride() for t in expected]


@pytest.mark.parametrize("limit", [None, 1.0])
@pytest.mark.parametrize("of_gradient", STRIDES)
def test_halves_of_rows_run_by_a_plan(counted: Counted, of_gradient: str, limit: float | None) -> None:
    packed, grad = torch.randn(2, 3, 128), torch.randn(2, 3, 64)
    functional.glu(*packed.chunk(2, -1), activation="silu", limit=limit)  # makes the plan

    def step() -> list[Tensor]:
        halves = [half.detach().requires_grad_() for half in packed.chunk(2, -1)]
        with recompute.discard_outputs():
            output = functional.glu(*halves, activation="silu", limit=limit)
            product = output @ weight
        (read,) = torch.autograd.grad(product.sum(), weight, retain_graph=True)
        return [output, read, *torch.autograd.grad(output, halves, STRIDES[of_gradient](grad))]

    weight = torch.randn(64, 2, requires_grad=True)
    found = step()
    assert counted.served == 1
    with full_path():
        expected = step()
    assert all(map(torch.equal, found, expected)) and [t.stride() for t in found] == [t.stride() for t in expected]

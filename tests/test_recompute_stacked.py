"""Weights of several experts in one parameter, gathered for each token: the backward pass gathers again unless the
parameter was written to."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import ckpt_kernels
from ckpt_kernels.memory import saved_bytes
from ckpt_kernels.recompute import discard_outputs, discarding, layer

from .conftest import DEVICE

EXPERTS, WIDTH, INNER, TOKENS = 3, 8, 16, 24
GATHERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "brackets": lambda weight, ids: weight[ids],
    "index_select": lambda weight, ids: weight.index_select(0, ids),
}


class Experts(nn.Module):
    """Experts as in transformers' `batched_mm`; `before` and `between` may write to the weights."""

    def __init__(self, gather: str = "brackets") -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH))
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER))
        self.gather = GATHERS[gather]
        self.before: Callable[[], None] = lambda: None
        self.between: Callable[[], None] = lambda: None
        ids = torch.arange(TOKENS) % EXPERTS
        self.register_buffer("ids", ids)

    def forward(self, x: Tensor) -> Tensor:
        self.before()
        up = self.gather(self.up, self.ids)
        self.between()
        hidden = torch.bmm(up, x.unsqueeze(-1)).relu()
        return torch.bmm(self.gather(self.down, self.ids), hidden).squeeze(-1)


def made(gather: str = "brackets") -> tuple[Experts, Tensor]:
    torch.manual_seed(0)
    return Experts(gather).to(DEVICE), torch.randn(TOKENS, WIDTH, device=DEVICE).requires_grad_()


def gradients(call: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(call(x).square().sum(), [x, *model.parameters()]))


def assert_same_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


COPY = TOKENS * INNER * WIDTH * 4


def kept_copies(call: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> int:
    """The number of gathered copies that are kept."""
    return saved_bytes(call, x, parameters_of=model) // COPY


@pytest.mark.parametrize("gather", GATHERS)
@pytest.mark.parametrize("around", [lambda model: discard_outputs(model)(model), layer], ids=["discard", "layer"])
def test_gathered_copies_are_not_kept(gather: str, around: Callable[[Experts], Callable[[Tensor], Tensor]]) -> None:
    model, x = made(gather)
    assert kept_copies(model, model, x) == 2
    assert kept_copies(around(model), model, x) == 0
    found, expected = gradients(around(model), model, x), gradients(model, model, x)
    if DEVICE == "cpu":
        assert_same_bits(found, expected)
    # On CUDA torch adds up the gradients of gathered rows in no fixed order.
    torch.testing.assert_close(found, expected)


def test_converted_model_gathers_again_in_two_backward_passes() -> None:
    model, x = made()
    stack = nn.ModuleList([nn.Sequential(nn.LayerNorm(WIDTH), model)]).to(DEVICE)
    ckpt_kernels.convert(stack, recompute="block")
    expected = gradients(stack[0], model, x)[1:]
    for level in ("output", "all", "layer"):
        ckpt_kernels.convert(stack, recompute=level)
        loss = stack[0](x).square().sum()
        found = [torch.autograd.grad(loss, [model.up, model.down], retain_graph=True) for _ in range(2)]
        assert kept_copies(stack[0], stack, x) == 0
        assert_same_bits([*found[0], *found[1]], [*expected, *expected])


def writes_to(weight: nn.Parameter) -> Callable[[], None]:
    @torch.no_grad()
    def write() -> None:
        weight.mul_(0.5)

    return write


def replaces_data_of(weight: nn.Parameter) -> Callable[[], None]:
    def replace() -> None:
        weight.data = weight.data * 0.5

    return replace


@pytest.mark.parametrize("how", [writes_to, replaces_data_of])
@pytest.mark.parametrize("when", ["before", "between"])
def test_a_weight_that_changes_in_the_forward(when: str, how: Callable[[nn.Parameter], Callable[[], None]]) -> None:
    """The gathered copies are kept, with the values at the time of the gather."""
    model, x = made()
    start = model.up.detach().clone()
    found = {}
    for name, call in (("layer", layer(model)), ("plain", model)):
        model.up.data.copy_(start)
        setattr(model, when, how(model.up))
        found[name] = gradients(call, model, x)
    assert_same_bits(found["layer"], found["plain"])
    assert kept_copies(layer(model), model, x) == 1


def test_a_write_after_the_forward_is_an_error() -> None:
    """As for the weight of a linear layer."""
    model, x = made()
    output = layer(model)(x)
    writes_to(model.down)()
    with pytest.raises(RuntimeError, match=r"modified by an in-?place operation"):
        output.sum().backward()


def test_gathers_of_unknown_parameters_are_kept() -> None:
    """A context without a module knows no parameters."""
    model, x = made()
    assert kept_copies(discard_outputs()(model), model, x) == 2
    # A parameter that is assigned later is known from the second call on.
    kept_copies(layer(model), model, x)
    model.up = nn.Parameter(model.up.detach().clone())
    assert [kept_copies(layer(model), model, x) for _ in range(2)] == [1, 0]


class Own(nn.Parameter):
    """A user's parameter class, which may have its memory elsewhere."""


def test_a_module_may_get_the_weights_later() -> None:
    model, x = made()
    holder = nn.Module()
    call = discard_outputs(holder)(model)
    assert kept_copies(call, model, x) == 2
    holder.experts = model
    assert kept_copies(call, model, x) == 0


def test_a_parameter_of_another_class_is_not_gathered_again() -> None:
    model, x = made()
    model.up = Own(model.up.detach())
    assert kept_copies(layer(model), model, x) == 1


class Table(nn.Module):
    """Reads a parameter that is no stack of weights, or reads a stack without a gather."""

    def __init__(self, shape: tuple[int, ...], read: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.table, self.read = nn.Parameter(torch.randn(shape)), read

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.table, x) * x


IDS = torch.arange(TOKENS, device=DEVICE) % EXPERTS
TABLES: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor], Tensor]]] = {
    "2 dimensions": ((EXPERTS, WIDTH), lambda table, _: table[IDS]),
    "4 dimensions": ((EXPERTS, 1, 1, WIDTH), lambda table, _: table[IDS].flatten(1)),
    "sum": ((1, TOKENS, WIDTH), lambda table, x: (x.relu() + table)[0]),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_write_to_another_parameter_after_the_forward_is_no_error(name: str) -> None:
    """The gradient does not need the parameter's values, with or without a layer."""
    model, x = Table(*TABLES[name]).to(DEVICE), made()[1]
    expected = gradients(model, model, x)
    output = layer(model)(x)
    writes_to(model.table)()
    assert_same_bits(list(torch.autograd.grad(output.square().sum(), [x, model.table])), expected)


def test_gathers_of_inference_tensors_are_kept() -> None:
    """Tensors that were made in inference mode have no version counter."""
    with torch.inference_mode():
        model, _ = made()
    _, x = made()
    model.ids = model.ids.clone()
    (found,), (expected,) = (torch.autograd.grad(call(x).sum(), x) for call in (layer(model), model))
    assert torch.equal(found, expected)


def test_a_replaced_weight_is_freed() -> None:
    model, x = made()
    layer(model)(x).sum().backward()
    reference = weakref.ref(model.up)
    model.up = nn.Parameter(model.up.detach().clone())
    gc.collect()
    assert reference() is None


def test_a_closed_context_drops_the_weights() -> None:
    model, _ = made()
    with discard_outputs(model):
        discarder = discarding()
        assert discarder is not None and discarder.stacked.is_unchanged(model.up)
    assert not discarder.stacked.is_unchanged(model.up)


def test_the_module_is_freed() -> None:
    model, x = made()
    layer(model)(x).sum().backward()
    references = weakref.ref(model), weakref.ref(model.up)
    del model
    x.grad = None
    gc.collect()
    assert [reference() for reference in references] == [None, None]

"""Weights of several experts in one parameter, gathered for each token: they are gathered again, where nobody wrote to
them."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import ckpt_kernels
from ckpt_kernels.memory import saved_bytes
from ckpt_kernels.recompute import discard_outputs, layer

from .conftest import DEVICE

EXPERTS, WIDTH, INNER, TOKENS = 3, 8, 16, 24
GATHERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "brackets": lambda weight, ids: weight[ids],
    "index_select": lambda weight, ids: weight.index_select(0, ids),
}


class Experts(nn.Module):
    """As transformers' `batched_mm`, and whoever writes to the weights, between the ops that read them."""

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


def copies(call: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> int:
    """How many gathered copies are kept."""
    return saved_bytes(call, x, parameters_of=model) // COPY


@pytest.mark.parametrize("gather", GATHERS)
@pytest.mark.parametrize("around", [lambda model: discard_outputs(model)(model), layer], ids=["discard", "layer"])
def test_copies_are_not_kept(gather: str, around: Callable[[Experts], Callable[[Tensor], Tensor]]) -> None:
    model, x = made(gather)
    assert copies(model, model, x) == 2
    assert copies(around(model), model, x) == 0
    assert_same_bits(gradients(around(model), model, x), gradients(model, model, x))


def test_converted() -> None:
    """And a graph that is walked twice."""
    model, x = made()
    stack = nn.ModuleList([nn.Sequential(nn.LayerNorm(WIDTH), model)]).to(DEVICE)
    ckpt_kernels.convert(stack, recompute="block")
    expected = gradients(stack[0], model, x)[1:]
    for level in ("output", "all", "layer"):
        ckpt_kernels.convert(stack, recompute=level)
        loss = stack[0](x).square().sum()
        found = [torch.autograd.grad(loss, [model.up, model.down], retain_graph=True) for _ in range(2)]
        assert copies(stack[0], stack, x) == 0
        assert_same_bits([*found[0], *found[1]], [*expected, *expected])


def writes_to(weight: nn.Parameter) -> Callable[[], None]:
    @torch.no_grad()
    def write() -> None:
        weight.mul_(0.5)

    return write


def gives(weight: nn.Parameter) -> Callable[[], None]:
    def give() -> None:
        weight.data = weight.data * 0.5

    return give


@pytest.mark.parametrize("how", [writes_to, gives])
@pytest.mark.parametrize("when", ["before", "between"])
def test_a_weight_that_changes_in_the_forward(when: str, how: Callable[[nn.Parameter], Callable[[], None]]) -> None:
    """Its copies are kept, and have the values that were there."""
    model, x = made()
    start = model.up.detach().clone()
    found = {}
    for name, call in (("layer", layer(model)), ("plain", model)):
        model.up.data.copy_(start)
        setattr(model, when, how(model.up))
        found[name] = gradients(call, model, x)
    assert_same_bits(found["layer"], found["plain"])
    assert copies(layer(model), model, x) == 1


def test_a_write_after_the_forward() -> None:
    """Is an error, as for the weight of a linear layer."""
    model, x = made()
    output = layer(model)(x)
    writes_to(model.down)()
    with pytest.raises(RuntimeError, match=r"modified by an in-?place operation"):
        output.sum().backward()


def test_what_is_known_of_no_module_is_kept() -> None:
    model, x = made()
    assert copies(discard_outputs()(model), model, x) == 2
    # Of a weight that came later from the second call on.
    copies(layer(model), model, x)
    model.up = nn.Parameter(model.up.detach().clone())
    assert [copies(layer(model), model, x) for _ in range(2)] == [1, 0]


class Own(nn.Parameter):
    """A kind of parameter of somebody's, of which it is not known where the memory is."""


def test_a_parameter_of_a_kind_of_its_own_is_not_read_again() -> None:
    model, x = made()
    model.up = Own(model.up.detach())
    assert copies(layer(model), model, x) == 1


class Table(nn.Module):
    """Reads another parameter than a stack of weights, or reads a stack and gathers nothing."""

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
def test_a_write_to_another_parameter_after_the_forward(name: str) -> None:
    """Is none of its gradient's concern, as without a layer."""
    model, x = Table(*TABLES[name]).to(DEVICE), made()[1]
    expected = gradients(model, model, x)
    output = layer(model)(x)
    writes_to(model.table)()
    assert_same_bits(list(torch.autograd.grad(output.square().sum(), [x, model.table])), expected)


def test_weights_that_were_made_in_inference_mode() -> None:
    """Have no versions, and are kept as they were gathered."""
    with torch.inference_mode():
        model, _ = made()
    _, x = made()
    model.ids = model.ids.clone()
    (found,), (expected,) = (torch.autograd.grad(call(x).sum(), x) for call in (layer(model), model))
    assert torch.equal(found, expected)


def test_a_weight_that_was_exchanged_is_not_held() -> None:
    model, x = made()
    layer(model)(x).sum().backward()
    seen = weakref.ref(model.up)
    model.up = nn.Parameter(model.up.detach().clone())
    gc.collect()
    assert seen() is None


def test_nothing_holds_the_module() -> None:
    model, x = made()
    layer(model)(x).sum().backward()
    seen = weakref.ref(model), weakref.ref(model.up)
    del model
    x.grad = None
    gc.collect()
    assert [each() for each in seen] == [None, None]

"""In-place writes: found in the code of a function, and allowed where eager torch allows them."""

import functools
import operator
import types
from collections.abc import Callable
from operator import iadd as plus
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn, relu_

import ckpt_kernels
from ckpt_kernels.convert.code.scope import Scope
from ckpt_kernels.convert.code.source import definition_of
from ckpt_kernels.convert.code.written_names import written_names

from .conftest import DEVICE
from .conversion import WIDTH, random_tensor, twins

LEVELS = ("block", "output", "all", "layer")

# The names that a function writes to


def writes_to_a_view(self, x):
    v = x.view(-1)
    v.add_(1)
    return x


def writes_after_a_call(self, x):
    h = torch.zeros_like(x)
    y = self.norm(h)
    h.add_(1)
    return y


def writes_to_an_item(self, x):
    x[0] = 0
    return x


def writes_by_iadd_as_a_method(self, x):
    x.__iadd__(1)
    return x


def writes_by_operator_iadd(self, x):
    operator.iadd(x, 1)
    return x


def writes_by_a_flag(self, x):
    return F.relu(x, True)


def writes_by_out(self, x):
    return torch.add(x, 1, out=x)


def writes_before_a_reassignment(self, x):
    h = x
    h.add_(1)
    h = h.clone()
    return h


def writes_to_a_loop_variable(self, x):
    h = torch.zeros(1)
    for h in x.unbind(0):
        h.add_(1)
    return h


def writes_to_a_copy_or_the_input(self, x):
    h = x.clone() if self.training else x
    h.add_(1)
    return h


def keeps_input_and_calls_getattr(self, x):
    flags = [getattr(self, "flag", True), True]
    return x * flags.index(True) * torch.tensor(True)


def keeps_input_and_sets_dict_items(self, x):
    tables = {}
    for key in ("a", "b"):
        tables[key] = self.get_parameter(key)
    return self.compute(x, tables)


def writes_to_an_item_of_an_unknown_object(self, x):
    tables = {}
    tables = self.find(x)
    tables[x.shape[0]] = 0
    return tables


def writes_by_a_flag_and_a_long_name(self, x):
    return torch.nn.functional.relu(x, True)


def writes_to_a_list_element(self, x):
    held = [x]
    held[0] += 1
    return x


def writes_to_a_dict_value(self, x):
    held = {"x": x}
    held["x"].mul_(2)
    return x


def writes_to_an_element_of_a_repeated_list(self, x):
    held = [x] * 2
    held[1].add_(1)
    return x


def writes_to_two_targets(self, x):
    x[..., 0], x[..., 1] = 0.0, 1.0
    return x


def writes_to_an_annotated_target(self, x):
    x[..., 0]: Tensor = 0.0
    return x


def writes_to_a_loop_target(self, x):
    for x[:, 0] in (0.0,):
        pass
    return x


def writes_to_a_view_by_einsum(self, x):
    y = torch.einsum("bd->db", x)
    y[0] = 0.0
    return x


def writes_by_a_bound_method(self, x):
    add = x.add_
    add(1)
    return x


def writes_by_a_method(self, x):
    x.add_(1)
    return x


def writes_by_getattr_with_a_computed_name(self, x):
    getattr(x, "add" + "_")(1)
    return x


def writes_to_a_maximum(self, x):
    y = max(x, 0)
    y += 1
    return x


def writes_by_an_alias_of_a_function(self, x):
    plus(x, 1)
    return x


def writes_by_a_torch_function(self, x):
    return relu_(x)


def writes_by_an_unknown_flag(self, x):
    return F.relu(x, self.flag)


def writes_by_unknown_flags(self, x):
    return F.relu(x, **self.flags)


def writes_by_setitem_as_a_method(self, x):
    x.__setitem__(0, 1)
    return x


def writes_by_operator_setitem(self, x):
    operator.setitem(x, 0, 1)
    return x


def writes_by_foreach(self, x):
    torch._foreach_mul_([x], 2)
    return x


def writes_to_the_output_of_a_module_named_like_a_function(self, x):
    y = self.pad(x)
    y += 1
    return x


def keeps_input_with_a_flag_off(self, x):
    return F.relu(x, False) + F.dropout(x, 0.5, self.training)


def keeps_input_and_extends_a_list(self, x):
    found = []
    found += [x]
    found[0] = x + 1
    return found


WRITES = {k: v for k, v in list(globals().items()) if k.startswith("writes_")}
KEEPS = {k: v for k, v in list(globals().items()) if k.startswith("keeps_")}


def written(function: types.FunctionType) -> list[str]:
    tree = definition_of(function).tree
    return list(written_names(tree, Scope(function, tree)))


@pytest.mark.parametrize("how", WRITES)
def test_in_place_writes_are_found(how: str) -> None:
    assert written(WRITES[how])


@pytest.mark.parametrize("how", KEEPS)
def test_code_that_keeps_the_input_writes_to_no_name(how: str) -> None:
    assert not written(KEEPS[how])


# Writes to the input of a norm that computes in float32: torch saves a float32 copy of a 16-bit input


def add(x: Tensor, y: Tensor) -> Tensor:
    x += y
    return x


class Adder(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return add(x, y)

    def method(self, x: Tensor, y: Tensor) -> Tensor:
        return add(x, y)

    static = staticmethod(add)


others = types.ModuleType("others")
others.add = add


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


class Layer(nn.Module):
    """A norm and a linear layer, whose output is added in place to the norm's input by what `held` holds."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(WIDTH, WIDTH), RMSNorm(), nn.Linear(WIDTH, WIDTH)
        self.held, self.name = held, "add"

    def encoded(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.second(self.norm(x))
        return self.add(x, y)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return self.held(x, y)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoded(x)


class Named(Layer):
    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return getattr(others, self.name)(x, y)


class Imported(Layer):
    def add(self, x: Tensor, y: Tensor) -> Tensor:
        from operator import iadd

        return iadd(x, y)


class InList(Layer):
    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return self.held[0](x, y)


class Parent(nn.Module):
    """Calls a method of the layers that is not their forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(operator.iadd) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer.encoded(x)
        return x


class Residual(nn.Module):
    """Layers that write to their own input, after which the first layer's input is no more what the layer received."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Branch() for _ in range(3))
        self.embedding = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        for layer in self.layers:
            x = layer(x)
        return x


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.act, self.down = RMSNorm(), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x += self.down(self.act(self.up(self.norm(x))))
        return x


WRITERS: dict[str, Callable[[], nn.Module]] = {
    "function": lambda: Layer(add),
    "object": lambda: Layer(Adder()),
    "method": lambda: Layer(Adder().method),
    "static method": lambda: Layer(Adder.static),
    "partial": lambda: Layer(functools.partial(add)),
    "operator": lambda: Layer(operator.iadd),
    "by name": lambda: Named(None),
    "imported": lambda: Imported(None),
    "in a list": lambda: InList([Adder()]),
    "method of a child": Parent,
    "layers": Residual,
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("writer", WRITERS)
def test_a_norms_input_may_be_written_to(writer: str, level: str) -> None:
    model, converted = (m.to(DEVICE, torch.bfloat16) for m in twins(WRITERS[writer]))
    ckpt_kernels.convert(converted, recompute=level)
    assert_same_gradients(model, converted)


@pytest.mark.parametrize("level", LEVELS)
def test_a_writer_may_come_after_the_conversion(level: str) -> None:
    model, converted = (m.to(DEVICE, torch.bfloat16) for m in twins(lambda: Layer(torch.add)))
    ckpt_kernels.convert(converted, recompute=level)
    for each in (model, converted):
        each.held = operator.iadd
    assert_same_gradients(model, converted)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_an_input_without_a_gradient_may_be_written_to(level: str, dtype: torch.dtype) -> None:
    """Torch saves only the normalized rows, for the gradient of the weight."""
    model, converted = (m.to(DEVICE, dtype) for m in twins(lambda: nn.Sequential(RMSNorm())))
    assert ckpt_kernels.convert(converted, recompute=level).replaced
    gradients = []
    for each in (model, converted):
        x = random_tensor(5, WIDTH).to(dtype)
        output = each(x)
        x.zero_()
        gradients += torch.autograd.grad(output.float().square().mean(), list(each.parameters()))
    expected, found = gradients
    assert (found.double() - expected.double()).norm() <= 2 * torch.finfo(dtype).eps * expected.double().norm()


def assert_same_gradients(model: nn.Module, converted: nn.Module) -> None:
    """Asserts gradients within a few roundings of bfloat16."""
    x = random_tensor(5, WIDTH).bfloat16()
    for each in (model, converted):
        each(x).float().square().mean().backward()
    for (name, p), q in zip(model.named_parameters(), converted.parameters(), strict=True):
        error, size = (p.grad.double() - q.grad.double()).norm(), p.grad.double().norm()
        assert error <= 2 * torch.finfo(torch.bfloat16).eps * size, name

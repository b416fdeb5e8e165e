"""Replacements after or before `convert`: other code, weights and names, and functions in place of torch's."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import layer_norm as layer_norm_by_name

import ckpt_kernels
from ckpt_kernels.convert.swap import is_patched

from .conftest import DEVICE
from .conversion import WIDTH, close, replacement_of, results_of
from .test_convert_source import kept, twins
from .test_convert_tried import found_in, rows

LEVELS = ("block", "output", "all")
linear, torch_chunk = F.linear, torch.chunk


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.packed, self.act, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.chunk(self.packed(x), 2, -1)
        return self.down(self.act(a) * b)


def alike(
    kind: Callable[[], nn.Module],
    change: Callable[[nn.Module], None] = lambda model: None,
    undo: Callable[[], None] = lambda: None,
) -> bool:
    """Whether a twin that is converted before or after a change of both gives the same results as the model."""
    for level in LEVELS:
        for after in (True, False):
            model, converted = twins(kind)
            for step in (ckpt_kernels.convert, change) if after else (change, ckpt_kernels.convert):
                step(converted, recompute=level) if step is ckpt_kernels.convert else step(converted)
            change(model)
            same = close(results_of(converted, rows()), results_of(model, rows()))
            undo()
            if not same:
                return False
    return True


# The code of a layer


def conv1d() -> type[nn.Module]:
    return pytest.importorskip("transformers.pytorch_utils").Conv1D


class Transposed(nn.Module):
    def __init__(self, kind: type[nn.Module] | None = None) -> None:
        super().__init__()
        kind = kind or conv1d()
        self.up, self.act, self.down = kind(2 * WIDTH, WIDTH), nn.GELU(), kind(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


def twice_transposed(self: Any, x: Tensor) -> Tensor:
    return (x @ self.weight + self.bias) * 2


def twice_linear(self: Any, x: Tensor) -> Tensor:
    return linear(x, self.weight, self.bias) * 2


def test_a_transposed_linear_layer_is_fused() -> None:
    model, converted = twins(Transposed)
    assert found_in(ckpt_kernels.convert(converted, recompute="block")) == {"": "MLP", "act": "bias_act (gelu)"}
    assert close(results_of(converted, rows()), results_of(model, rows()))
    assert kept(converted, rows()) <= kept(model, rows())


@pytest.mark.parametrize("how", ["forward", "code", "subclass"])
@pytest.mark.parametrize("layer", ["Linear", "Conv1D"])
def test_a_layer_with_replaced_code(layer: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, twice = (nn.Linear, twice_linear) if layer == "Linear" else (conv1d(), twice_transposed)

    def change(model: nn.Module) -> None:
        if how == "forward":
            monkeypatch.setattr(kind, "forward", twice)
        elif how == "code":
            monkeypatch.setattr(kind.forward, "__code__", twice.__code__)
            monkeypatch.setitem(kind.forward.__globals__, "linear", linear)

    subclass = type(layer, (kind,), {"forward": twice, "__module__": kind.__module__})
    for after in (True, False):
        if layer == "Linear":
            model = MLP()
            if how == "subclass":
                model.up.__class__ = model.down.__class__ = subclass
        else:
            model = Transposed(subclass if how == "subclass" else None)
        model.to(DEVICE)
        converted = copy.deepcopy(model)
        with monkeypatch.context():
            if after:
                ckpt_kernels.convert(converted)
            change(model)
            if not after:
                ckpt_kernels.convert(converted)
            assert close(results_of(converted, rows()), results_of(model, rows()))
        monkeypatch.undo()


def decorated(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def wrapper(self: nn.Module, *args: Any) -> Tensor:
        return function(self, *args)

    return wrapper


class Decorated(MLP):
    @decorated
    def forward(self, x: Tensor, scale: float = 1.0, *, shift: float = 0.0) -> Tensor:
        return self.down(self.act(self.up(x))) * scale + shift


def twice_decorated(self: nn.Module, x: Tensor, scale: float = 1.0, *, shift: float = 0.0) -> Tensor:
    return self.down(self.act(self.up(x))) * 2 * scale + shift


@pytest.mark.parametrize(
    "attribute, value",
    [("__code__", twice_decorated.__code__), ("__defaults__", (3.0,)), ("__kwdefaults__", {"shift": 1.0})],
)
def test_the_function_behind_a_decorator_is_changed(
    attribute: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, converted = twins(Decorated)
    assert found_in(ckpt_kernels.convert(converted))[""] == "MLP"
    monkeypatch.setattr(vars(Decorated.forward)["__wrapped__"], attribute, value)
    assert close(results_of(converted, rows()), results_of(model, rows()))


def negated(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrapper(self: nn.Module, *args: Any) -> Tensor:
        return -function(self, *args)

    return wrapper


def test_the_code_of_a_decorator_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, converted = twins(Decorated)
    assert found_in(ckpt_kernels.convert(converted))[""] == "MLP"
    monkeypatch.setattr(Decorated.forward, "__code__", negated(torch.relu).__code__)
    assert close(results_of(converted, rows()), results_of(model, rows()))


def test_torchs_forward_replaced_by_another_of_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, converted = twins(MLP)
    ckpt_kernels.convert(converted)
    monkeypatch.setattr(nn.Linear, "forward", nn.Identity.forward)
    converted_later = copy.deepcopy(model)
    ckpt_kernels.convert(converted_later)
    for module in (converted, converted_later):
        torch.testing.assert_close(module(rows()), model(rows()))


# The weights of a layer


def shadowing(name: str, layer: str = "up") -> Callable[[nn.Module], None]:
    """A change that sets an instance attribute with the name of a parameter, as fast weights in meta-learning do."""

    def shadow(model: nn.Module) -> None:
        held = getattr(getattr(model, layer), name)
        object.__setattr__(
            getattr(model, layer), name, torch.linspace(-1, 1, held.numel(), device=DEVICE).view(held.shape)
        )

    return shadow


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.LayerNorm(WIDTH), nn.GELU(), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = x + x.sin()
        return self.down(h) + self.act(self.up(h))


@pytest.mark.parametrize("kind", [MLP, Transposed, Normed])
@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("layer", ["up", "down"])
def test_instance_attributes_that_shadow_parameters(kind: type[nn.Module], name: str, layer: str) -> None:
    assert alike(kind, shadowing(name, layer))


def test_weights_that_are_plain_tensors() -> None:
    def change(model: nn.Module) -> None:
        weight = model.up.weight.detach() * 2
        del model.up._parameters["weight"]
        model.up.weight = weight

    assert alike(MLP, change)


@pytest.mark.parametrize("kind", [nn.Linear, nn.LayerNorm])
def test_weights_as_class_attributes_or_properties(kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []

    def weight(self: nn.Module) -> Tensor:
        loads.append("weight")
        return self._parameters["weight"] * 2

    for held in (property(weight), torch.ones((WIDTH, WIDTH) if kind is nn.Linear else WIDTH, device=DEVICE)):
        make = MLP if kind is nn.Linear else Normed
        assert alike(make, lambda _, h=held: monkeypatch.setattr(kind, "weight", h, raising=False), monkeypatch.undo)
    model, converted = twins(MLP)
    ckpt_kernels.convert(converted)
    monkeypatch.setattr(nn.Linear, "weight", property(weight), raising=False)
    loads.clear()
    model(rows())
    count = len(loads)
    converted(rows())
    assert len(loads) == 2 * count


# Names that are bound to other objects


class Swapped:
    """Stands in for the module torch."""

    @staticmethod
    def chunk(x: Tensor, n: int, dim: int) -> tuple[Tensor, ...]:
        return tuple(reversed(x.chunk(n, dim)))


class Shadowed(Packed):
    def forward(self, x: Tensor, torch: Any = Swapped) -> Tensor:
        a, b = torch.chunk(self.packed(x), 2, -1)
        return self.down(self.act(a) * b)


class Local(Packed):
    def forward(self, x: Tensor) -> Tensor:
        torch = Swapped
        a, b = torch.chunk(self.packed(x), 2, -1)
        return self.down(self.act(a) * b)


class ByAnotherName(Packed):
    def forward(self, x: Tensor) -> Tensor:
        a, b = torch_chunk(self.packed(x), chunks=2, dim=-1)
        return self.down(self.act(a) * b)


@pytest.mark.parametrize("kind", [Shadowed, Local, ByAnotherName, Packed])
def test_chunk_is_the_function_that_the_name_is_bound_to(kind: type[nn.Module]) -> None:
    assert alike(kind)
    found = replacement_of(ckpt_kernels.convert(kind(), recompute="block"), "") or ""
    assert ("packed gated MLP" in found) is (kind in (ByAnotherName, Packed))


class Reversed(Tensor):
    """A tensor whose method chunk returns the parts in reverse."""

    def chunk(self, chunks: int, dim: int = 0) -> tuple[Tensor, ...]:
        return tuple(reversed(super().chunk(chunks, dim)))


class Method(Packed):
    def forward(self, x: Tensor) -> Tensor:
        a, b = self.packed(x).chunk(2, -1)
        return self.down(self.act(a) * b)


def test_a_tensor_subclass_with_its_own_chunk() -> None:
    model, converted = twins(Method)
    assert "packed gated MLP" in replacement_of(ckpt_kernels.convert(converted), "")
    torch.testing.assert_close(converted(rows()), model(rows()))
    torch.testing.assert_close(converted(rows().as_subclass(Reversed)), model(rows().as_subclass(Reversed)))


def clone(x: Tensor) -> Tensor:
    return x.view_as(x)


class InFloat32(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * h.to(x.dtype)


class WritesToItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(WIDTH, WIDTH), InFloat32()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        n = self.norm(x)
        y = clone(x)
        y += 1
        return n + y


def test_a_function_named_clone_that_returns_a_view() -> None:
    model, converted = twins(lambda: WritesToItsInput().to(torch.bfloat16))
    assert replacement_of(ckpt_kernels.convert(converted), "norm")
    input = rows().to(torch.bfloat16)
    assert close(results_of(converted, input), results_of(model, input), 0.02)


# Functions in place of torch's


class Written(nn.Module):
    """Calls torch's functions, one of them by a name of this file."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = F.rms_norm(layer_norm_by_name(x, (WIDTH,)), (WIDTH,))
        return self.down(F.silu(self.up(h))) + F.gelu(h)


def leaves() -> nn.Module:
    return nn.Sequential(
        nn.LayerNorm(WIDTH), nn.SiLU(), nn.RMSNorm(WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.Mish()
    )


_PATCHED = [(F, name) for name in ("linear", "gelu", "silu", "layer_norm", "rms_norm", "mish")]
_PATCHED += [(torch, "layer_norm"), (torch, "rms_norm"), (torch, "chunk"), (Tensor, "chunk"), (Tensor, "__mul__")]


def test_the_class_of_an_activation_becomes_a_subclass() -> None:
    model, converted = twins(MLP)
    assert found_in(ckpt_kernels.convert(converted))[""] == "MLP"
    for mlp in (model, converted):
        mlp.act.__class__ = type("Other", (type(mlp.act),), {"forward": lambda self, x: x.sin()})
    assert close(results_of(converted, rows()), results_of(model, rows()))


def test_the_forward_is_replaced_between_two_conversions(monkeypatch: pytest.MonkeyPatch) -> None:
    ckpt_kernels.convert(MLP())
    monkeypatch.setattr(MLP, "forward", twice_decorated)
    model, converted = twins(MLP)
    assert found_in(ckpt_kernels.convert(converted))[""] == "MLP"
    assert not is_patched(type(converted))
    assert close(results_of(converted, rows()), results_of(model, rows()))


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d])
def test_the_forward_of_a_norm_in_a_chain_is_replaced(kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    def made() -> nn.Module:
        return nn.Sequential(kind(WIDTH) if kind is not nn.GroupNorm else kind(2, WIDTH), nn.GELU())

    model, converted = twins(made)
    assert "norm" in found_in(ckpt_kernels.convert(converted))[""]
    monkeypatch.setattr(kind, "forward", lambda self, x: x.sin())
    x = rows()[0].view(-1, WIDTH, 1) if kind is not nn.LayerNorm else rows()
    assert close(results_of(converted, x), results_of(model, x))


class Sigmoidal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


def test_the_forward_of_an_activation_in_an_mlp_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def made() -> nn.Module:
        mlp = MLP()
        mlp.act = Sigmoidal()
        return mlp

    model, converted = twins(made)
    assert found_in(ckpt_kernels.convert(converted))[""] == "MLP"
    monkeypatch.setattr(Sigmoidal, "forward", lambda self, x: x.sin())
    assert close(results_of(converted, rows()), results_of(model, rows()))


class WrittenByMethods(nn.Module):
    """Calls methods of tensors, some of which Tensor inherits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = RootOfSquare(), RootOfPower(), Clamped()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.first(x), self.second(x), self.third(x.repeat(1, 2))], dim=-1)


class RootOfSquare(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return -x * -torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class RootOfPower(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt((x**2).mean(-1, keepdim=True) + 1e-6)


class Clamped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate.clamp(max=7.0)) * value.clamp(-7.0, 7.0)


_INHERITED = [(Tensor, name) for name in ("square", "__neg__", "__pow__", "clamp", "mean")]


@pytest.mark.parametrize(
    ("kind", "holder", "name"),
    [(kind, *patched) for kind in (MLP, Packed, Method, Written, leaves) for patched in _PATCHED]
    + [(WrittenByMethods, *patched) for patched in _INHERITED],
)
def test_patched_functions_of_torch_run(
    kind: Callable[[], nn.Module], holder: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    function = getattr(holder, name)

    def other(*args: Any, **kwargs: Any) -> Any:
        found = function(*args, **kwargs)
        return tuple(reversed(found)) if isinstance(found, tuple) else found + found

    def change(model: nn.Module) -> None:
        monkeypatch.setattr(holder, name, other)

    for after in (True, False):
        model, converted = twins(kind)
        if after:
            ckpt_kernels.convert(converted)
        change(model)
        if not after:
            ckpt_kernels.convert(converted)
        patched = results_of(model, rows())
        assert close(results_of(converted, rows()), patched)
        monkeypatch.undo()
        assert close(results_of(converted, rows()), results_of(model, rows()))


class GroupedByFunction(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, WIDTH)


def test_one_value_for_each_group_is_torchs_error() -> None:
    model, converted = twins(GroupedByFunction)
    assert replacement_of(ckpt_kernels.convert(converted), "") == "group_norm"
    messages = set()
    for each in (model, converted):
        with pytest.raises(ValueError, match="Expected more than 1 value") as error:
            each(torch.randn(1, WIDTH, 1))
        messages.add(str(error.value))
    assert len(messages) == 1

"""What a converted model keeps: whatever is in the place of what it was known by, code, functions, weights, names; the
order in which it was written; what its outputs, copies and scripts are; and what torch refuses."""

import ast
import contextlib
import copy
import copyreg
import gc
import inspect
import pickle
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import layer_norm as layer_norm_by_name

import ckpt_kernels
from ckpt_kernels.convert import order

from .conftest import DEVICE
from .test_convert_composes import close
from .test_convert_rules import WIDTH, by, run
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
    """Whether a twin computes what the model does, converted before and after a change of both."""
    for level in LEVELS:
        for after in (True, False):
            model, converted = twins(kind)
            for step in (ckpt_kernels.convert, change) if after else (change, ckpt_kernels.convert):
                step(converted, recompute=level) if step is ckpt_kernels.convert else step(converted)
            change(model)
            same = close(run(converted, rows()), run(model, rows()))
            undo()
            if not same:
                return False
    return True


# What a layer is known by


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


def test_a_transposed_layer_is_fused_while_it_is_as_it_was_written() -> None:
    model, converted = twins(Transposed)
    assert found_in(ckpt_kernels.convert(converted, recompute="block")) == {"": "MLP", "act": "bias_act (gelu)"}
    assert close(run(converted, rows()), run(model, rows()))
    assert kept(converted, rows()) <= kept(model, rows())


@pytest.mark.parametrize("how", ["forward", "code", "subclass"])
@pytest.mark.parametrize("layer", ["Linear", "Conv1D"])
def test_a_layer_whose_code_is_another(layer: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
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
            assert close(run(converted, rows()), run(model, rows()))
        monkeypatch.undo()


def test_a_forward_of_torchs_in_the_place_of_another_of_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, converted = twins(MLP)
    ckpt_kernels.convert(converted)
    monkeypatch.setattr(nn.Linear, "forward", nn.Identity.forward)
    again = copy.deepcopy(model)
    ckpt_kernels.convert(again)
    for each in (converted, again):
        torch.testing.assert_close(each(rows()), model(rows()))


# What is read of a layer


def fast(name: str, layer: str = "up") -> Callable[[nn.Module], None]:
    def lay_over(model: nn.Module) -> None:
        held = getattr(getattr(model, layer), name)
        object.__setattr__(
            getattr(model, layer), name, torch.linspace(-1, 1, held.numel(), device=DEVICE).view(held.shape)
        )

    return lay_over


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
def test_weights_that_are_laid_over_the_parameters(kind: type[nn.Module], name: str, layer: str) -> None:
    assert alike(kind, fast(name, layer))


def test_weights_that_are_no_parameters_any_more() -> None:
    def change(model: nn.Module) -> None:
        weight = model.up.weight.detach() * 2
        del model.up._parameters["weight"]
        model.up.weight = weight

    assert alike(MLP, change)


@pytest.mark.parametrize("kind", [nn.Linear, nn.LayerNorm])
def test_weights_that_a_class_has_or_computes(kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
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


# Names that stand for something else


class Swapped:
    """In the place of torch."""

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
def test_halves_are_made_by_what_their_name_stands_for(kind: type[nn.Module]) -> None:
    assert alike(kind)
    found = by(ckpt_kernels.convert(kind(), recompute="block"), "") or ""
    assert ("packed gated MLP" in found) is (kind in (ByAnotherName, Packed))


class Reversed(Tensor):
    """Whose halves come the other way round."""

    def chunk(self, chunks: int, dim: int = 0) -> tuple[Tensor, ...]:
        return tuple(reversed(super().chunk(chunks, dim)))


class Method(Packed):
    def forward(self, x: Tensor) -> Tensor:
        a, b = self.packed(x).chunk(2, -1)
        return self.down(self.act(a) * b)


def test_a_subclass_of_tensor_with_methods_of_its_own() -> None:
    model, converted = twins(Method)
    assert "packed gated MLP" in by(ckpt_kernels.convert(converted), "")
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


def test_a_function_that_bears_the_name_of_one_that_makes_a_tensor() -> None:
    model, converted = twins(lambda: WritesToItsInput().to(torch.bfloat16))
    assert by(ckpt_kernels.convert(converted), "norm")
    input = rows().to(torch.bfloat16)
    assert close(run(converted, input), run(model, input), 0.02)


# Functions in the place of torch's


class Written(nn.Module):
    """With functions of torch, and by a name of its own file."""

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


@pytest.mark.parametrize("kind", [MLP, Packed, Method, Written, leaves])
@pytest.mark.parametrize("holder, name", _PATCHED)
def test_functions_that_are_in_the_place_of_torchs(
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
        patched = run(model, rows())
        assert close(run(converted, rows()), patched)
        monkeypatch.undo()
        assert close(run(converted, rows()), run(model, rows()))


# The order in which Python evaluates


class Value:
    """Of which everything can be done."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def _same(self, *_: Any, **__: Any) -> "Value":
        return self

    def __setattr__(self, name: str, value: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def __iter__(self) -> Iterator["Value"]:
        return iter([self, self])

    __call__ = __getitem__ = __add__ = __radd__ = __iadd__ = __neg__ = __mul__ = __lt__ = _same


_STATEMENTS = """f(1) + f(2) * -f(3)
f(1)(f(2), *f(3), a=f(4), b=f(5))
f(1)(f(2), a=f(4), *f(3))
f(1).a(f(2)).b(f(3))
(f(1), [f(2), {f(3)}], f(4)[f(5)])
f(1)[f(2) : f(3) : f(4), f(5)]
x = f(1)
f(1)[f(2)] = f(3)
f(1).a = f(2)
f(1)[f(2)] = f(3).b = x = f(4)
f(1)[f(2)], f(3).a = f(4)
(f(1)[f(2)], [f(3).a, y]), x = f(4)
f(1)[f(2)] += f(3)
f(1)[f(2)].a += f(3)
x += f(1)
f(1)[f(2)]: f(9) = f(3)
x: f(9) = f(1)
f(1) if f(2) else f(3)
f(1) and f(2) and f(3)
f(1) < f(2) < f(3)
(z := f(1)) + f(2)
return f(1)[f(2)]""".split("\n")


@pytest.mark.parametrize("statement", _STATEMENTS)
def test_the_order_is_that_of_python(statement: str) -> None:
    done: list[int] = []
    names: dict[str, Any] = {}
    exec(f"def run(f, x):\n    {statement}", names)
    names["run"](lambda number: (done.append(number), Value())[1], Value())
    tree = ast.parse(f"def run(f, x):\n    {statement}").body[0].body[0]
    known = [
        node.args[0].value
        for node in order.in_order(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "f"
    ]
    certain = not any(word in statement for word in (" if ", " and ", " < "))
    assert known == (done if certain else done[: len(known)])
    assert known


class Routed(MLP):
    """Whose layers change places as it goes."""

    def __init__(self) -> None:
        super().__init__()
        self.other, self.out = nn.Linear(WIDTH, WIDTH), [0.0]

    def route(self, index: int = 0) -> int:
        self.down, self.other = self.other, self.down
        return index


class AugmentedItem(Routed):
    def forward(self, x: Tensor) -> Tensor:
        out = [0.0]
        h = self.act(self.up(x))
        out[self.route()] += self.down(h)
        return out[0]


class AugmentedAttribute(Routed):
    @property
    def total(self) -> Any:
        self.route()
        return 0.0

    @total.setter
    def total(self, value: Tensor) -> None:
        self.out[0] = value

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.up(x))
        self.total += self.down(h)
        return self.out[0]


class Item(Routed):
    def forward(self, x: Tensor) -> Tensor:
        out = [0.0]
        h = self.act(self.up(x))
        out[self.route()] = self.down(h)
        return out[0] + self.down(x)


class Keyword(Routed):
    def add(self, *parts: Any, **named: Any) -> Tensor:
        return sum(part for part in (*parts, *named.values()) if isinstance(part, Tensor))

    def parts(self) -> Iterator[Any]:
        yield self.route()

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.up(x))
        y = self.add(*self.parts(), y=self.down(h))
        h = self.act(self.up(x))
        return y + self.add(z=self.route(), y=self.down(h))


class Conditional(Routed):
    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.up(x))
        y = self.down(h) if self.route() else self.down(h + 1)
        h = self.act(self.up(x))
        z = self.route() or self.down(h)
        return y + z


class Walrus(Routed):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        y = self.norm(h + (h := h.sin()))
        return y + self.down(self.act(self.up(h)))


_ORDERED = [AugmentedItem, AugmentedAttribute, Item, Keyword, Conditional, Walrus]


@pytest.mark.parametrize("kind", _ORDERED)
def test_what_is_written_first_is_evaluated_first(kind: type[nn.Module]) -> None:
    def without_gradients(model: nn.Module) -> None:
        model.requires_grad_(False)

    assert alike(kind)
    assert alike(kind, without_gradients)


# What names stand for afterwards


class Chained(MLP):
    def forward(self, x: Tensor) -> Tensor:
        store: dict[Any, Tensor] = {}
        h = self.act(self.up(x))
        y = self.down(h)
        store[h] = h = y
        return next(iter(store)) + h


class ChainedLast(MLP):
    def forward(self, x: Tensor) -> Tensor:
        store: dict[Any, Tensor] = {}
        h = self.act(self.up(x))
        store[h] = h = self.down(h)
        return next(iter(store)) + h


class Augmented(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.down.requires_grad_(False)  # for which the input, to which is written, is not kept

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.up(x))
        y = self.down(h)
        h += 1
        h = y
        return h


class AugmentedLast(Augmented):
    def forward(self, x: Tensor) -> Tensor:
        held = []
        for _ in range(2):
            h = self.act(self.up(x))
            h += self.down(h)
            held.append(h)
        return held[0] + held[1]


class Broken(MLP):
    def forward(self, x: Tensor) -> Tensor:
        h = x
        for index in range(2):
            h = self.act(self.up(x))
            y = self.down(h)
            if index:
                break
            h = y
        return h + y


class Suppressed(MLP):
    def forward(self, x: Tensor) -> Tensor:
        h = x
        with contextlib.suppress(KeyError):
            h = self.act(self.up(x))
            y = self.down(h)
            {}["nothing"]
            h = y
        return h + y


_NAMED = [Chained, ChainedLast, Augmented, AugmentedLast, Broken, Suppressed]


@pytest.mark.parametrize("kind", _NAMED)
def test_names_that_are_read_afterwards(kind: type[nn.Module]) -> None:
    assert alike(kind)


# Outputs are no views where torch's are none


class OverChannels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(16)), nn.Parameter(torch.rand(16))

    def forward(self, x: Tensor) -> Tensor:
        u = x.mean(1, keepdim=True)
        x = (x - u) / torch.sqrt((x - u).pow(2).mean(1, keepdim=True) + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class OverRows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(16))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Quick(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class SumAndNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + x)


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return self.act(a) * b


_KINDS: dict[str, Callable[[], nn.Module]] = {
    "over channels": OverChannels,
    "over rows": OverRows,
    "quick": Quick,
    "sum and norm": SumAndNorm,
    "gate": Gate,
    "layer norm": lambda: nn.LayerNorm(16),
    "rms norm": lambda: nn.RMSNorm(16),
    "group norm": lambda: nn.GroupNorm(4, 16),
    "batch norm 1d": lambda: nn.BatchNorm1d(16),
    "batch norm 2d": lambda: nn.BatchNorm2d(16),
    "instance norm 1d": lambda: nn.InstanceNorm1d(16, affine=True),
    "instance norm 2d": lambda: nn.InstanceNorm2d(16, affine=True),
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "glu": nn.GLU,
    "dropout": lambda: nn.Dropout(0.3),
    "norm and gelu": lambda: nn.Sequential(nn.LayerNorm(16), nn.GELU()),
    "norm and silu": lambda: nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU()),
    "norm and relu": lambda: nn.Sequential(nn.BatchNorm2d(16), nn.ReLU()),
    "gelu and dropout": lambda: nn.Sequential(nn.GELU(), nn.Dropout(0.3)),
}


def layouts() -> dict[str, Tensor]:
    last = torch.channels_last
    made = {
        "vector": torch.randn(16),
        "rows": torch.randn(5, 16),
        "columns": torch.randn(16, 5).t(),
        "samples of rows": torch.randn(2, 5, 16),
        "rows of samples": torch.randn(5, 2, 16).transpose(0, 1),
        "channels": torch.randn(2, 16, 6),
        "channels that lie last": torch.randn(2, 6, 16).transpose(1, 2),
        "map": torch.randn(2, 16, 4, 4),
        "map that lies last": torch.randn(2, 16, 4, 4).to(memory_format=last),
        "point": torch.randn(2, 16, 1, 1),
        "part of a map": torch.randn(2, 32, 4, 4)[:, :16],
        "heads": torch.randn(2, 4, 5, 16).transpose(1, 2),
        "one sample": torch.randn(16, 4, 4),
    }
    return {name: tensor.to(DEVICE) for name, tensor in made.items()}


def made_of(module: nn.Module, input: Tensor, grad: bool) -> Tensor | type[Exception]:
    try:
        with torch.set_grad_enabled(grad):
            return module(input.detach().requires_grad_(grad))
    except (RuntimeError, ValueError, IndexError) as error:
        return type(error)


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_are_no_views_where_they_were_none(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(_KINDS[kind]()).to(DEVICE, dtype)
    converted = copy.deepcopy(model)
    ckpt_kernels.convert(converted)
    for name, input in layouts().items():
        for grad in (True, False):
            theirs, ours = (made_of(each, input.to(dtype), grad) for each in (model, converted))
            if not isinstance(theirs, Tensor):
                assert ours is theirs, name
                continue
            assert theirs._is_view() or not ours._is_view(), name
            if not theirs._is_view():
                ours.detach_().mul_(torch.ones((), device=DEVICE, requires_grad=True))


# Attributes of any name


class Named(nn.Module):
    """Whose attributes are called as nn.Module's methods are."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            object.__setattr__(self, name, [name])
        self.inplace = torch.tensor([True, False])
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + x)


class NamedAct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parameters, self.children = {"beta": 1.0}, ["none"]

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


_METHODS = "parameters modules children named_modules named_parameters named_children buffers named_buffers".split()


@pytest.mark.parametrize("name", _METHODS)
def test_attributes_may_be_called_as_methods_of_modules_are(name: str) -> None:
    with torch.device(DEVICE):
        model = nn.Sequential(Named(name), NamedAct(), nn.ModuleList([Named(name)]))
    model.forward = None
    del model.forward
    first = nn.Sequential(model[0], model[1])
    expected = first(rows())
    report = ckpt_kernels.convert(model)
    assert by(report, "0.norm") and by(report, "2.0.norm")
    torch.testing.assert_close(first(rows()), expected)
    ckpt_kernels.convert(model, include=[Named], exclude=["1"])
    ckpt_kernels.revert(model)
    assert not any(map(ckpt_kernels.is_converted, (model[0], model[1], model[0].norm, model[2][0])))


@pytest.mark.parametrize("setting", [torch.tensor([True, False]), torch.tensor([0.5, 0.1]), [], "no", 1])
def test_settings_of_any_kind_are_no_error(setting: Any) -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.GLU(), nn.LeakyReLU(), nn.Linear(8, 8), nn.GELU(), nn.Softplus())
    model[0].p = model[1].dim = model[2].negative_slope = model[4].approximate = model[5].beta = setting
    for module in model:
        module.inplace = module.gradient_checkpointing = module.track_running_stats = setting
    ckpt_kernels.convert(model)


# Copies


class WithArguments(nn.Module):
    def __new__(cls, width: int) -> "WithArguments":
        made = super().__new__(cls)
        made.made_with = width
        return made

    def __getnewargs__(self) -> tuple[int]:
        return (self.width,)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.norm = width, nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + x)


class WithKeywords(WithArguments):
    def __new__(cls, *, width: int) -> "WithKeywords":
        return super().__new__(cls, width)

    def __getnewargs_ex__(self) -> tuple[tuple, dict[str, int]]:
        return (), {"width": self.width}

    def __init__(self, *, width: int) -> None:
        super().__init__(width)


class Registered(WithArguments):
    """For which a reducer is registered, without which it cannot be pickled."""

    def __new__(cls) -> "Registered":
        return super().__new__(cls, WIDTH)

    def __getnewargs__(self) -> tuple:
        return ()

    def __init__(self) -> None:
        super().__init__(WIDTH)
        self.cache = lambda: 1


def registered(state: dict[str, Tensor]) -> Registered:
    made = Registered()
    made.load_state_dict(state)
    return made


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled])
@pytest.mark.parametrize("make", [lambda: WithArguments(WIDTH), lambda: WithKeywords(width=WIDTH)])
def test_copies_are_made_with_what_their_class_is_made_with(make: Callable, copied: Callable) -> None:
    model = make().to(DEVICE)
    expected = model(rows())
    ckpt_kernels.convert(model)
    made = copied(model)
    assert type(made) is type(model) and made.made_with == WIDTH
    torch.testing.assert_close(made(rows()), expected)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_reducer_that_is_registered_for_a_class(when: str, copied: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copyreg, "dispatch_table", copyreg.dispatch_table.copy())
    model = nn.Sequential(Registered()).to(DEVICE)
    expected = model(rows())
    reducer = copyreg.dispatch_table
    if when == "after":
        ckpt_kernels.convert(model)
    pairs = [(Registered, lambda module: (registered, (module.state_dict(),)))]
    for kind, reduce in pairs:
        copyreg.pickle(kind, reduce)
    if when == "before":
        ckpt_kernels.convert(model)
    try:
        made = model[0].__reduce_ex__(4)
        assert made[0] is registered
        again = made[0](*made[1]).to(DEVICE)
        torch.testing.assert_close(again(rows()), expected)
        if copied is copy.deepcopy:
            torch.testing.assert_close(copied(model).to(DEVICE)(rows()), expected)
    finally:
        reducer.pop(Registered, None)


# Scripts


class Scripted(nn.Module):
    """Which names globals of its file, one of them by a name that a wrapper might use."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.norm = MLP(), nn.LayerNorm(WIDTH)
        self.layers = nn.ModuleList([nn.LayerNorm(WIDTH), MLP()])

    def helped(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(x + x))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.mlp(self.helped(x))


_SCRIPTED = [
    MLP,
    Scripted,
    OverRows,
    lambda: nn.Sequential(nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 16), nn.ReLU()),
    lambda: nn.Sequential(nn.Linear(16, 16), Quick(), nn.Dropout(0.0)),
]


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", _SCRIPTED)
def test_a_converted_model_is_scripted_as_the_original_is(kind: Callable[[], nn.Module], level: str) -> None:
    model, converted = twins(kind)
    ckpt_kernels.convert(converted, recompute=level)
    input = torch.randn(4, next(model.parameters()).shape[-1], device=DEVICE)
    torch.testing.assert_close(torch.jit.script(converted)(input), torch.jit.script(model)(input))
    assert ckpt_kernels.is_converted(next(m for m in converted.modules() if ckpt_kernels.is_converted(m)))
    torch.testing.assert_close(converted(input), model(input))


# Finalizers


class Counted(nn.Module):
    live = 0

    def __init__(self) -> None:
        super().__init__()
        Counted.live += 1

    def __del__(self) -> None:
        Counted.live -= 1

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class CountedNorm(Counted):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


@pytest.mark.parametrize("kind", [Counted, CountedNorm])
def test_finalizers_run_for_the_modules_that_there_were(kind: type[nn.Module]) -> None:
    gc.collect()
    before = Counted.live
    model = nn.Sequential(nn.LayerNorm(16), kind())
    report = ckpt_kernels.convert(model)
    gc.collect()
    assert Counted.live == before + 1
    assert "finalizer" in {entry.name: entry.reason for entry in report.left_alone}.get("1", "finalizer")
    assert kind is Counted or by(report, "1") is None


# Frames


def names_of_the_caller() -> list[str]:
    return sorted(inspect.currentframe().f_back.f_locals)


def names_two_above() -> list[str]:
    return sorted(sys._getframe(1).f_locals)


class Looked(MLP):
    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.up(x))
        y = self.down(h)
        self.seen = names_of_the_caller()
        return y


class LookedAt(MLP):
    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.up(x))
        y = self.down(h)
        self.seen = names_two_above()
        return y


@pytest.mark.parametrize("kind", [Looked, LookedAt])
def test_functions_that_look_at_the_frame_that_calls_them(kind: type[nn.Module]) -> None:
    model, converted = twins(kind)
    ckpt_kernels.convert(converted)
    torch.testing.assert_close(converted(rows()), model(rows()))
    assert converted.seen == model.seen


# What torch refuses


def mean_only(norm: nn.Module) -> None:
    norm.running_mean = None


def variance_only(norm: nn.Module) -> None:
    norm.running_var = None


def wide(norm: nn.Module) -> None:
    norm.running_mean = norm.running_mean.double()


def wants_gradients(norm: nn.Module) -> None:
    norm.running_var.requires_grad_()


def longer(norm: nn.Module) -> None:
    norm.running_mean = torch.zeros(2 * WIDTH, device=DEVICE)


def momentum_is_a_tensor(norm: nn.Module) -> None:
    norm.momentum = torch.tensor(0.5)


class ByFunction(nn.Module):
    """A batch norm that calls torch's function itself."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.act = norm, nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, True, 0.1)


_REFUSED = [mean_only, variance_only, wide, wants_gradients, longer, momentum_is_a_tensor]


@pytest.mark.parametrize("around", [nn.Sequential, lambda norm: nn.Sequential(norm, nn.ReLU()), ByFunction])
@pytest.mark.parametrize(
    "kind", [nn.BatchNorm1d, lambda width: nn.InstanceNorm1d(width, True, track_running_stats=True)]
)
@pytest.mark.parametrize("change", _REFUSED)
def test_running_statistics_that_torch_refuses(
    change: Callable[[nn.Module], None], kind: Callable[[int], nn.Module], around: Callable[[nn.Module], nn.Module]
) -> None:
    if change is wide and DEVICE != "cpu":
        pytest.skip("torch's GPU kernels take the statistics' memory for float32, whatever it is")
    results = []
    for convert in (False, True):
        norm = kind(WIDTH).to(DEVICE)
        model = around(norm)
        if convert:
            ckpt_kernels.convert(model)
        change(norm)
        input = torch.linspace(-1, 1, 6 * WIDTH, device=DEVICE).view(6, WIDTH)
        input = input if isinstance(norm, nn.BatchNorm1d) else input.t().reshape(1, WIDTH, 6)
        try:
            results.append([model(input).detach(), norm.running_mean, norm.running_var])
        except (RuntimeError, ValueError, TypeError) as error:
            results.append(type(error))
    theirs, ours = results
    if isinstance(theirs, list):
        torch.testing.assert_close(ours, theirs)
    else:
        assert ours is theirs

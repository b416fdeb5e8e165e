"""Python's and numpy's global generators belong to the whole process: converted models leave them to other threads."""

import collections
import functools
import random
import threading
import time
import types
import weakref
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckpt_kernels
from ckpt_kernels.convert.code.global_draws import may_draw_globally

from .conftest import DEVICE
from .conversion import INNER, WIDTH, random_tensor

numpy = pytest.importorskip("numpy")


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = nn.LayerNorm(WIDTH), nn.GELU()
        self.first, self.last = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.last(self.act(self.first(self.norm(x)))))


def scaled(x: Tensor) -> Tensor:
    return x * random.random()


class ByFunction(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return scaled(super().forward(x))


class ByHelper(Layer):
    @torch.no_grad()
    def noise(self, x: Tensor) -> Tensor:
        return torch.as_tensor(numpy.random.rand(*x.shape)).to(x)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.noise(x)


class ByImport(Layer):
    def forward(self, x: Tensor) -> Tensor:
        import statistics as anything

        return super().forward(x) * anything.NormalDist().samples(1)[0]


class Inheriting(ByFunction):
    pass


class Kind(type):
    """A type whose instances, which are types, draw when they are called."""

    def __call__(cls) -> float:
        return random.random()


class OfKind(metaclass=Kind):
    pass


class Naming(Layer):
    """Calls a method that a user has given to torch's class."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.first.noisy(x))


def with_attribute(function: Callable[..., Any], value: Any) -> Callable[..., Any]:
    function.value = value
    return function


class Sampler:
    __slots__ = ("draw",)

    def __init__(self, draw: Any) -> None:
        self.draw = draw


def scaling(draw: Callable[[], float]) -> Callable[..., Tensor]:
    return lambda module, args, output: output * draw()


def named(name: str, value: Any) -> Callable[[nn.Module], None]:
    return lambda layer: setattr(layer, name, value)


DRAWING: dict[str, tuple[type[Layer], Callable[[Any], Any]]] = {
    "a function": (ByFunction, lambda layer: None),
    "a decorated method": (ByHelper, lambda layer: None),
    "an import": (ByImport, lambda layer: None),
    "a hook": (Layer, lambda layer: layer.register_forward_hook(lambda module, args, output: scaled(output))),
    "a closure": (Layer, lambda layer: layer.register_forward_hook(scaling(numpy.random.rand))),
    "a hook inside": (Layer, lambda layer: layer.act.register_forward_pre_hook(lambda *_: random.random() and None)),
    "a forward of an instance": (Layer, lambda layer: setattr(layer.act, "forward", scaled)),
    "the module": (Layer, named("noise", random)),
    "a method of the generator": (Layer, named("noise", [random.random])),
    "a method of numpy's": (Layer, named("noise", {"key": numpy.random.rand})),
    "an object": (Layer, named("noise", Sampler(scaled))),
    "a generator expression": (Layer, named("noise", (random.random() for _ in range(3)))),
    "a map": (Layer, named("noise", map(scaled, ()))),
    "a cached function": (Layer, named("noise", functools.cache(scaled))),
    "a partial function": (Layer, named("noise", functools.partial(torch.relu, scaled))),
    "a default": (Layer, named("noise", collections.defaultdict(random.random))),
    "a compiled function": (Layer, named("noise", torch.compile(scaled))),
    "evaluated text": (Layer, named("noise", lambda: eval("random" + ".random()"))),
    "a default of an argument": (Layer, named("noise", lambda draw=random.random: draw())),
    "a default of a keyword": (Layer, named("noise", lambda *, draw=random.random: draw())),
    "an attribute of a function": (Layer, named("noise", with_attribute(lambda: None, scaled))),
    "a base class": (Inheriting, lambda layer: None),
    "a class of a class": (Layer, named("noise", OfKind)),
    "a key": (Layer, named("noise", {scaled: 1})),
    "a read-only dict": (Layer, named("noise", types.MappingProxyType({"key": scaled}))),
    "a weak reference": (Layer, named("noise", weakref.ref(scaled))),
    "a method of a list": (Layer, named("noise", [scaled].pop)),
    "a function in C of another library": (Layer, named("noise", zlib.crc32)),
    "a module of this package": (lambda: ckpt_kernels.nn.RMSNorm(WIDTH), named("noise", scaled)),
    "an array": (Layer, named("noise", numpy.ones(3))),
}


@pytest.mark.parametrize("how", DRAWING)
def test_code_that_may_draw_is_found(how: str) -> None:
    kind, change = DRAWING[how]
    for converts in (False, True):
        layer = kind()
        change(layer)
        if converts:
            ckpt_kernels.convert(model := nn.ModuleList([layer]), recompute={"0": "checkpoint"})
            layer = model[0]
        assert may_draw_globally(layer)


def test_what_a_user_changed_in_torch_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Naming()
    assert not may_draw_globally(layer)
    with monkeypatch.context() as patch:
        patch.setattr(nn.Linear, "noisy", scaled, raising=False)
        assert may_draw_globally(layer)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: scaled(output))
    assert may_draw_globally(Layer())
    handle.remove()
    assert not may_draw_globally(Layer())
    with monkeypatch.context() as patch:
        patch.setattr(torch, "relu", scaled)
        assert may_draw_globally(Layer())


@pytest.mark.parametrize(
    "make",
    (
        Layer,
        lambda: nn.TransformerEncoderLayer(WIDTH, 2),
        lambda: nn.LSTM(WIDTH, WIDTH),
        lambda: nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5)),
    ),
)
def test_code_that_draws_nothing_is_known(make: Callable[[], nn.Module]) -> None:
    layer = make()
    layer.options = {"heads": [1, "two"], "dtype": torch.float32}
    layer.register_forward_hook(lambda module, args, output: None)
    assert not may_draw_globally(layer)
    model = nn.ModuleList([layer])
    ckpt_kernels.convert(model)
    assert not may_draw_globally(model[0])
    # What a layer holds is read anew each time, and so is the class that conversion made.
    kind = type(model[0])
    if ckpt_kernels.is_converted(model[0]):
        forward, kind.forward = kind.forward, lambda self, *args: scaled(torch.ones(()))
        assert may_draw_globally(model[0])
        kind.forward = forward
        return
    model[0].options["noise"] = scaled
    assert may_draw_globally(model[0])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("recompute", ("output", "layer", {"layers.*": "checkpoint"}), ids=str)
def test_no_number_of_another_thread_is_drawn_twice(recompute: str | Mapping[str, str]) -> None:
    drawn: list[list[float]] = []
    ends = threading.Event()

    def draw() -> None:
        while not ends.is_set():
            drawn.append([random.random(), numpy.random.rand()])
            time.sleep(0)

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        for _ in range(3):
            model = Net().to(DEVICE)
            ckpt_kernels.convert(model, recompute=recompute)
            for _ in range(20):
                model(random_tensor(3, WIDTH)).sum().backward()
            ckpt_kernels.revert(model)
    finally:
        ends.set()
        thread.join()
    assert len(drawn) > 60
    assert all(len(set(numbers)) == len(drawn) for numbers in zip(*drawn, strict=True))

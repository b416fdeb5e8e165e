"""Forwards that read the classes of the modules inside, which a converted module's subclass must not change."""

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckpt_kernels
from ckpt_kernels.convert.code.child_classes import classes_told_inside
from ckpt_kernels.convert.selection import inspected_modules

from .conftest import DEVICE
from .conversion import WIDTH, close, random_tensor, reason_of, results_of, twins

RESIDUAL = {nn.LayerNorm: 1.0, nn.GELU: 0.5}


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH)])

    def weigh(self, layer: nn.Module) -> float:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x * self.weigh(layer) + layer(x)
        return x


class ByIs(Layers):
    def weigh(self, layer: nn.Module) -> float:
        return 1.0 if type(layer) is nn.LayerNorm else 0.0


class ByTable(Layers):
    def weigh(self, layer: nn.Module) -> float:
        return RESIDUAL.get(type(layer), 0.0)


class ByAttribute(Layers):
    def weigh(self, layer: nn.Module) -> float:
        kind = layer.__class__
        return float(kind in (nn.LayerNorm, nn.RMSNorm) or not kind != nn.GELU)


class ByChild(Layers):
    def weigh(self, layer: nn.Module) -> float:
        return float(type(self.layers[2]) is nn.LayerNorm and layer is self.layers[2])


def weight_of(module: nn.Module) -> float:
    return float(type(module) is nn.LayerNorm)


class ByHelper(Layers):
    def weigh(self, layer: nn.Module) -> float:
        return weight_of(layer)


class ByPlace(Layers):
    def forward(self, x: Tensor) -> Tensor:
        kinds = [type(layer) for layer in self.layers]
        for layer, kind in zip(self.layers, kinds, strict=True):
            x = x + layer(x) if kind is nn.LayerNorm else layer(x)
        return x


class ByGetattr(Layers):
    def weigh(self, layer: nn.Module) -> float:
        return float(getattr(layer, "__class__") is nn.LayerNorm)  # noqa: B009


class ByMap(Layers):
    def weigh(self, layer: nn.Module) -> float:
        kinds = list(map(type, self.layers))
        return float(kinds.count(nn.LayerNorm))


class ByMethodOfClass(Layers):
    def weigh(self, layer: nn.Module) -> float:
        return float(nn.LayerNorm in type(layer).__mro__[:1])


INSPECTING = (ByIs, ByTable, ByAttribute, ByChild, ByHelper, ByPlace, ByGetattr, ByMap, ByMethodOfClass)


@pytest.mark.parametrize("recompute", ["block", "output", "all", "layer"])
@pytest.mark.parametrize("kind", INSPECTING)
def test_modules_keep_their_class_where_a_forward_around_reads_it(kind: type[Layers], recompute: Any) -> None:
    model, converted = twins(kind)
    report = ckpt_kernels.convert(converted, recompute=recompute)
    assert reason_of(report, "layers.2") == "a module around it compares the classes of modules inside"
    x = random_tensor(3, WIDTH)
    assert close(results_of(model, x), results_of(converted, x))


@pytest.mark.parametrize("around", [lambda kind: nn.Sequential(kind(), nn.LayerNorm(WIDTH)), lambda kind: kind()])
def test_a_level_by_name_does_not_change_such_a_class(around: Callable[[type], nn.Module]) -> None:
    model, converted = twins(lambda: around(ByIs))
    report = ckpt_kernels.convert(converted, recompute={"*layers.2": "output"})
    (name,) = [name for name, module in model.named_modules() if name.endswith("layers.2")]
    assert reason_of(report, name) is not None
    x = random_tensor(3, WIDTH)
    assert close(results_of(model, x), results_of(converted, x))


def test_a_module_added_to_such_a_parent_keeps_its_class() -> None:
    model, converted = twins(lambda: nn.Sequential(ByIs(), nn.LayerNorm(WIDTH)))
    ckpt_kernels.convert(converted)
    for each in (model, converted):
        each[0].layers.append(nn.LayerNorm(WIDTH).to(DEVICE))
    x = random_tensor(3, WIDTH)
    assert close(results_of(model, x), results_of(converted, x))
    assert type(converted[0].layers[3]) is nn.LayerNorm


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if type(block) is Block else block(x, x)
        return x


def test_plans_and_offloading_leave_such_layers() -> None:
    model, planned = twins(Blocks)
    x = random_tensor(8, WIDTH)
    ckpt_kernels.plan(planned, x, budget=None).apply()
    assert close(results_of(model, x), results_of(planned, x))
    with pytest.raises(ValueError, match=r"whose class no code of the model compares, unlike blocks\.0"):
        ckpt_kernels.offload.offload(Blocks(), "blocks.*")


class Allowed(Layers):
    """Uses of classes that are the same for a subclass, or of arguments of the forward."""

    def forward(self, x: Any) -> Tensor:
        x = torch.stack(x).sum(0) if type(x) in (list, tuple) else x
        for layer in self.layers:
            self.last = f"{type(layer).__name__} {layer.__class__}"
            if not isinstance(layer, nn.Linear) and type(layer.eps if hasattr(layer, "eps") else 1) is float:
                x = x + layer(x)
            else:
                x = layer(x)
        return x


def test_other_uses_of_classes_hinder_nothing() -> None:
    model, converted = twins(Allowed)
    report = ckpt_kernels.convert(converted)
    assert [entry.name for entry in report.replaced] == ["layers.1", "layers.2"]
    x = random_tensor(3, WIDTH)
    assert close(results_of(model, x), results_of(converted, x))
    assert converted.last.startswith("LayerNorm")


KINDS = (int, nn.LayerNorm)
CHANGEABLE = [nn.GELU]
OF_CLASSES = {"eps": "eps", "names": ["eps"]}


kind_of = type


class Telling:
    """Methods that tell a subclass of the layer's class from the class."""

    def by_later_line(self, layer: Any) -> Any:
        kind = named = None
        for _ in self.layers:
            if kind is nn.LayerNorm:
                return 1.0
            kind = named
            named = type(layer)

    def by_setting(self, layer: Any) -> Any:
        type(layer).count = 1

    def by_keeping(self, layer: Any) -> Any:
        self.kind = type(layer)

    def by_default(self, layer: Any) -> Any:
        return getattr(self, "kind", type(layer)) is nn.LayerNorm

    def by_name(self, layer: Any) -> Any:
        return getattr(type(layer), "__bases__", ())

    def by_unknown_name(self, layer: Any) -> Any:
        return getattr(type(layer), self.name)

    def by_name_of_a_table(self, layer: Any) -> Any:
        return getattr(type(layer), OF_CLASSES[self.name], 0)

    def by_one_of_several(self, layer: Any) -> Any:
        return type(layer) in (int, nn.LayerNorm)

    def by_one_of_a_global(self, layer: Any) -> Any:
        return type(layer) in KINDS

    def by_a_global_that_may_change(self, layer: Any) -> Any:
        return type(layer) in CHANGEABLE

    def by_what_is_held(self, layer: Any) -> Any:
        return type(layer) is self.kind

    def by_order(self, layer: Any) -> Any:
        return type(layer).mro()

    def by_another_name(self, layer: Any) -> Any:
        return kind_of(layer) is nn.LayerNorm

    def by_forward(self, layer: Any) -> Any:
        return type(layer).forward is nn.LayerNorm.forward

    def by_annotations(self, layer: Any) -> Any:
        return type(layer).__annotations__

    def forward(self, x: Tensor) -> Any:
        for x in self.layers:
            if type(x) is nn.LayerNorm:
                return x


class Untelling:
    """Methods for which the class and a subclass are the same, or that read no class of a layer."""

    def prints(self, layer: Any) -> Any:
        print(type(layer))
        return str(type(layer)), repr(type(layer))

    def asks(self, layer: Any) -> Any:
        return hasattr(type(layer), "eps") and issubclass(type(layer), nn.LayerNorm)

    def takes_from_a_table(self, layer: Any) -> Any:
        return getattr(type(layer), OF_EPS["eps"])

    def binds_again(self, layer: Any) -> Any:
        kind = type(layer)
        print(kind)
        for kind in self.layers:
            print(kind)

    def makes_classes(self, layer: Any) -> Any:
        return [type(str(layer), (), {})]

    def reads_own_class(self, layer: Any) -> Any:
        return self.__class__ is self.kind

    def calls_the_standard_library(self, layer: Any) -> Any:
        return copy.copy(layer)

    def reads_literals(self, layer: Any) -> Any:
        return self.kind in (1, type(f"{layer}")) or type([layer]) is self.kind or type((layer,)) is self.kind

    def forward(self, x: Tensor, *, scale: Any = 1) -> Any:
        return x * scale if type(scale) is self.kind else x


OF_EPS = {"eps": "eps"}
METHODS = [(f, kind is Telling) for kind in (Telling, Untelling) for f in vars(kind).values() if hasattr(f, "__code__")]


@pytest.mark.parametrize("method, tells", METHODS, ids=[f.__qualname__ for f, _ in METHODS])
def test_which_uses_of_classes_tell_subclasses(method: types.FunctionType, tells: bool) -> None:
    name = "forward" if method.__name__ == "forward" else "weigh"
    assert (nn.LayerNorm in classes_told_inside(type("Changed", (Layers,), {name: method}))) is tells


NORMS = (nn.LayerNorm, nn.RMSNorm)
FROZEN = frozenset(NORMS)


class ByStaticMethod(Layers):
    @staticmethod
    def share_of(layer: nn.Module) -> float:
        return float(type(layer) is nn.LayerNorm)

    def weigh(self, layer: nn.Module) -> float:
        return self.share_of(layer)


class ByCachedMethod(Layers):
    @functools.lru_cache  # noqa: B019
    def weigh(self, layer: nn.Module) -> float:
        return float(type(layer) is nn.LayerNorm)


@pytest.mark.parametrize("kind", [ByStaticMethod, ByCachedMethod])
def test_static_and_cached_methods_tell_classes(kind: type[Layers]) -> None:
    assert classes_told_inside(kind) == {nn.LayerNorm}


class Comparing:
    """Methods that compare the class of a layer with these classes alone."""

    def one(self, layer: Any) -> Any:
        return type(layer) is nn.LayerNorm

    def several(self, layer: Any) -> Any:
        kind = layer.__class__
        return kind in NORMS or kind == torch.nn.Dropout or kind in {nn.GELU, int}

    def on_the_right(self, layer: Any) -> Any:
        return nn.LayerNorm is type(layer)

    def between(self, layer: Any) -> Any:
        return nn.GELU is not type(layer) is not nn.LayerNorm

    def in_a_list(self, layer: Any) -> Any:
        return type(layer) in [nn.LayerNorm, nn.GELU]

    def in_a_global(self, layer: Any) -> Any:
        return type(layer) in FROZEN

    def none(self, layer: Any) -> Any:
        return type(layer) in (int, float)


TOLD = {
    Comparing.one: {nn.LayerNorm},
    Comparing.several: {nn.LayerNorm, nn.RMSNorm, nn.Dropout, nn.GELU},
    Comparing.on_the_right: {nn.LayerNorm},
    Comparing.between: {nn.LayerNorm, nn.GELU},
    Comparing.in_a_list: {nn.LayerNorm, nn.GELU},
    Comparing.in_a_global: {nn.LayerNorm, nn.RMSNorm},
    Comparing.none: set(),
}


@pytest.mark.parametrize("method", TOLD, ids=lambda method: method.__name__)
def test_a_comparison_tells_the_classes_that_it_names(method: types.FunctionType) -> None:
    assert classes_told_inside(type("Changed", (Layers,), {"weigh": method})) == TOLD[method]


def test_modules_of_other_classes_are_converted() -> None:
    def both() -> tuple[nn.Module, nn.Module]:
        return twins(lambda: nn.Sequential(ByIs(), nn.LayerNorm(WIDTH)))

    model, converted = both()
    assert inspected_modules(model) == {model[0].layers[2]}
    report = ckpt_kernels.convert(converted)
    assert {entry.name for entry in report.replaced} >= {"0.layers.1", "1"}
    x = random_tensor(3, WIDTH)
    assert close(results_of(model, x), results_of(converted, x))
    model = nn.Sequential(ByTable(), nn.LayerNorm(WIDTH))
    assert inspected_modules(model) == {*model[0].modules()} - {model[0]}


def test_a_converted_module_counts_by_the_class_that_it_had() -> None:
    model = ByIs()
    ckpt_kernels.convert(model.layers[2])
    assert type(model.layers[2]) is not nn.LayerNorm and inspected_modules(model) == {model.layers[2]}


def test_code_without_a_source_may_tell_subclasses() -> None:
    made: dict[str, Any] = {}
    exec("def weigh(self, layer):\n    return type(layer).__name__", made)
    assert nn.LayerNorm in classes_told_inside(type("Changed", (Layers,), {"weigh": made["weigh"]}))


BACKENDS: dict[type, str] = {}


def backend_of(value: Any) -> str:
    return BACKENDS.setdefault(type(value), "torch")


class ByBackend(Layers):
    def weigh(self, layer: nn.Module) -> float:
        return len(backend_of(self.last)) / 5.0


@pytest.mark.parametrize("library", ["einops", "einops.parsing", "einx", "numpy", "einopsis", ""])
def test_libraries_of_tensors_may_choose_by_the_class(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_of, "__module__", library)
    assert (nn.LayerNorm in classes_told_inside(ByBackend)) is (library in ("einopsis", ""))


def chosen(value: Any) -> str:
    return backend_of(value)


class ByChosen(Layers):
    def weigh(self, layer: nn.Module) -> float:
        return len(chosen(self.last)) / 5.0


@pytest.mark.parametrize("library", ["einops", ""])
def test_what_a_library_of_tensors_calls_does_not_count(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chosen, "__module__", library)
    assert (nn.LayerNorm in classes_told_inside(ByChosen)) is (library == "")


class Box:
    def __init__(self, value: Any) -> None:
        self.value = value


def boxed(value: Any) -> Box:
    box = Box.__new__(Box)
    Box.__init__(box, value)
    return box


class InitializedByClass(Layers):
    """Only the constructor compares classes; the forward calls that of another class, in a function."""

    def __init__(self) -> None:
        super().__init__()
        self.count = sum(type(layer) is nn.LayerNorm for layer in self.layers)

    def weigh(self, layer: nn.Module) -> float:
        return boxed(1.0).value


def test_the_constructor_of_another_class_is_not_that_of_the_module() -> None:
    assert nn.LayerNorm not in classes_told_inside(InitializedByClass)

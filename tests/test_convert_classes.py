"""Classes that inspect themselves or are inspected: a converted module answers as the original."""

import abc
import functools
import gc
import inspect
import io
import pickle
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckpt_kernels

from .test_convert_seen import MLP, TABLE, twins


def _twice(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(forward)
    def doubled(self: nn.Module, *args: Any) -> Tensor:
        return forward(self, *args) * 2

    return doubled


class _Wrapping(nn.Module):
    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.forward = _twice(cls.forward)


class _WrappingMeta(type):
    def __new__(meta, name: str, bases: tuple, members: dict[str, Any]) -> type:
        if "forward" in members:
            members["forward"] = _twice(members["forward"])
        return super().__new__(meta, name, bases, members)


class WrappedByBase(_Wrapping):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + x)


class WrappedByMeta(nn.Module, metaclass=_WrappingMeta):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + x)


class ByProperty(MLP):
    @property
    def scale(self) -> float:
        return TABLE[type(self)]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class ByHelper(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * scale_of(self)


class ByClassMethod(MLP):
    @classmethod
    def scale(cls) -> float:
        return TABLE[cls]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale()


class WithTakenNames(MLP):
    def forward(self, x: Tensor) -> Tensor:
        ckpt_0 = x * 2
        return self.down(self.act(self.up(ckpt_0)))


def scale_of(module: nn.Module) -> float:
    return TABLE[type(module)]


@pytest.mark.parametrize(
    "kind",
    [WrappedByBase, WrappedByMeta, ByProperty, ByHelper, ByClassMethod, WithTakenNames],
    ids=lambda k: k.__name__,
)
def test_classes_that_inspect_themselves(kind: type[nn.Module]) -> None:
    TABLE[kind] = 2.0
    model, converted = twins(kind())
    x = torch.randn(3, 16)
    torch.testing.assert_close(converted(x), model(x))


def _counted(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(method)
    def counting(*args: Any) -> Tensor:
        counting.calls += 1
        return method(*args)

    counting.calls = 0
    return counting


class Counted(MLP):
    calls = 0

    @classmethod
    def count(cls) -> None:
        cls.calls += 1

    @_counted
    def forward(self, x: Tensor) -> Tensor:
        self.count()
        return self.down(self.act(self.up(x)))


def test_counters_on_a_class_and_on_a_wrapper() -> None:
    model = Counted()
    ckpt_kernels.convert(model)
    model(torch.randn(3, 16))
    assert model.forward.calls == Counted.calls == 1
    ckpt_kernels.revert(model)
    assert model.calls == 1


class CountedByWrapper(MLP):
    @_counted
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


def test_a_counter_on_a_wrapper_alone() -> None:
    model = CountedByWrapper()
    ckpt_kernels.convert(model)
    for count in (1, 2):
        model(torch.randn(3, 16))
        assert model.forward.calls == count


class Optional(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, flag: bool = True) -> Tensor:
        return self.norm(x + x)


def test_signatures_are_the_originals() -> None:
    class Local(Optional):
        """A class within a function."""

        norm: nn.Module

    model, converted = twins(Local())
    for question in (
        lambda m: inspect.signature(m.forward),
        lambda m: inspect.getfullargspec(m.forward).args,
        lambda m: inspect.signature(type(m)),
        lambda m: [getattr(type(m), f"__{name}__") for name in ("doc", "annotations", "module", "name", "qualname")],
        lambda m: type(type(m)(8)),
    ):
        assert question(converted) == question(model)


def test_the_class_is_pickled_as_its_original() -> None:
    _, converted = twins(Optional())
    file = io.BytesIO()
    torch.save({"kind": type(converted), "model": converted}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert loaded["kind"] is Optional and ckpt_kernels.is_converted(loaded["model"])


class _Abstract(nn.Module, abc.ABC):
    @abc.abstractmethod
    def forward(self, x: Tensor) -> Tensor: ...


class _Concrete(_Abstract):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + x)


class _Derived(_Concrete):
    pass


def test_abstract_classes_answer_as_before() -> None:
    _, converted = twins(_Concrete())
    assert not isinstance(_Derived(), type(converted))
    assert isinstance(_Derived(), _Concrete) and issubclass(_Derived, _Concrete)


def test_a_local_class_is_freed() -> None:
    def run() -> list[weakref.ref]:
        teacher = torch.zeros(10)

        class Student(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.norm, self.act = nn.LayerNorm(16), nn.GELU()

            def forward(self, x: Tensor) -> Tensor:
                return self.act(self.norm(x + x)) + teacher.sum()

        model = Student()
        ckpt_kernels.convert(model)
        model(torch.randn(3, 16)).sum().backward()
        return [weakref.ref(teacher), weakref.ref(Student), weakref.ref(type(model))]

    found = run()
    gc.collect()
    assert [reference() for reference in found] == [None, None, None]


def test_a_pickle_loads_after_its_class_was_freed() -> None:
    """Another converted class has the address that the pickle names."""
    model, other = nn.Sequential(nn.GELU()), nn.Sequential(nn.SiLU())
    ckpt_kernels.convert(model, recompute="block")
    ckpt_kernels.convert(other, recompute="block")
    written, place = pickle.dumps(model), id(type(model[0]))
    ckpt_kernels.revert(model)
    swap = sys.modules["ckpt_kernels.convert.swap"]
    swap._classes[swap._PROCESS, place] = type(other[0])
    read = pickle.loads(written)
    x = torch.randn(3, 16)
    torch.testing.assert_close(read(x), model(x))
    assert isinstance(read[0], nn.GELU) and ckpt_kernels.is_converted(read[0])


class Answering(type):
    """A metaclass that answers for class attributes that are not set."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return ""


class Answered(nn.Module, metaclass=Answering):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.relu(self.norm(x)))


def test_a_metaclass_that_answers_for_missing_attributes() -> None:
    model = nn.Sequential(Answered(), nn.Linear(8, 8))
    x = torch.randn(4, 8)
    expected = model(x)
    assert not ckpt_kernels.is_converted(model[0])
    ckpt_kernels.convert(model)
    assert ckpt_kernels.is_converted(model[0])
    torch.testing.assert_close(model(x), expected)
    ckpt_kernels.revert(model)
    assert type(model[0]) is Answered


def test_a_subclass_of_a_converted_class_is_converted() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.GELU())
    ckpt_kernels.convert(model)
    torch.nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Identity())
    assert ckpt_kernels.is_converted(model[0])


def test_modules_of_one_class_share_the_converted_class() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8))
    ckpt_kernels.convert(model)
    assert ckpt_kernels.is_converted(model[0]) and type(model[0]) is type(model[2])


def test_a_patch_of_a_converted_class_holds_for_no_later_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the patch is on the converted class, or on the class that the forward was taken from."""
    models = [nn.Sequential(nn.GELU()) for _ in range(3)]
    ckpt_kernels.convert(models[0], recompute="block")
    monkeypatch.setattr(type(models[0][0]), "extra_repr", lambda module: "patched")
    ckpt_kernels.convert(models[1], recompute="block")
    assert "patched" in repr(models[0]) and "patched" not in repr(models[1])
    monkeypatch.setattr(nn.GELU, "forward", lambda module, x: 0 * x)
    ckpt_kernels.convert(models[2], recompute="block")
    assert type(models[2][0]) is not type(models[1][0]) and not models[2](torch.ones(3)).any()

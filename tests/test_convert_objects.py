"""A converted module as a Python object: attributes of any name, copies, TorchScript, finalizers, frames."""

import copy
import copyreg
import gc
import inspect
import io
import pickle
import sys
from collections.abc import Callable
from inspect import currentframe as this_frame
from inspect import stack as frames
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ckpt_kernels

from .conftest import DEVICE
from .conversion import WIDTH, reason_of, replacement_of
from .test_convert_replaced import LEVELS, MLP
from .test_convert_source import twins
from .test_convert_tried import rows
from .test_convert_views import OverRows, Quick

# Attributes of any name


class Named(nn.Module):
    """A module with attributes that have the names of nn.Module's methods."""

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
def test_attributes_may_shadow_methods_of_modules(name: str) -> None:
    with torch.device(DEVICE):
        model = nn.Sequential(Named(name), NamedAct(), nn.ModuleList([Named(name)]))
    model.forward = None
    del model.forward
    first = nn.Sequential(model[0], model[1])
    expected = first(rows())
    report = ckpt_kernels.convert(model)
    assert replacement_of(report, "0.norm") and replacement_of(report, "2.0.norm")
    torch.testing.assert_close(first(rows()), expected)
    ckpt_kernels.convert(model, include=[Named], exclude=["1"])
    ckpt_kernels.revert(model)
    assert not any(map(ckpt_kernels.is_converted, (model[0], model[1], model[0].norm, model[2][0])))


@pytest.mark.parametrize("setting", [torch.tensor([True, False]), torch.tensor([0.5, 0.1]), [], "no", 1])
def test_settings_of_any_type_are_no_error(setting: Any) -> None:
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
    """A class that can be pickled only by a reducer registered with copyreg."""

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
def test_copies_use_the_arguments_of_getnewargs(make: Callable, copied: Callable) -> None:
    model = make().to(DEVICE)
    expected = model(rows())
    ckpt_kernels.convert(model)
    made = copied(model)
    assert type(made) is type(model) and made.made_with == WIDTH
    torch.testing.assert_close(made(rows()), expected)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_reducer_registered_with_copyreg(when: str, copied: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
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
        restored_model = made[0](*made[1]).to(DEVICE)
        torch.testing.assert_close(restored_model(rows()), expected)
        if copied is copy.deepcopy:
            torch.testing.assert_close(copied(model).to(DEVICE)(rows()), expected)
    finally:
        reducer.pop(Registered, None)


class Reduced(WithArguments):
    """A class that gets a method `__reduce__` before or after the conversion."""

    def __new__(cls, width: int = WIDTH) -> "Reduced":
        return super().__new__(cls, width)

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__(width)


def restored(state: dict[str, Tensor]) -> Reduced:
    made = Reduced()
    made.load_state_dict(state)
    made.is_restored = True
    return made


@pytest.mark.parametrize("name", ["__reduce__", "__reduce_ex__"])
def test_a_reduce_method_set_on_the_class_is_used(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Reduced().to(DEVICE)
    ckpt_kernels.convert(model, recompute="layer")
    assert ckpt_kernels.is_converted(model)
    reduce = lambda self, *protocol: (restored, (self.state_dict(),))  # noqa: E731
    monkeypatch.setattr(Reduced, name, reduce, raising=False)
    for copied in (copy.copy, copy.deepcopy, pickled):
        made = copied(model)
        assert type(made) is Reduced and made.is_restored
    later = Reduced()
    report = ckpt_kernels.convert(later, recompute="layer")
    assert type(later) is Reduced and "is pickled in a way of its own" in str(report)


class Stated(WithArguments):
    """A module whose pickled state is a tuple."""

    def __getstate__(self) -> tuple[dict[str, Any]]:
        return (self.__dict__,)

    def __setstate__(self, state: tuple[dict[str, Any]]) -> None:
        self.__dict__.update(state[0], is_restored=True)


class OwnDict(Stated):
    """A module whose pickled state is `__dict__` itself, not a copy."""

    def __getstate__(self) -> Any:
        return self.__dict__

    def __setstate__(self, state: Any) -> None:
        super().__setstate__((state,))


@pytest.mark.parametrize("kind", [Stated, OwnDict])
def test_pickled_states_of_any_type(kind: type[Stated]) -> None:
    model = kind(WIDTH).to(DEVICE)
    expected, names = model(rows()), set(vars(model))
    ckpt_kernels.convert(model, recompute="layer")
    for copied in (copy.copy, copy.deepcopy, pickled):
        made = copied(model)
        assert type(made) is type(model) and ckpt_kernels.is_converted(made) and made.is_restored
        assert set(vars(model)) == names
        torch.testing.assert_close(made(rows()), expected)


class OwnTable(pickle.Pickler):
    """A pickler with a dispatch table of its own, which ignores copyreg's."""

    dispatch_table: ClassVar[dict] = {}


def test_a_pickler_with_a_table_of_its_own() -> None:
    model = nn.Sequential(nn.LayerNorm(WIDTH), nn.GELU()).to(DEVICE)
    expected = model(rows())
    ckpt_kernels.convert(model)
    file = io.BytesIO()
    OwnTable(file).dump(model)
    made = pickle.loads(file.getvalue())
    assert all(map(ckpt_kernels.is_converted, made))
    torch.testing.assert_close(made(rows()), expected)


# Scripts


class Scripted(nn.Module):
    """A module that reads globals of this file."""

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
def test_torchscript_of_a_converted_model_equals_the_originals(kind: Callable[[], nn.Module], level: str) -> None:
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
def test_trials_do_not_copy_modules_with_finalizers(kind: type[nn.Module]) -> None:
    gc.collect()
    before = Counted.live
    model = nn.Sequential(nn.LayerNorm(16), kind())
    report = ckpt_kernels.convert(model)
    gc.collect()
    assert Counted.live == before + 1
    reasons = [entry.reason for entry in report.left_alone if entry.name == "1"]
    assert all("finalizer" in reason for reason in reasons) and bool(reasons) == (kind is CountedNorm)
    assert kind is Counted or replacement_of(report, "1") is None


# Frames


def names_of_the_caller() -> list[str]:
    return sorted(inspect.currentframe().f_back.f_locals)


def names_two_above() -> list[str]:
    return sorted(sys._getframe(1).f_locals)


class ReadsOwnFrame(MLP):
    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.up(x))
        y = self.down(h)
        self.seen = names_of_the_caller()
        return y


class ReadsFrameByDepth(MLP):
    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.up(x))
        y = self.down(h)
        self.seen = names_two_above()
        return y


@pytest.mark.parametrize("kind", [ReadsOwnFrame, ReadsFrameByDepth])
def test_functions_that_read_the_callers_frame(kind: type[nn.Module]) -> None:
    model, converted = twins(kind)
    ckpt_kernels.convert(converted)
    torch.testing.assert_close(converted(rows()), model(rows()))
    assert converted.seen == model.seen


def noted(found: list[str]) -> None:
    """Keeps a sorted copy, without a name in common with frames."""
    SEEN[:] = sorted(found)


SEEN: list[str] = []


class Stacks(MLP):
    def forward(self, x: Tensor) -> Tensor:
        self.up.eval()
        self.eval()
        return torch.stack([self.down(self.act(self.up(x)))])


def test_attributes_with_the_names_of_frame_functions() -> None:
    model, converted = twins(Stacks)
    report = ckpt_kernels.convert(converted)
    assert replacement_of(report, "") == "MLP"
    torch.testing.assert_close(converted(rows()), model(rows()))


class ListsLocals(MLP):
    def forward(self, x: Tensor) -> Tensor:
        y = self.down(self.act(self.up(x)))
        noted(list(locals()))
        return y


class ListsLocalsByAnotherName(MLP):
    def forward(self, x: Tensor) -> Tensor:
        y = self.down(self.act(self.up(x)))
        noted(list(this_frame().f_locals))
        return y


class ListsLocalsByAnImport(MLP):
    def forward(self, x: Tensor) -> Tensor:
        from inspect import stack as records

        y = self.down(self.act(self.up(x)))
        noted(list(records()[0].frame.f_locals))
        return y


class ListsLocalsByAnUnknownObject(MLP):
    def forward(self, x: Tensor) -> Tensor:
        import sys as system

        y = self.down(self.act(self.up(x)))
        noted(list(system._getframe().f_locals))
        return y


def names_by_record() -> None:
    noted(list(frames()[1].frame.f_locals))


class ListsLocalsByACallee(MLP):
    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.up(x))
        y = self.down(h)
        names_by_record()
        return y


@pytest.mark.parametrize(
    "kind",
    [
        ListsLocals,
        ListsLocalsByAnotherName,
        ListsLocalsByAnImport,
        ListsLocalsByAnUnknownObject,
        ListsLocalsByACallee,
    ],
)
def test_frame_functions_of_any_name(kind: type[nn.Module]) -> None:
    model, converted = twins(kind)
    report = ckpt_kernels.convert(converted)
    expected, seen = model(rows()), list(SEEN)
    torch.testing.assert_close(converted(rows()), expected)
    assert seen == SEEN
    assert "stack frame" in reason_of(report, "")

"""Code around a converted model: users' attributes, code that reads the class, copies, transforms of torch.func."""

import copy
import functools
import importlib
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ckpt_kernels

from .conftest import DEVICE
from .conversion import WIDTH, close, results_of, twins
from .test_convert_tried import found_in, rows

LEVELS = ("block", "output", "all")


def computed(kind: Callable[[], nn.Module], *inputs: Tensor, level: str = "output") -> bool:
    """Whether a converted twin gives the same outputs and gradients as the model."""
    torch.manual_seed(0)
    model = kind().to(DEVICE)
    torch.manual_seed(0)
    converted = kind().to(DEVICE)
    ckpt_kernels.convert(converted, recompute=level)
    return close(results_of(converted, *inputs), results_of(model, *inputs))


# Names


class Wraps(nn.Module):
    """Attributes with names that a converted class might use."""

    def __init__(self) -> None:
        super().__init__()
        self.original, self.found = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("around", torch.ones(WIDTH))
        self.rule = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.found(F.silu(self.original(x))) * self.around + self.rule(x)


@pytest.mark.parametrize("level", LEVELS)
def test_convert_takes_no_attribute_names(level: str) -> None:
    assert computed(Wraps, rows(), level=level)
    model = nn.Sequential(nn.LayerNorm(WIDTH)).to(DEVICE)
    before = set(vars(model[0]))
    ckpt_kernels.convert(model)
    assert set(vars(model[0])) == before
    model[0].original = "theirs"
    model[0](input=rows())
    assert not hasattr(model, "original")


class WithSettings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.settings = nn.LayerNorm(WIDTH), {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return self.__dict__["settings"][name]

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Frozen(nn.Module):
    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("__class__", "late"):
            raise AttributeError(name)
        super().__setattr__(name, value)

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    @property
    def inplace(self) -> bool:
        raise RuntimeError("nobody is to ask")

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.gelu(x))


@pytest.mark.parametrize("kind", [WithSettings, Frozen])
def test_attributes_that_run_code_are_not_read(kind: type[nn.Module]) -> None:
    model = kind().to(DEVICE)
    expected = model(rows())
    ckpt_kernels.convert(model)
    torch.testing.assert_close(model(rows()), expected)


# Classes


class Scaled(nn.Module):
    def __init_subclass__(cls, scale: float = 1.0) -> None:
        cls.scale = scale


class ByArgument(Scaled, scale=3.0):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.gelu(x)) * self.scale


class ByAnnotations(ByArgument):
    factor: float = 2.0

    def forward(self, x: Tensor) -> Tensor:
        for name in type(self).__annotations__:
            x = x * getattr(self, name)
        return self.norm(F.gelu(x)) * len(type(self).__bases__)


class BySuper(ByArgument):
    def forward(self, x: Tensor) -> Tensor:
        return super(type(self), self).forward(F.gelu(x))


REGISTRY: dict[type, float] = {}


class ByRegistry(ByArgument):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.gelu(x)) * REGISTRY[type(self)]


REGISTRY[ByRegistry] = 2.0


@pytest.mark.parametrize("kind", [ByArgument, ByAnnotations, BySuper, ByRegistry])
@pytest.mark.parametrize("level", ["block", "output"])
def test_code_that_reads_its_class_sees_the_original(kind: type[nn.Module], level: str) -> None:
    assert computed(kind, rows(), level=level)


def test_a_held_forward_works_after_revert_and_a_new_class() -> None:
    model = nn.Sequential(nn.LayerNorm(WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)).to(DEVICE)
    ckpt_kernels.convert(model)
    held = model[0].forward
    expected = held(rows())
    model[0].forward = lambda input: held(input)
    ckpt_kernels.revert(model)
    assert torch.equal(model[0](rows()), expected)

    class Doubled(nn.LayerNorm):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * input

    model = nn.Sequential(nn.LayerNorm(WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)).to(DEVICE)
    ckpt_kernels.convert(model)
    model[0].__class__ = Doubled
    torch.testing.assert_close(model(rows()), model[2](F.gelu(2 * rows())))


class Reduced(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.norm = width, nn.LayerNorm(width)

    def __reduce__(self) -> tuple:
        return Reduced, (self.width,)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.norm(x))


class Restored(nn.LayerNorm):
    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = {}
        nn.Module.__init__(self)
        self.__dict__.update(state)


@pytest.mark.parametrize("make", [lambda: Reduced(WIDTH), lambda: nn.Sequential(Restored(WIDTH), nn.GELU())])
def test_copies_of_modules_with_own_pickling(make: Callable[[], nn.Module]) -> None:
    model = make().to(DEVICE)
    ckpt_kernels.convert(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        # `Reduced.__reduce__` makes new parameters.
        other.to(DEVICE)
        torch.testing.assert_close(other(rows()), model(rows()))
        ckpt_kernels.revert(other)
        ckpt_kernels.convert(other)


class RMS(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(width) + 0.5), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def test_a_pickle_runs_the_changed_code(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(RMS())
    ckpt_kernels.convert(model)
    saved = io.BytesIO()
    torch.save(model, saved)
    monkeypatch.setattr(RMS, "forward", lambda self, x: 5 * x)
    saved.seek(0)
    assert torch.equal(torch.load(saved, weights_only=False)(rows()), 5 * rows())


class Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        hidden = self.first(x)
        return self.last(hidden * torch.sigmoid(SLOPE * hidden)) * factor


SLOPE = 1.702


def test_changed_defaults_and_globals_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model, converted = twins(Steps)
    assert found_in(ckpt_kernels.convert(converted, recompute="block")) == {"": "MLP"}
    monkeypatch.setattr(Steps.forward, "__defaults__", (5.0,))
    assert close(results_of(converted, rows()), results_of(model, rows()))
    monkeypatch.setitem(globals(), "SLOPE", 0.5)
    assert close(results_of(converted, rows()), results_of(model, rows()))
    assert found_in(ckpt_kernels.convert(converted, recompute="block")) == {}
    assert close(results_of(converted, rows()), results_of(model, rows()))


# Transforms within a forward


def norm_of(module: "Transforms", x: Tensor) -> Tensor:
    return module.norm(x).tanh()


class Transforms(nn.Module):
    """A forward that applies a transform of torch.func to converted modules."""

    def __init__(self, transform: Callable) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.transform = transform

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm(self.first(x)))
        return self.last(F.gelu(self.transform(functools.partial(norm_of, self), x)))


TRANSFORMS: dict[str, Callable] = {
    "grad": lambda f, x: torch.func.grad(lambda t: f(t).sum())(x),
    "grad for each row": lambda f, x: torch.func.vmap(torch.func.grad(lambda t: f(t).sum()))(x),
    "vmap": lambda f, x: torch.func.vmap(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](x)[0],
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,))[1],
    "jacrev": lambda f, x: torch.func.jacrev(f)(x[0]).expand(len(x), -1, -1).mean(1),
    "hessian": lambda f, x: torch.func.hessian(lambda t: f(t).sum())(x[0]).expand(len(x), -1, -1).mean(1),
    "loaded by name": lambda f, x: importlib.import_module("torch.func").grad(lambda t: f(t).sum())(x),
}


@pytest.mark.parametrize("level", ["block", "output", "all", "layer"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_within_a_forward(transform: str, level: str) -> None:
    model, converted = twins(functools.partial(Transforms, TRANSFORMS[transform]))
    ckpt_kernels.convert(converted, recompute=level)
    assert close(results_of(converted, rows()), results_of(model, rows()))
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def test_a_context_stays_open_after_a_transform() -> None:
    def fails(x: Tensor) -> Tensor:
        raise KeyError

    with ckpt_kernels.recompute.discard_outputs():
        before = ckpt_kernels.recompute.discarding()
        torch.func.grad(lambda x: x.sin().sum())(rows())
        with pytest.raises(KeyError):
            torch.func.grad(fails)(rows())
        assert before is not None and ckpt_kernels.recompute.discarding() is before


def test_transforms_reject_users_hooks() -> None:
    converted = Transforms(TRANSFORMS["grad"]).to(DEVICE)
    ckpt_kernels.convert(converted)
    with torch.autograd.graph.save_on_cpu(), pytest.raises(RuntimeError, match="saved tensor hooks"):
        converted(rows())
    converted(rows()).sum().backward()


def test_a_transform_in_a_compiled_function_after_a_forward_without() -> None:
    ckpt_kernels.convert(model := nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)))
    model(rows())
    compiled = torch.compile(torch.func.grad(lambda x: x.sin().sum()), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(rows()), rows().cos())

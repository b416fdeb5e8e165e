"""Conversion of code in which names stand for more than they seem: dtypes, `super()`, decorators, keywords."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor, nn

import ckpt_kernels
from ckpt_kernels import is_converted

from .conftest import DEVICE
from .conversion import reason_of, replacement_of
from .test_convert_replaced import MLP
from .test_convert_source import twins
from .test_convert_tried import rows

WIDTH = 8


def same_as_eager(make: Callable[[], nn.Module], dtype: torch.dtype, **tolerances: Any) -> None:
    """Asserts that output and gradients at "output" are eager's."""
    results = []
    for converts in (False, True):
        torch.manual_seed(0)
        model = make().to(DEVICE, dtype)
        x = torch.randn(4, 3, WIDTH, device=DEVICE, dtype=dtype, requires_grad=True)
        if converts:
            ckpt_kernels.convert(model)
        output = model(x)
        gradients = torch.autograd.grad(output.double().square().sum(), [x, *model.parameters()], allow_unused=True)
        results.append([output, *gradients])
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, **tolerances)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return TF.relu(x) * x.sigmoid() if x.dtype == torch.float32 else TF.gelu(x)


class Choosing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return [TF.gelu, TF.silu][x.dtype is torch.float32](x)


class Casting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return TF.gelu(x) if x.float() is x else TF.silu(x)


def activation_by_dtype(x: Tensor) -> Tensor:
    return TF.silu(x) if x.dtype in (torch.float32, torch.bfloat16) else TF.gelu(x)


class OfFunction(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return activation_by_dtype(x)


@pytest.mark.parametrize("act", [Branching, Choosing, Casting, OfFunction])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_activation_that_decides_by_dtype(act: type[nn.Module], dtype: torch.dtype) -> None:
    same_as_eager(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), act(), nn.Linear(WIDTH, WIDTH)), dtype)


class Layer(nn.Module):
    """A layer whose class counts the calls."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act, self.linear = nn.LayerNorm(WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        return self.linear(self.act(self.norm(x)))


class Inherits(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


def counted(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(forward)
    def wrapper(self: Any, x: Tensor) -> Tensor:
        type(self).calls += 1
        return forward(self, x)

    return wrapper


class Decorated(Layer):
    @counted
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.act(self.norm(x)))


class ByPartialMethod(Layer):
    def count(self, by: int) -> None:
        type(self).calls += by

    count_one = functools.partialmethod(count, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.count_one()
        return self.linear(self.act(self.norm(x)))


@pytest.mark.parametrize("kind", [Layer, Inherits, Decorated, ByPartialMethod])
def test_a_class_that_counts_calls_in_code_found_indirectly(kind: type[Layer]) -> None:
    model = kind().to(DEVICE)
    ckpt_kernels.convert(model)
    assert is_converted(model.norm)
    before = kind.calls
    model(torch.randn(2, WIDTH, device=DEVICE))
    assert kind.calls == before + 1


class RMSNorm(nn.Module):
    """As Llama's, which computes in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class Residual(nn.Module):
    """Adds in place what was computed from a norm of the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.last = RMSNorm(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        x += y
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.add(x, self.last(self.norm(x)))


class AddsBySuper(Residual):
    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return super().add(x, y * 0.5)


class RunsSuper(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def _add(x: Tensor, y: Tensor, alpha: float) -> Tensor:
    x += alpha * y
    return x


add_half = functools.partial(_add, alpha=0.5)
ADDS = {"in place": lambda x, y: x.add_(y)}


class AddsByPartial(Residual):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return add_half(x, self.last(self.norm(x)))


class AddsByTable(Residual):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return ADDS["in place"](x, self.last(self.norm(x)))


class ChosenAtStart(Residual):
    def __init__(self) -> None:
        super().__init__()
        self.forward = self.forward_of_training  # type: ignore[method-assign]

    def forward_of_training(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.add(x, self.last(self.norm(x)))


class WritesOut(Residual):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.last(self.norm(x))
        ones = torch.ones(WIDTH, dtype=x.dtype, device=x.device)
        with torch.no_grad():
            torch.add(ones, x, out=x)
        return x * y.sum()


@pytest.mark.parametrize("kind", [AddsBySuper, RunsSuper, AddsByPartial, AddsByTable, ChosenAtStart, WritesOut])
def test_residuals_added_in_place_in_code_found_indirectly(kind: type[nn.Module]) -> None:
    same_as_eager(kind, torch.bfloat16, rtol=0.1, atol=0.1)


class Annotated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            h = self.first(x)
            y = self.last(self.act(h))
            h: Tensor
            x = y + h
        return x


def test_a_bare_annotation_stores_nothing() -> None:
    same_as_eager(Annotated, torch.float64)


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, debug: bool = False, early_stop: bool = False) -> Tensor:
        h = self.linear(self.norm(x)) * (2 if debug else 1)
        return h if early_stop else h + x


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Keywords(), Keywords()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, debug=True, early_stop=True)
        return x


def test_keyword_arguments_named_like_those_of_a_checkpoint_under_compile() -> None:
    torch.manual_seed(0)
    model, x = Stack().to(DEVICE), torch.randn(4, WIDTH, device=DEVICE, requires_grad=True)
    expected = model(x)
    ckpt_kernels.convert(model)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), expected)


class QuickGELU(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * torch.sigmoid(1.702 * hidden)


ACTIVATION = QuickGELU()


class ByKeyword(Annotated):
    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(ACTIVATION(hidden=h)) + h


def test_an_activation_of_the_file_called_by_keyword() -> None:
    same_as_eager(ByKeyword, torch.float64)


class Lazy:
    """An object that loads when its class is asked for, as lazy proxies do."""

    loads: ClassVar[list[int]] = []

    @property
    def __class__(self) -> type:  # type: ignore[override]
        self.loads.append(1)
        raise RuntimeError("no configuration yet")


config = Lazy()


class ReadsLazy(Annotated):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.first(x))) * config.scale  # type: ignore[attr-defined]


def test_lazy_objects_are_not_loaded() -> None:
    Lazy.loads.clear()
    ckpt_kernels.convert(ReadsLazy())
    assert not Lazy.loads


class Counting(Keywords):
    def forward(self, x: Tensor, debug: bool = False, early_stop: bool = False) -> Tensor:
        def keep(y: Tensor) -> Tensor:
            self.last = y
            return y

        x = keep(x)
        return super().forward(x, debug, early_stop)


class Counters(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Counting(), Counting()])


def test_layers_that_set_attributes_compile_in_one_graph() -> None:
    torch.manual_seed(0)
    model, x = Counters().to(DEVICE), torch.randn(4, WIDTH, device=DEVICE, requires_grad=True)
    expected = model(x)
    ckpt_kernels.convert(model)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), expected)


class OwnNames(Keywords):
    def forward(self, x: Tensor, module: Any = None, fn: Any = None) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class NamedLikeOurs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([OwnNames()])

    def forward(self, fn: Tensor) -> Tensor:
        return self.layers[0](fn, module=1, fn=2)


@pytest.mark.parametrize("recompute", ["output", {"layers.*": "checkpoint"}, {"layers.*": "layer"}])
def test_arguments_named_like_ours(recompute: Any) -> None:
    x = torch.randn(2, WIDTH, device=DEVICE)
    model = NamedLikeOurs().to(DEVICE)
    report = ckpt_kernels.convert(model, recompute=recompute, inputs={"fn": x})
    assert "kept" in str(report) or "keeps" in str(report)
    assert model(fn=x).shape == x.shape


class NormWithTinyEps(nn.Module):
    """Adds eps outside of the root, where it shows only in rows about as small."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 1e-12))


def test_an_eps_outside_of_the_root_shows_in_small_rows() -> None:
    model = nn.Sequential(NormWithTinyEps()).to(DEVICE)
    x = torch.randn(4, WIDTH, device=DEVICE) * 1e-6
    expected = model(x)
    ckpt_kernels.convert(model)
    torch.testing.assert_close(model(x), expected)


class LazyTable(dict):
    """Loads its items when they are asked for."""

    def values(self) -> Any:
        raise RuntimeError("no items yet")


TABLE = LazyTable()


class ReadsTable(Annotated):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.first(x))) * len(TABLE)


def test_lazy_tables_are_not_loaded() -> None:
    ckpt_kernels.convert(ReadsTable())


# Decorators that use the function for more than calling it

TIMES: dict[Callable[..., Tensor], int] = {}


def as_key(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    TIMES[forward] = 0

    @functools.wraps(forward)
    def wrapper(self: Any, x: Tensor) -> Tensor:
        TIMES[forward] += 1
        return forward(self, x)

    return wrapper


def with_attribute(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(forward)
    def wrapper(self: Any, x: Tensor) -> Tensor:
        TIMES[wrapper.__wrapped__] = forward.calls = getattr(forward, "calls", 0) + 1
        return forward(self, x)

    return wrapper


def passed_on(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(forward)
    def wrapper(self: Any, x: Tensor) -> Tensor:
        return counted_call(forward, self, x)

    return wrapper


def counted_call(function: Callable[..., Tensor], *args: Any) -> Tensor:
    TIMES[function] = TIMES.get(function, 0) + 1
    return function(*args)


def by_locals(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(forward)
    def wrapper(self: Any, x: Tensor) -> Tensor:
        function = locals()["forward"]
        TIMES[function] = TIMES.get(function, 0) + 1
        return forward(self, x)

    return wrapper


def in_a_table(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(forward)
    def wrapper(self: Any, x: Tensor) -> Tensor:
        function = {}.get("eager", forward)
        TIMES[function] = TIMES.get(function, 0) + 1
        return function(self, x)

    return wrapper


@pytest.mark.parametrize("decorator", [as_key, with_attribute, passed_on, by_locals, in_a_table])
def test_a_decorator_that_uses_the_function_for_more_than_the_call(decorator: Callable[..., Any]) -> None:
    class Model(MLP):
        @decorator
        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.act(self.up(x)))

    inner = Model.forward.__wrapped__
    model, converted = twins(Model)
    report = ckpt_kernels.convert(converted)
    expected = model(rows())
    torch.testing.assert_close(converted(rows()), expected)
    assert TIMES[inner] == 2
    assert "a decorator of forward" in reason_of(report, "")


def only_called(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(forward)
    def wrapper(self: Any, x: Tensor) -> Tensor:
        function = TABLE.chosen("eager", forward)
        if forward.__name__ == "forward" and "x" in forward.__code__.co_varnames and self.training:
            return functools.partial(forward, self)(x)
        return function(self, x)

    return wrapper


class Table(dict):
    def chosen(self, key: str, default: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return super().get(key, default)


TABLE = Table()


class OnlyCalled(MLP):
    @only_called
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


def test_a_decorator_that_only_calls_the_function() -> None:
    model, converted = twins(OnlyCalled)
    assert replacement_of(ckpt_kernels.convert(converted), "") == "MLP"
    for training in (True, False):
        torch.testing.assert_close(converted.train(training)(rows()), model.train(training)(rows()))

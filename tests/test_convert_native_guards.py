"""The guards of call sites in C accept a call only if the guards in Python accept it."""

import contextlib
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import ckpt_kernels
from ckpt_kernels.convert import native_guards, operands
from ckpt_kernels.convert.rewriting import fused_patterns, guards
from ckpt_kernels.convert.rewriting.native_sites import native_call
from ckpt_kernels.convert.rewriting.templates import guarded_call
from ckpt_kernels.thin import direct

pytestmark = pytest.mark.skipif(direct.thin_module is None, reason="there is no _thin here")


class _OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class _OwnWeight(nn.Linear):
    weight = property(lambda self: self._parameters["weight"] * 2)  # type: ignore[assignment]


class _OwnCall(nn.Linear):
    def __call__(self, input: Tensor) -> Tensor:
        return self.forward(input) + 1


class _OwnLoads(nn.Linear):
    def __getattr__(self, name: str) -> object:
        return super().__getattr__(name)


class _OwnDict(dict):
    def __getitem__(self, name: str) -> object:
        return super().__getitem__(name)


def _held(name: str, value: object) -> Callable[[nn.Linear], object]:
    return lambda layer: layer.__dict__.__setitem__(name, value)


def _weight(made: Callable[[Tensor], object]) -> Callable[[nn.Linear], object]:
    return lambda layer: layer._parameters.__setitem__("weight", made(layer.weight.detach()))  # type: ignore[arg-type]


PLAIN: dict[str, Callable[[nn.Linear], object]] = {
    "as it is": lambda layer: None,
    "no bias": lambda layer: layer.register_parameter("bias", None),
    "a dict with an order": lambda layer: _held("_parameters", OrderedDict(layer._parameters))(layer),
    "a plain tensor": _weight(lambda weight: weight),
}
CHANGED: dict[str, Callable[[nn.Linear], object]] = {
    "a hook": lambda layer: layer.register_forward_hook(lambda *call: None),
    "a hook before": lambda layer: layer.register_forward_pre_hook(lambda *call: None),
    "a backward hook": lambda layer: layer.register_full_backward_hook(lambda *call: None),
    "a backward hook before": lambda layer: layer.register_full_backward_pre_hook(lambda *call: None),
    "a forward of its own": _held("forward", lambda input: input),
    "a weight laid over": _held("weight", torch.zeros(6, 4)),
    "a dict of one's own": lambda layer: _held("_parameters", _OwnDict(layer._parameters))(layer),
    "no weight": _weight(lambda weight: None),
    "another dtype": lambda layer: layer.double(),
    "another device": lambda layer: layer.to("meta"),
    "a vector": _weight(lambda weight: weight[0]),
    "sparse": _weight(Tensor.to_sparse),
    "nested": _weight(lambda weight: torch.nested.nested_tensor([weight, weight[:2]])),
    "another bias": lambda layer: layer._parameters.__setitem__("bias", nn.Parameter(torch.zeros(5))),
    "a bias in rows": lambda layer: layer._parameters.__setitem__("bias", nn.Parameter(torch.zeros(6, 1))),
}
CLASSES = [nn.Linear, nn.Bilinear, _OwnForward, _OwnWeight, _OwnCall, _OwnLoads]


def _both(layer: object, input: Tensor) -> tuple[object, object]:
    """The parameters of the layer as the guard in C returns them, and as the guard in Python does."""
    return native_guards.linear_parameters_natively([layer], guards.LINEAR, input), guards.linear_operands_in_python(
        [layer], input
    )


@pytest.mark.parametrize("change", PLAIN)
def test_c_accepts_plain_layers(change: str) -> None:
    layer = nn.Linear(4, 6)
    PLAIN[change](layer)
    in_c, found = _both(layer, torch.randn(2, 4))
    assert isinstance(in_c, list) and isinstance(found, list)
    ((weight, bias),) = in_c
    assert weight is found[0][0] and bias is found[0][1]
    assert native_guards.passes_natively(layer, operands._PLAIN_CALL)


@pytest.mark.parametrize("change", CHANGED)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_c_rejects_layers_that_python_rejects(change: str) -> None:
    layer = nn.Linear(4, 6)
    CHANGED[change](layer)
    in_c, found = _both(layer, torch.randn(2, 4))
    assert in_c is None or found is not None
    is_plain = operands.class_calls_forward(type(layer)) and operands.is_plain_instance(layer)
    assert is_plain or not native_guards.passes_natively(layer, operands._PLAIN_CALL)


@pytest.mark.parametrize("kind", CLASSES)
def test_c_accepts_only_torchs_own_class(kind: type[nn.Module]) -> None:
    layer: nn.Module = nn.Bilinear(4, 4, 6) if kind is nn.Bilinear else nn.Linear(4, 6)
    layer.__class__ = kind
    in_c, found = _both(layer, torch.randn(2, 4))
    assert (in_c is None) == (found is None) == (kind is not nn.Linear)


def test_c_rejects_objects_that_are_no_modules() -> None:
    for other in (None, torch.randn(2, 4), types.SimpleNamespace(weight=1)):
        assert native_guards.linear_parameters_natively([other], guards.LINEAR, torch.randn(2, 4)) is None
        assert not native_guards.passes_natively(other, operands._PLAIN_CALL)


def test_c_rejects_patched_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(4, 6)
    for holder, name in ((nn.Linear, "forward"), (nn.Module, "__call__"), (nn.Module, "__getattr__")):
        with monkeypatch.context() as patch:
            patch.setattr(holder, name, lambda *call: getattr(nn.Module, "never"))  # noqa: B009
            assert native_guards.linear_parameters_natively([layer], guards.LINEAR, torch.randn(2, 4)) is None
    with monkeypatch.context() as patch:
        patch.setattr(nn.Linear.forward, "__code__", _OwnCall.__call__.__code__.replace(co_freevars=()))
        assert native_guards.linear_parameters_natively([layer], guards.LINEAR, torch.randn(2, 4)) is None
    assert native_guards.linear_parameters_natively([layer], guards.LINEAR, torch.randn(2, 4)) is not None


def test_are_same_equals_python(monkeypatch: pytest.MonkeyPatch) -> None:
    def function() -> None: ...

    held = {"name": 1}
    cases = [
        ((held, "name", held["name"]),),
        ((held, "name", 2),),
        ((held, "other", native_guards.MISSING),),
        ((held, "name", held["name"]), (nn.Linear, "forward", nn.Linear.forward)),
        ((nn.Linear, "nothing", native_guards.MISSING),),
        ((nn.Linear, "nothing", None),),
        ((function, "__code__", function.__code__), (function, "__defaults__", None)),
        ((function, "__code__", nn.Linear.forward.__code__),),
        (),
    ]
    in_c = [native_guards.are_same(case) for case in cases]
    monkeypatch.setattr(direct, "thin_module", None)
    assert in_c == [native_guards.are_same(case) for case in cases]
    assert True in in_c and False in in_c


# Whole call sites


class MLP(nn.Module):
    act: Any

    def __init__(self, act: Callable[[], nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.gate, self.value, self.last = nn.Linear(4, 6), nn.Linear(4, 6, bias=False), nn.Linear(6, 4)
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.gate(x)) * self.value(x))


OPTIONS = {"recompute": "block"}
NAMES = ("gate", "value", "last", "act")


def _guarded(model: Any, input: Any) -> tuple[list[Any], list[Any]]:
    """The results of the guarded call in C and in Python, on the modules as a forward would load them."""
    in_c = native_call(fused_patterns.gated_mlp, {"input": 1} | {name: name for name in NAMES}, OPTIONS)
    assert in_c is not None
    operands = {name: getattr(model, name) for name in NAMES}
    return in_c(model, input), guarded_call(fused_patterns.gated_mlp, (), OPTIONS)(input=input, **operands)


class _Custom(nn.Module):
    """A user's activation, which a trial recognises."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x * self.slope)


@pytest.mark.parametrize("act", [nn.GELU, nn.SiLU, nn.ReLU, nn.Tanh, lambda: nn.GELU("tanh"), _Custom])
def test_c_accepts_a_call_site(act: Callable[[], nn.Module]) -> None:
    model, input = MLP(act), torch.randn(2, 4, requires_grad=True)
    expected = model(input)
    ckpt_kernels.convert(model)
    for outcome in _guarded(model, input):
        assert outcome.pop()
        torch.testing.assert_close(outcome.pop(), expected)


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _Loads(MLP):
    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)


class _Attribute(MLP):
    gate = property(lambda self: self._modules["value"])  # type: ignore[assignment]


def _patched(holder: Any, name: str, value: Any) -> Callable[..., Any]:
    @contextlib.contextmanager
    def patch(model: MLP):
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(holder, name, value, raising=False)
            yield

    return patch


def _global_hook(model: MLP):
    handle = nn.modules.module.register_module_forward_hook(lambda *call: None)
    return contextlib.closing(types.SimpleNamespace(close=handle.remove))


def _changed(change: Callable[[MLP], Any]) -> Callable[[MLP], Any]:
    return lambda model: contextlib.nullcontext(change(model))


AROUND: dict[str, Callable[[MLP], Any]] = {
    "a dispatch mode": lambda model: _Dispatch(),
    "a function mode": lambda model: _Functions(),
    "a device": lambda model: torch.device("cpu"),
    "autocast": lambda model: torch.autocast("cpu"),
    "forward-mode AD": lambda model: forward_ad.dual_level(),
    "a profiler": lambda model: torch.profiler.profile(),
    "hooks for all": _global_hook,
    "another linear": _patched(F, "linear", lambda *given: torch.zeros(2, 4)),
    "another product": _patched(Tensor, "__mul__", lambda self, other: self),
    "another method": _patched(Tensor, "chunk", lambda self, *given: (self,)),
    "another forward": _patched(nn.GELU, "forward", lambda self, x: x),
    "another call": _patched(nn.Module, "__call__", lambda self, *given: given[0]),
    "another load": _patched(nn.Module, "__getattr__", lambda self, name: self._modules[name]),
    "a hook of the activation": _changed(lambda model: model.act.register_forward_hook(lambda *call: None)),
    "a hook of a layer": _changed(lambda model: model.last.register_forward_hook(lambda *call: None)),
    "another setting": _changed(lambda model: setattr(model.act, "approximate", "tanh")),
    "a setting of another type": _changed(lambda model: setattr(model.act, "approximate", ["none"])),
    "no setting": _changed(lambda model: delattr(model.act, "approximate")),
    "in place": _changed(lambda model: setattr(model.act, "inplace", True)),
    "a forward of its own": _changed(lambda model: setattr(model.act, "forward", lambda x: x)),
    "another activation": _changed(lambda model: setattr(model, "act", nn.Softmax(-1))),
    "an activation that was not converted": _changed(lambda model: setattr(model, "act", nn.SiLU())),
    "a function": _changed(lambda model: (delattr(model, "act"), setattr(model, "act", F.silu))),
    "another function": _changed(lambda model: (delattr(model, "act"), setattr(model, "act", torch.exp))),
    "an instance attribute over a layer": _changed(lambda model: model.__dict__.__setitem__("gate", nn.Identity())),
    "a parameter in the place of a layer": _changed(lambda m: m._parameters.__setitem__("gate", m.last.weight)),
    "modules in a dict of one's own": _changed(lambda m: m.__dict__.__setitem__("_modules", _OwnDict(m._modules))),
    "loads of its own": _changed(lambda model: setattr(model, "__class__", _Loads)),
    "an attribute of its class": _changed(lambda model: setattr(model, "__class__", _Attribute)),
    "no value": _changed(lambda model: model._modules.__setitem__("value", None)),
    "float64": _changed(lambda model: model.double()),
    "a frozen layer": _changed(lambda model: model.gate.requires_grad_(False)),
    "other shapes": _changed(lambda model: setattr(model, "last", nn.Linear(7, 4))),
}
# Changes that C accepts too.
ACCEPTED = ("a frozen layer", "a function")


@pytest.mark.parametrize("change", AROUND)
def test_c_rejects_call_sites_that_python_rejects(change: str) -> None:
    model, input = MLP(), torch.randn(2, 4, requires_grad=True)
    ckpt_kernels.convert(model)
    assert _guarded(model, input)[0].pop()
    with AROUND[change](model):
        in_c, in_python = _guarded(model, input)
    assert in_c.pop() == (change in ACCEPTED)
    assert not in_c or in_python.pop()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Sparse")
def test_c_accepts_ordinary_tensors_only() -> None:
    x = torch.randn(3, 4)
    jagged = torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged)
    others = [x.double(), x.long(), x.to_sparse(), x.to_sparse_csr(), x.to_mkldnn(), x.to("meta"), x.cfloat(), jagged]
    others += [torch.nested.nested_tensor([x, x[:2]]), x.as_subclass(type("Own", (Tensor,), {})), None, [x]]
    owner = guards.LINEAR._replace(undefined=())
    native_check = native_guards.SiteGuard(operands.GLOBAL_STATE, owner, guards.LINEAR, (), ((0, "t"),)).native_check()
    assert native_check is not None
    assert [native_check(given) for given in others] == [None] * len(others)
    for given in (x, x.t(), x[:0], x[:1].expand(5, 4), x.bfloat16(), x.half(), nn.Parameter(x), x.sum()):
        found = native_check(given)
        assert found is not None and found[0] is given and operands.is_ordinary(given)


def test_malformed_arguments_are_errors_or_rejected() -> None:
    """Malformed arguments of the C function never crash."""
    ask = direct.thin_module.operands
    quiet, such = operands.GLOBAL_STATE, guards.LINEAR
    for given in (
        (),
        (1, such, such, (), ()),
        (quiet, 1, such, (), ()),
        (quiet, such, such, 1, ()),
        ((), such, such, (), ()),
    ):
        with pytest.raises(TypeError):
            ask(*given)
    nothing = such._replace(undefined=())
    for wanted in ((1,), ((1, "t"),), ((-1, "t"),), (("name", "t"),), ((0, "l"),), ((0, ""),)):
        assert ask(quiet, nothing, such, (), wanted, torch.zeros(2)) is None
    assert ask(quiet, such, such, (), (("weight", "o"),), object()) is None
    assert ask(quiet, such, such, (), (("weight", "o"),)) is None

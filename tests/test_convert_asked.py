"""What C says of modules and tensors at a site is what Python says of them."""

import types
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ckpt_kernels.convert import asked, guards, operands
from ckpt_kernels.thin import direct

pytestmark = pytest.mark.skipif(direct.asked is None, reason="there is no _thin here")


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
    """What C knows of it, and what Python does."""
    return asked.linears_surely([layer], guards.LINEAR, input), guards.linear_operands_asked([layer], input)


@pytest.mark.parametrize("change", PLAIN)
def test_c_knows_plain_layers(change: str) -> None:
    layer = nn.Linear(4, 6)
    PLAIN[change](layer)
    surely, found = _both(layer, torch.randn(2, 4))
    assert isinstance(surely, list) and isinstance(found, list)
    ((weight, bias),) = surely
    assert weight is found[0][0] and bias is found[0][1]
    assert asked.is_surely(layer, operands._CALLED_PLAINLY)


@pytest.mark.parametrize("change", CHANGED)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_c_says_nothing_where_python_does_not(change: str) -> None:
    layer = nn.Linear(4, 6)
    CHANGED[change](layer)
    surely, found = _both(layer, torch.randn(2, 4))
    assert surely is None or found is not None
    plainly = operands.calls_forward(type(layer)) and operands.is_bare(layer)
    assert plainly or not asked.is_surely(layer, operands._CALLED_PLAINLY)


@pytest.mark.parametrize("kind", CLASSES)
def test_classes(kind: type[nn.Module]) -> None:
    layer: nn.Module = nn.Bilinear(4, 4, 6) if kind is nn.Bilinear else nn.Linear(4, 6)
    layer.__class__ = kind
    surely, found = _both(layer, torch.randn(2, 4))
    assert (surely is None) == (found is None) == (kind is not nn.Linear)


def test_what_is_no_module() -> None:
    for other in (None, torch.randn(2, 4), types.SimpleNamespace(weight=1)):
        assert asked.linears_surely([other], guards.LINEAR, torch.randn(2, 4)) is None
        assert not asked.is_surely(other, operands._CALLED_PLAINLY)


def test_patched_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(4, 6)
    for holder, name in ((nn.Linear, "forward"), (nn.Module, "__call__"), (nn.Module, "__getattr__")):
        with monkeypatch.context() as patch:
            patch.setattr(holder, name, lambda *call: getattr(nn.Module, "never"))  # noqa: B009
            assert asked.linears_surely([layer], guards.LINEAR, torch.randn(2, 4)) is None
    with monkeypatch.context() as patch:
        patch.setattr(nn.Linear.forward, "__code__", _OwnCall.__call__.__code__.replace(co_freevars=()))
        assert asked.linears_surely([layer], guards.LINEAR, torch.randn(2, 4)) is None
    assert asked.linears_surely([layer], guards.LINEAR, torch.randn(2, 4)) is not None


def test_are_same_as_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    def function() -> None: ...

    held = {"name": 1}
    cases = [
        ((held, "name", held["name"]),),
        ((held, "name", 2),),
        ((held, "other", asked.MISSING),),
        ((held, "name", held["name"]), (nn.Linear, "forward", nn.Linear.forward)),
        ((nn.Linear, "nothing", asked.MISSING),),
        ((nn.Linear, "nothing", None),),
        ((function, "__code__", function.__code__), (function, "__defaults__", None)),
        ((function, "__code__", nn.Linear.forward.__code__),),
        (),
    ]
    in_c = [asked.are_same(case) for case in cases]
    monkeypatch.setattr(direct, "asked", None)
    assert in_c == [asked.are_same(case) for case in cases]
    assert True in in_c and False in in_c

"""Converted modules read the same globals, attributes and defaults as the original code at every call."""

import importlib
import pickle
import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ckpt_kernels
from ckpt_kernels.convert.code import reachability
from ckpt_kernels.convert.rotations import recognition
from ckpt_kernels.convert.torch_patches import INHERITED_METHODS, TORCH_FUNCTIONS

from . import test_convert_tried as tried
from .conversion import WIDTH, random_tensor
from .test_convert_tried import Patched, Sloped, found_in, rows


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x) if x.shape[0] < 5000 else x


class Loops(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(x.shape[0] // 5000):
            x = 2 * x
        return F.silu(x)


others = types.ModuleType("others")
others.silu = lambda x: F.silu(x) if x.shape[0] < 5000 else x


class FromElsewhere(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return others.silu(x)


@pytest.mark.parametrize("kind", [Branches, Loops, FromElsewhere])
def test_branches_on_lengths_beyond_the_trials(kind) -> None:
    module = kind()
    ckpt_kernels.convert(nn.Sequential(module))
    long = random_tensor(6000, 2)
    now = module(long)
    ckpt_kernels.revert(module)
    torch.testing.assert_close(now, module(long))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x) * self.scale


def test_a_setting_that_becomes_a_tensor_gets_a_gradient() -> None:
    module = Scaled()
    assert found_in(ckpt_kernels.convert(module)) == {"": "bias_act (silu)"}
    module.scale = torch.ones((), requires_grad=True)
    module(rows()).sum().backward()
    assert module.scale.grad is not None


class Held(Scaled):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.ones(())


def test_a_tensor_attribute_is_read_at_every_call() -> None:
    module = Held()
    ckpt_kernels.convert(module)
    module.scale.fill_(3)
    torch.testing.assert_close(module(rows()), 3 * F.silu(rows()))


class OfClass(nn.Module):
    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x) * self.scale


def test_a_changed_class_attribute_is_read(monkeypatch) -> None:
    module = OfClass()
    ckpt_kernels.convert(module)
    monkeypatch.setattr(OfClass, "scale", 3.0)
    torch.testing.assert_close(module(rows()), 3 * F.silu(rows()))


class KeywordDefault(nn.Module):
    def forward(self, x: Tensor, *, scale=[1.0]) -> Tensor:  # noqa: B006
        return F.silu(x) * scale[0]


def test_changed_keyword_defaults_are_read() -> None:
    module = KeywordDefault()
    ckpt_kernels.convert(module)
    KeywordDefault.forward.__kwdefaults__["scale"][0] = 3.0
    try:
        torch.testing.assert_close(module(rows()), 3 * F.silu(rows()))
    finally:
        KeywordDefault.forward.__kwdefaults__["scale"][0] = 1.0


def factor() -> float:
    return 1.0


class Method(nn.Module):
    def act(self, x: Tensor) -> Tensor:
        return F.silu(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x)


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (lambda t: F.silu(t) * factor())(x)


class Builtin(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x) * float(1)


class Imports(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        from tests.test_convert_reads import factor

        return F.silu(x) * factor()


def enclosed() -> nn.Module:
    def act(x: Tensor) -> Tensor:
        return F.silu(x) * factor()

    class Enclosed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return act(x)

    return Enclosed()


@pytest.mark.parametrize("how", ["method", "inner", "builtin", "import", "variable"])
def test_changed_functions_are_called(how, monkeypatch) -> None:
    make, change = {
        "method": (Method, lambda: monkeypatch.setattr(Method, "act", lambda self, x: F.relu(x))),
        "inner": (Inner, lambda: monkeypatch.setitem(globals(), "factor", lambda: 3.0)),
        "builtin": (Builtin, lambda: monkeypatch.setitem(globals(), "float", lambda _: 3.0)),
        "import": (Imports, lambda: monkeypatch.setitem(globals(), "factor", lambda: 3.0)),
        "variable": (enclosed, lambda: monkeypatch.setitem(globals(), "factor", lambda: 3.0)),
    }[how]
    module = make()
    before = module(rows())
    ckpt_kernels.convert(module)
    change()
    now = module(rows())
    ckpt_kernels.revert(module)
    torch.testing.assert_close(now, module(rows()))
    assert not torch.allclose(now, before)


swap = importlib.import_module("ckpt_kernels.convert.swap")
LAST = None


class StoresGlobal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        global LAST
        LAST = x
        return F.silu(x)


def test_an_assigned_global_is_assigned_only_by_calls() -> None:
    global LAST
    LAST = None
    module = StoresGlobal()
    ckpt_kernels.convert(module)
    assert LAST is None
    given = rows()
    module(given)
    assert LAST is given


@pytest.mark.parametrize("kind", [Sloped, Patched])
def test_an_unpickled_module_checks_too(kind, monkeypatch) -> None:
    module = kind()
    ckpt_kernels.convert(module)
    loaded = pickle.loads(pickle.dumps(module))
    monkeypatch.setitem(vars(tried), "slope", F.relu)
    monkeypatch.setattr(F, "silu", F.relu)
    assert torch.equal(loaded(rows()), kind.forward(loaded, rows()))


@pytest.mark.parametrize("forward", ["untried", "other"])
def test_an_unpickled_module_of_a_changed_class(forward, monkeypatch) -> None:
    module = Sloped()
    ckpt_kernels.convert(module)
    data = pickle.dumps(module)
    monkeypatch.setattr(swap, "_classes", {})
    monkeypatch.setattr(swap, "_PROCESS", "another")
    function = (lambda self, x: x.cumsum(-1)) if forward == "untried" else (lambda self, x: F.gelu(x))
    monkeypatch.setattr(Sloped, "forward", function)
    loaded = pickle.loads(data)
    assert torch.equal(loaded(rows()), function(loaded, rows()))


def test_a_second_conversion_reads_changed_globals(monkeypatch) -> None:
    module = Sloped()
    assert found_in(ckpt_kernels.convert(module)) == {"": "bias_act (silu)"}
    monkeypatch.setitem(vars(tried), "slope", F.gelu)
    ckpt_kernels.convert(module)
    torch.testing.assert_close(module(rows()), F.gelu(rows()))


@pytest.mark.parametrize("names", [reachability._ALLOWED, recognition._NAMES], ids=["trials", "rotations"])
def test_all_methods_that_code_may_name_are_watched(names) -> None:
    """A user may patch any of them, and the code that names it must see the patch."""
    watched = {name for holder, name, _ in TORCH_FUNCTIONS if holder is Tensor}.union(INHERITED_METHODS)
    functions = (types.FunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)
    named = {name for name in names if isinstance(getattr(Tensor, name, None), functions)}
    assert named and named <= watched


class ChannelsFirst(nn.Module):
    """A norm whose code names methods of tensors, and a function of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x.movedim(1, -1).contiguous(), self.weight.shape, self.weight, self.bias, 1e-6)
        return torch.movedim(y, -1, 1)


@pytest.mark.parametrize("holder, name", [(Tensor, "movedim"), (Tensor, "contiguous"), (torch, "movedim")])
def test_a_patched_function_is_called(holder, name: str, monkeypatch) -> None:
    model = nn.Sequential(ChannelsFirst())
    assert found_in(ckpt_kernels.convert(model)) == {"0": "layer_norm (channels first)"}
    function = getattr(holder, name)
    monkeypatch.setattr(holder, name, lambda *args: 2 * function(*args), raising=False)
    x = torch.randn(2, WIDTH, 3, 3)
    torch.testing.assert_close(model(x), ChannelsFirst.forward(model[0], x))

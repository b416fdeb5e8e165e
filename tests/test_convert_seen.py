"""Converted models with users' code that writes to tensors, changes weights, patches torch, or sets modes."""

import copy
import functools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import ckpt_kernels

LEVELS = ("block", "output", "all")
TABLE: dict[Any, float] = {}


class MLP(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up, self.act, self.down = nn.Linear(16, 32, bias=bias), nn.GELU(), nn.Linear(32, 16, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(self.norm(x))))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def twins(model: nn.Module, recompute: str = "output") -> tuple[nn.Module, nn.Module]:
    """The model and a converted copy."""
    converted = copy.deepcopy(model)
    ckpt_kernels.convert(converted, recompute=recompute)
    return model, converted


def assert_same(model: nn.Module, converted: nn.Module, x: Tensor, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """Asserts equal outputs and gradients."""
    results = []
    for module in (model, converted):
        y = call(module, x)
        results.append([y, *torch.autograd.grad(y.sin().sum(), list(module.parameters()))])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def call_module(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("make", [MLP, Gated, lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))])
@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 3, 16)])
def test_an_output_may_be_written_to(make: Callable[[], nn.Module], shape: tuple[int, ...], level: str) -> None:
    assert_same(*twins(make(), level), torch.randn(shape), lambda model, x: model(x).mul_(2).add_(x))


@pytest.mark.parametrize("level", LEVELS)
def test_a_reader_of_a_detached_output_after_an_optimizer_step(level: str) -> None:
    """An actor and a critic: the weights of the critic and of the shared norm are updated before the actor's backward
    pass."""

    def gradients(encoder: nn.Module) -> list[Tensor]:
        torch.manual_seed(0)
        critic, actor = nn.Linear(16, 1), nn.Linear(16, 4)
        features = encoder(torch.ones(3, 5, 16).cumsum(-1))
        value, policy = critic(features), actor(features.detach())
        value.sum().backward()
        torch.optim.SGD([*encoder.parameters(), *critic.parameters()], 0.1).step()
        policy.square().sum().backward()
        return [p.grad for p in actor.parameters()]

    for expected, found in zip(
        *map(gradients, twins(nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16)), level)), strict=True
    ):
        torch.testing.assert_close(found, expected)


class _Sine(torch.autograd.Function):
    """The backward pass overwrites the saved tensor with the gradient, as no one else holds the tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return x.cos_().mul_(grad)


class _TwoReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        other = self.linear(y * 2.0)
        return other + _Sine.apply(y)


def test_a_backward_pass_that_writes_to_a_saved_tensor() -> None:
    """The other reader of the recomputed output gets the right values."""
    assert_same(*twins(_TwoReaders()), torch.randn(3, 16), call_module)


def _bias_as_buffer(model: MLP) -> None:
    for linear in (model.up, model.down):
        bias = linear.bias.detach() + 1
        del linear.bias
        linear.register_buffer("bias", bias)


def _bias_of_one(model: MLP) -> None:
    model.down.bias = nn.Parameter(torch.ones(1))


def _weight_of_one_dimension(model: MLP) -> None:
    model.down.weight, model.down.bias = nn.Parameter(torch.ones(32)), None


class _Doubled(nn.Linear):
    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        return value * 2 if name == "weight" else value


def _weight_by_getattr(model: MLP) -> None:
    model.up = _Doubled(16, 32)
    for parameter in model.up._parameters.values():
        nn.init.normal_(parameter, std=0.25)


@pytest.mark.parametrize(
    "change", [_bias_as_buffer, _bias_of_one, _weight_of_one_dimension, _weight_by_getattr], ids=lambda f: f.__name__
)
def test_linear_layers_with_unusual_parameters(change: Callable[[MLP], None]) -> None:
    model = MLP()
    change(model)
    assert_same(*twins(model), torch.randn(3, 16), call_module)


# Each class in a forked process, which has imported torch already.
_PATCHED = """
import copy, os
import torch, torch._dynamo
from torch import nn
for kind in nn.LayerNorm, nn.Linear, nn.GELU:
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0, kind
        continue
    original = kind.forward
    kind.forward = lambda self, x: original(self, x) * 2
    import ckpt_kernels
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    converted = copy.deepcopy(model)
    ckpt_kernels.convert(converted)
    x = torch.randn(3, 16)
    torch.testing.assert_close(converted(x), model(x))
    break
"""


def test_torchs_layers_patched_before_the_import() -> None:
    subprocess.run([sys.executable, "-c", _PATCHED], check=True)


def test_an_import_under_a_default_device() -> None:
    code = """
import torch
with torch.device("meta"):
    import ckpt_kernels
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 4))
ckpt_kernels.convert(model)
model(torch.randn(3, 4)).sum().backward()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


class _Functions(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        found = function(*args, **(kwargs or {}))
        return found * 2 if function in (F.gelu, F.layer_norm) else found


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        found = function(*args, **(kwargs or {}))
        return found * 2 if function is torch.ops.aten.gelu.default else found


@pytest.mark.parametrize("mode", [_Functions, _Operations])
def test_modes_that_change_results(mode: Callable[[], Any]) -> None:
    model, converted = twins(MLP())
    x = torch.randn(3, 16)
    with mode():
        expected, found = model(x), converted(x)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(expected, model(x))


@pytest.mark.parametrize("kind,name,value", [(nn.ELU, "alpha", 3), (nn.Softplus, "beta", 3)])
def test_settings_that_are_integers(kind: type[nn.Module], name: str, value: int) -> None:
    model, converted = twins(nn.Sequential(kind(1)))
    for modules in (model, converted):
        setattr(modules[0], name, value)
    x = torch.randn(3, 16)
    torch.testing.assert_close(converted(x), model(x))


class _Lazy:
    @property
    def __class__(self) -> type:
        raise RuntimeError("was loaded")


def test_lazy_objects_of_a_file_are_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    class Local(MLP):
        """A new class, of which no analysis is cached."""

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.act(self.up(x)))

    monkeypatch.setitem(globals(), "LAZY", _Lazy())
    assert ckpt_kernels.convert(Local()).replaced


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class HandWrittenRMS(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


@pytest.mark.parametrize(
    "context",
    [
        lambda: torch.autograd.graph.disable_saved_tensors_hooks("not here"),
        FakeTensorMode,
        torch.inference_mode,
        lambda: torch.device("meta"),
        lambda: torch.autocast("cpu", torch.bfloat16),
    ],
    ids=["no hooks", "fake", "inference", "meta", "autocast"],
)
def test_trials_are_independent_of_open_contexts(context: Callable[[], Any]) -> None:
    """New classes, so that no trial is cached."""
    kinds = [
        type(kind.__name__, (kind,), {"__qualname__": f"<locals>.{kind.__name__}"})
        for kind in (QuickGELU, HandWrittenRMS)
    ]
    model = nn.Sequential(*(kind() for kind in kinds))
    with context():
        report = ckpt_kernels.convert(model)
    assert {entry.by for entry in report.replaced} == {"bias_act (quick_gelu)", "rms_norm"}


def test_replaced_code_of_torchs_own_method(monkeypatch: pytest.MonkeyPatch) -> None:
    model, converted = twins(MLP())
    x = torch.randn(3, 16)

    def forward(self: nn.Linear, input: Tensor) -> Tensor:
        return input.new_ones(*input.shape[:-1], self.out_features)

    monkeypatch.setattr(nn.Linear.forward, "__code__", forward.__code__)
    torch.testing.assert_close(converted(x), model(x))


def _per_row(z: Tensor) -> Tensor:
    return torch.func.vmap(torch.func.grad(lambda row: row.sin().sum()))(z)


class Given(nn.Module):
    """A norm whose output goes to a function that is an argument or an attribute."""

    def __init__(self, functions: list | None = None) -> None:
        super().__init__()
        self.norm, self.linear, self.functions = nn.LayerNorm(16), nn.Linear(16, 16), functions

    def forward(self, x: Tensor, function: Callable | None = None) -> Tensor:
        for call in self.functions or [function or (lambda z: z)]:
            x = call(self.norm(x))
        return self.linear(x)


@pytest.mark.parametrize("how", ["argument", "list", "partial in a list", "later hook", "later pre-hook"])
def test_transforms_in_arguments_lists_and_hooks(how: str) -> None:
    torch.manual_seed(0)
    function = functools.partial(_per_row) if "partial" in how else _per_row
    model = Given([function] if "list" in how else None)
    twin = copy.deepcopy(model)
    ckpt_kernels.convert(twin, recompute="output")
    x = torch.randn(4, 16)
    for given in (model, twin):
        if how == "later hook":
            given.norm.register_forward_hook(lambda module, args, output: _per_row(output))
        if how == "later pre-hook":
            given.linear.register_forward_pre_hook(lambda module, args: (_per_row(args[0]),))
    arguments = (x, _per_row) if how == "argument" else (x,)
    torch.testing.assert_close(twin(*arguments), model(*arguments))

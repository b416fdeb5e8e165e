"""Layers at "checkpoint": arguments, buffers and attributes are those of the first pass; and layers that must not run
again."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckpt_kernels
from ckpt_kernels.call_state import BufferSnapshot
from ckpt_kernels.check import check
from ckpt_kernels.plan.plan import structure_of
from ckpt_kernels.runs.arguments import are_plain
from ckpt_kernels.thin import direct

WIDTH = 6


class Layer(nn.Module):
    """A layer whose function doubles the exponent, of which torch saves the power, where a condition on the arguments
    holds."""

    def __init__(self, holds: Callable[..., Any]) -> None:
        super().__init__()
        self.holds = holds
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.latent = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        y = self.linear(self.norm(x) + other)
        return (y * 2 if self.holds(self, x, other) else y).exp()


class Net(nn.Module):
    def __init__(self, holds: Callable[..., Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(holds) for _ in range(2))

    def forward(self, x: Tensor, is_leaf: bool) -> Tensor:
        if not is_leaf:
            x = x * 1
            x.is_marked = True
        first = x
        for layer in self.layers:
            x = layer(x, layer.latent)
        if not is_leaf:
            first.is_marked = False
        return x


def counts(layer: nn.Module, x: Tensor, other: Tensor) -> bool:
    """An attribute that the layer itself sets on the argument."""
    x.calls = getattr(x, "calls", 0) + 1
    return x.calls == 1


def hooks(layer: nn.Module, x: Tensor, other: Tensor) -> bool:
    x.register_hook(lambda gradient: gradient * 2)
    return True


CONDITIONS: dict[str, Callable[..., Any]] = {
    "attribute": lambda layer, x, other: getattr(x, "is_marked", False),
    "leaf": lambda layer, x, other: x.is_leaf,
    "parameter": lambda layer, x, other: isinstance(other, nn.Parameter),
    "own parameter": lambda layer, x, other: other is layer.latent,
    "own attribute": counts,
    "hook": hooks,
}


def gradients(net: nn.Module, *rest: Any) -> list[Tensor]:
    x = torch.linspace(-1, 1, 3 * WIDTH, dtype=torch.float64).view(3, WIDTH).requires_grad_()
    return list(torch.autograd.grad(net(x, *rest).sum(), [x, *net.parameters()]))


@pytest.mark.parametrize("is_leaf", (True, False))
@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_layer_finds_the_arguments_of_the_first_pass(condition: str, is_leaf: bool) -> None:
    torch.manual_seed(0)
    net = Net(CONDITIONS[condition]).double()
    expected = gradients(net, is_leaf)
    ckpt_kernels.convert(net, recompute={"layers.*": "checkpoint"})
    torch.testing.assert_close(gradients(net, is_leaf), expected)


class Scaled(nn.Module):
    """A layer with a buffer and a tensor attribute, which somebody moves between the passes."""

    def __init__(self, size: int = WIDTH) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("scale", torch.ones(size))
        self.shift = torch.ones(size)

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x) + self.scale[:WIDTH] + self.shift[:WIDTH]).exp()

    def move(self) -> None:
        self.scale.mul_(0.7)
        self.shift.sub_(0.2)


class Moving(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        self.move()
        return super().forward(x)


class Unseen(Scaled):
    """A layer that writes to the buffer without a new version."""

    def forward(self, x: Tensor) -> Tensor:
        self.scale.data.mul_(0.7)
        return super().forward(x)

    def move(self) -> None:
        """Nobody else writes."""


class Asking(Unseen):
    """A layer that asks for gradients within the forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        (slope,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        return y + slope.detach()


def passes(net: nn.Module) -> list[Tensor]:
    """Two forward passes, then one backward pass, with writes after each forward pass; and the tensors at the end."""
    x = torch.linspace(-1, 1, 2 * WIDTH, dtype=torch.float64).view(2, WIDTH).requires_grad_()
    loss = x.sum() * 0
    for factor in (1, 2):
        loss = loss + net(x * factor).sum()
        for layer in net:
            layer.move()
    held = [tensor.clone() for layer in net for tensor in (layer.scale, layer.shift)]
    return [*torch.autograd.grad(loss, [x, *net.parameters()]), *held]


@pytest.mark.parametrize("library", (direct.thin_module, None))
@pytest.mark.parametrize("kind", (Scaled, Moving, Unseen, Asking))
def test_tensors_written_between_the_passes_have_the_values_of_the_first(
    kind: type[Scaled], library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "thin_module", library)
    torch.manual_seed(0)
    net = nn.Sequential(kind(), kind()).double()
    for layer in net:
        layer.shift = layer.shift.double()
    twin = copy.deepcopy(net)
    ckpt_kernels.convert(twin, recompute={"0": "checkpoint", "1": "checkpoint"})
    torch.testing.assert_close(passes(twin), passes(net))


@pytest.mark.parametrize("tensor", (torch.ones(3, device="meta"), torch.ones(1).expand(3)))
def test_tensors_that_no_copy_can_be_written_back_to_are_not_copied(tensor: Tensor) -> None:
    layer = nn.Linear(WIDTH, WIDTH)
    layer.held = tensor
    ckpt_kernels.convert(net := nn.Sequential(layer), recompute={"0": "checkpoint"})
    net(torch.ones(2, WIDTH)).exp().sum().backward()
    assert layer.weight.grad is not None


def test_a_write_to_a_large_buffer_between_the_passes_is_an_error() -> None:
    net = nn.Sequential(Scaled(2**16 + 1))
    ckpt_kernels.convert(net, recompute={"0": "checkpoint"})
    loss = net(torch.ones(2, WIDTH)).sum()
    net[0].move()
    with pytest.raises(RuntimeError, match=r"a buffer of a checkpointed layer, torch.float32 \(65537,\), was modified"):
        loss.backward()


class Weights(Tensor):
    """A subclass of Tensor, which is not copied."""


ATTRIBUTES_WITHOUT_COPY = {
    "large": lambda: torch.ones(2**16 + 1),
    "subclass": lambda: torch.ones(WIDTH).as_subclass(Weights),
    "expanded": lambda: torch.ones(1).expand(WIDTH),
}


@pytest.mark.parametrize("name", ATTRIBUTES_WITHOUT_COPY)
@pytest.mark.parametrize("write", ("none", "by the layer", "by others"))
def test_a_layer_with_an_attribute_that_is_not_copied(name: str, write: str) -> None:
    class Scaling(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x).exp()
            if not hasattr(self, "bank"):
                return y
            if write == "by the layer":
                self.bank.as_subclass(Tensor)[:1].mul_(3.0)
            return y * self.bank.as_subclass(Tensor)[:WIDTH].clone()

    def gradients(level: str) -> list[Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(*(Scaling(WIDTH, WIDTH) for _ in range(3)))
        net[1].bank = ATTRIBUTES_WITHOUT_COPY[name]()
        ckpt_kernels.convert(net, recompute={"*": level})
        loss = net(torch.ones(2, WIDTH)).square().sum()
        if write == "by others":
            net[1].bank.as_subclass(Tensor)[:1].mul_(3.0)
        return [*torch.autograd.grad(loss, list(net.parameters())), net[1].bank.as_subclass(Tensor)]

    if write == "by others":
        kind = "Weights, " if name == "subclass" else ""
        with pytest.raises(RuntimeError, match=rf"a buffer of a checkpointed layer, {kind}torch\.float32 \("):
            gradients("checkpoint")
        return
    for found, expected in zip(gradients("checkpoint"), gradients("none"), strict=True):
        torch.testing.assert_close(found, expected)


def test_calls_share_the_copies_of_a_buffer_that_nobody_writes_to() -> None:
    layer = Scaled()
    first, second = (BufferSnapshot(layer.scale, layer) for _ in range(2))
    layer.scale.add_(0)
    third = BufferSnapshot(layer.scale, layer)
    assert first._copy is second._copy is not third._copy
    other = layer.scale.clone()
    assert third._copy.is_of(layer.scale, layer.scale._version) and not third._copy.is_of(other, layer.scale._version)


@pytest.mark.parametrize("is_training", (True, False))
def test_calls_share_no_copies_of_statistics_in_training(is_training: bool) -> None:
    norm = nn.BatchNorm1d(WIDTH).train(is_training)
    first, second = (BufferSnapshot(norm.running_mean, norm) for _ in range(2))
    assert (first._copy is second._copy) == (not is_training)


def test_which_arguments_a_call_may_be_repeated_with() -> None:
    number = torch.ones(2)
    assert are_plain([number, (1, {"a": (number, "b")}), None, torch.float32])
    nested = torch.nested.nested_tensor([number, number[:1]])
    for value in ([number], {"a": [1]}, ({"a": {number}},), nested, (nested,), number.to_sparse(), object()):
        assert not are_plain([value])


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(self.norm(x)))


@torch.jit.script
def scripted_tanh(x: Tensor) -> Tensor:
    return torch.tanh(x)


class CallingScripted(Inner):
    def forward(self, x: Tensor) -> Tensor:
        return scripted_tanh(self.linear(self.norm(x)))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_layer_that_ends_with_a_scripted_function_runs_again() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(CallingScripted(), CallingScripted()).double()
    x = torch.linspace(-1, 1, 2 * WIDTH, dtype=torch.float64).view(2, WIDTH)
    expected = torch.autograd.grad(net(x).sum(), list(net.parameters()))
    ckpt_kernels.convert(net, recompute={"0": "checkpoint", "1": "checkpoint"})
    for _ in range(3):
        torch.testing.assert_close(torch.autograd.grad(net(x).sum(), list(net.parameters())), expected)


def scripted(model: nn.Module) -> nn.Module:
    return torch.jit.script(model)


def traced(model: nn.Module) -> nn.Module:
    return torch.jit.trace(model, torch.ones(2, WIDTH))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("compiled", (scripted, traced))
@pytest.mark.parametrize("recompute", ("block", "output", "all", "layer", "inside", "checkpoint"))
def test_a_scripted_or_traced_module_is_left_alone(compiled: Callable[..., nn.Module], recompute: str) -> None:
    """`"inside"`: the level by name, of the layers and of the scripted module."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.LayerNorm(WIDTH), compiled(Inner()), nn.Linear(WIDTH, WIDTH)) for _ in range(2)]
    net = nn.Sequential(*layers)
    x = torch.linspace(-1, 1, 2 * WIDTH).view(2, WIDTH).requires_grad_()
    inputs = [x, *net.parameters()]
    levels: Any = {"inside": {"*": "all"}, "checkpoint": {"0": "checkpoint", "1": "checkpoint"}}.get(
        recompute, recompute
    )
    expected = [torch.autograd.grad(net(x).sum(), inputs) for _ in range(3)]
    before = [type(module) for module in net.modules()]
    ckpt_kernels.convert(net, recompute=levels)
    # TorchScript optimizes the code in the second call.
    for derived in expected:
        torch.testing.assert_close(torch.autograd.grad(net(x).sum(), inputs), derived)
    ckpt_kernels.revert(net)
    assert [type(module) for module in net.modules()] == before


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("compiled", (scripted, traced))
def test_a_model_with_a_scripted_or_traced_module_is_measured_and_planned(compiled: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(Inner(), compiled(Inner()), nn.Linear(WIDTH, WIDTH)) for _ in range(2)))
    x = torch.randn(4, WIDTH)
    assert check(copy.deepcopy(model), (x,)).changed == []
    assert ckpt_kernels.convert(copy.deepcopy(model), inputs=x).kept is not None
    ckpt_kernels.plan(model, x, budget=None, progress=lambda line: None).apply()
    model(x).sum().backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("compiled", (scripted, traced))
def test_a_scripted_or_traced_module_counts_in_no_structure(compiled: Callable[..., nn.Module]) -> None:
    def structure(name: str, inner: nn.Module, width: int) -> str:
        model = nn.ModuleDict({"compiled": inner, "plain": nn.ModuleDict({name: nn.Linear(width, 2)})})
        return structure_of(model)

    known = structure("compiled", compiled(Inner()), 3)
    assert known == structure("compiled", compiled(nn.Sequential(Inner())), 3)
    assert known != structure("compiled", compiled(Inner()), 4) and known != structure("other", compiled(Inner()), 3)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_model_that_is_scripted_is_an_error() -> None:
    with pytest.raises(TypeError, match="model is scripted already; expected one that is not"):
        ckpt_kernels.convert(torch.jit.script(Inner()))


def test_forward_mode_differentiation_of_a_checkpointed_layer() -> None:
    net = nn.Sequential(Inner(), Inner()).double()
    x, tangent = torch.linspace(-1, 1, WIDTH, dtype=torch.float64), torch.ones(WIDTH, dtype=torch.float64)

    def derived() -> list[Tensor]:
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x.clone().requires_grad_(), tangent)
            output = torch.autograd.forward_ad.unpack_dual(net(dual))
            return [output.tangent.detach(), *torch.autograd.grad(output.tangent.sum(), list(net.parameters()))]

    expected = derived()
    ckpt_kernels.convert(net, recompute={"0": "checkpoint", "1": "checkpoint"})
    torch.testing.assert_close(derived(), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_trace_has_no_checkpoints() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(2)))
    ckpt_kernels.convert(net, recompute={"*": "checkpoint"})
    x = torch.linspace(-1, 1, 2 * WIDTH).view(2, WIDTH)
    torch.testing.assert_close(torch.jit.trace(net, torch.ones(2, WIDTH))(x), net(x))


def test_a_forward_within_vmap_is_not_repeated_outside() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(2)))
    x = torch.linspace(-1, 1, 2 * WIDTH).view(2, 1, WIDTH)
    expected = torch.autograd.grad(torch.vmap(net)(x).exp().sum(), list(net.parameters()))
    ckpt_kernels.convert(net, recompute={"*": "checkpoint"})
    torch.testing.assert_close(torch.autograd.grad(torch.vmap(net)(x).exp().sum(), list(net.parameters())), expected)

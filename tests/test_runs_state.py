"""The recomputation of a checkpointed layer finds the layer's modules as the first pass did, and leaves them as they
are."""

import collections
import gc
import operator
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckpt_kernels
from ckpt_kernels import runs
from ckpt_kernels.runs.held import held_by
from ckpt_kernels.thin import direct

WIDTH = 8


class Layer(nn.Module):
    """A layer whose result depends on all that a module holds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.parts = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Softplus())
        self.calls, self.factor, self.mode = 0, 0.5, "tanh"

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        hidden = self.norm(self.first(x)).tanh() if self.mode == "tanh" else self.first(x)
        if not hasattr(self, "table"):
            self.table = torch.arange(WIDTH, dtype=x.dtype).cos()
        hidden = self.parts(hidden)
        return self.second(hidden * self.factor * self.table + self.mean).sin() * self.calls


def made(level: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(Layer(), Layer()).double()
    for layer in model:
        layer.handles = (
            layer.second.register_forward_hook(lambda module, args, output: 2 * output),
            layer.second.register_forward_hook(lambda module, args, kwargs, output: output.cos(), with_kwargs=True),
            layer.first.register_forward_pre_hook(
                lambda module, args, kwargs: ((2 * args[0],), kwargs), with_kwargs=True
            ),
        )
    if level != "eager":
        ckpt_kernels.convert(model, recompute={"*": level})
    return model


def replace_parameter(layer: nn.Module) -> None:
    layer.first.weight = nn.Parameter(torch.zeros_like(layer.first.weight))


def replace_child(layer: nn.Module) -> None:
    layer.first = nn.Linear(WIDTH, WIDTH).double()


def remove_child(layer: nn.Module) -> None:
    del layer.second


def rename_child(layer: nn.Module) -> None:
    layer.last = layer.second
    del layer.second


def reorder_children(layer: nn.Module) -> None:
    first = layer.parts._modules.pop("0")
    layer.parts._modules["0"] = first


def replace_buffer(layer: nn.Module) -> None:
    layer.mean = torch.ones_like(layer.mean)


def change_number(layer: nn.Module) -> None:
    layer.factor = 3.0


def change_string(layer: nn.Module) -> None:
    layer.mode = "linear"


def remove_hooks(layer: nn.Module) -> None:
    for handle in layer.handles:
        handle.remove()


def reorder_hooks(layer: nn.Module) -> None:
    layer.second._forward_hooks.move_to_end(layer.handles[0].id)


def add_hook(layer: nn.Module) -> None:
    layer.norm.register_forward_pre_hook(lambda module, args: (3 * args[0],))


def evaluate(layer: nn.Module) -> None:
    layer.eval()


def freeze(layer: nn.Module) -> None:
    layer.first.weight.requires_grad_(False)


def convert_again(layer: nn.Module) -> None:
    if ckpt_kernels.is_converted(layer):
        ckpt_kernels.convert(layer, recompute="block")


def keep(layer: nn.Module) -> None:
    pass


CHANGES = (
    replace_parameter,
    replace_child,
    remove_child,
    rename_child,
    reorder_children,
    replace_buffer,
    change_number,
    change_string,
    remove_hooks,
    reorder_hooks,
    add_hook,
    evaluate,
    freeze,
    convert_again,
    keep,
)


def gradients(model: nn.Module, change: Callable[[nn.Module], None]) -> list[Tensor]:
    """The gradients of two steps. Between the passes of the second the layers are changed."""
    x = torch.linspace(-1, 1, 4 * WIDTH, dtype=torch.float64).sin().view(4, WIDTH).requires_grad_()
    model(x).sum().backward()
    parameters = list(model.parameters())
    y = model(x)
    for layer in model:
        change(layer)
    y.square().sum().backward()
    return [x.grad, *(p.grad for p in parameters)]


@pytest.mark.parametrize("library", ("compiled", "none"))
@pytest.mark.parametrize("change", CHANGES)
def test_changes_between_the_passes_do_not_change_gradients(
    change: Callable[[nn.Module], None], library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if library == "none":
        monkeypatch.setattr(direct, "thin_module", None)
    models = made("eager"), made("checkpoint")
    expected, found = (gradients(model, change) for model in models)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for original, converted in zip(*models, strict=True):
        for name in ("calls", "factor", "mode", "training"):
            assert getattr(converted, name) == getattr(original, name)
        for name in ("_parameters", "_buffers", "_modules", "_forward_hooks"):
            assert getattr(converted, name).keys() == getattr(original, name).keys()
        torch.testing.assert_close(dict(converted.named_buffers()), dict(original.named_buffers()))


def test_parameters_of_a_functional_call() -> None:
    def derived(level: str) -> list[Tensor]:
        model = made(level)
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        parameters = {name: p.detach() * scale for name, p in model.named_parameters()}
        x = torch.ones(4, WIDTH, dtype=torch.float64).cumsum(0)
        y = torch.func.functional_call(model, parameters, (x,))
        return list(torch.autograd.grad(y.square().sum(), [scale, *parameters.values()], allow_unused=True))

    torch.testing.assert_close(derived("checkpoint"), derived("eager"), rtol=1e-10, atol=1e-10)


def test_other_memory_of_a_parameter_is_an_error() -> None:
    model = made("checkpoint")
    y = model(torch.ones(4, WIDTH, dtype=torch.float64).cumsum(0))
    model[0].first.weight.data = torch.zeros_like(model[0].first.weight)
    with pytest.raises(RuntimeError, match=r"a parameter of a checkpointed layer.*other memory"):
        y.sum().backward()


MISSING = object()


class Recorded(nn.Module):
    """A layer that records the value of an attribute in each pass, and keeps the last result."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.seen = nn.Linear(WIDTH, WIDTH), types.SimpleNamespace(values=[])

    def forward(self, x: Tensor) -> Tensor:
        self.seen.values.append(getattr(self, "value", MISSING))
        self.last = self.linear(x).sin()
        return self.last


def set_value(layer: nn.Module, value: Any) -> None:
    if value is not MISSING:
        layer.value = value
    elif hasattr(layer, "value"):
        del layer.value


@pytest.mark.parametrize(
    ("first", "later"),
    [(value, [value]) for value in (None, True, 3, 0.5, 2j, "name", b"name")] + [(MISSING, 1), (1, MISSING)],
)
def test_plain_attributes_are_those_of_the_first_pass(first: Any, later: Any) -> None:
    model = nn.Sequential(Recorded())
    set_value(model[0], first)
    ckpt_kernels.convert(model, recompute={"0": "checkpoint"})
    y = model(torch.ones(2, WIDTH, requires_grad=True))
    set_value(model[0], later)
    last = model[0].last
    y.sum().backward()
    assert model[0].seen.values == [first, first]
    assert getattr(model[0], "value", MISSING) is later and model[0].last is last


class Remembering(nn.Module):
    """Stores a tensor with a graph that the loss does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.unused: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x).sin()
        self.unused = y.exp()
        return y


def test_calls_do_not_hold_the_graphs_of_earlier_calls() -> None:
    model = nn.Sequential(Remembering())
    ckpt_kernels.convert(model, recompute={"0": "checkpoint"})
    graphs = []
    for _ in range(4):
        model(torch.ones(2, WIDTH)).sum().backward()
        graphs.append(weakref.ref(model[0].unused))
    gc.collect()
    assert [graph() is not None for graph in graphs] == [False, False, False, True]
    # A graph that refers to the module itself is a cycle through C++, which Python cannot collect.
    model[0].unused = None


class WithConfig(nn.Module):
    """Holds an object, and a buffer with a graph, which a state does not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.config = nn.Linear(WIDTH, WIDTH), types.SimpleNamespace(scale=2.0)
        self.register_buffer("other", torch.ones(WIDTH))
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x * self.config.scale).sin() * self.other
        self.last = y.exp()
        return y


@pytest.mark.parametrize("change", ["nothing", "number", "buffer"])
def test_values_that_a_state_does_not_hold_are_as_before(change: str) -> None:
    model = nn.Sequential(WithConfig())
    ckpt_kernels.convert(model, recompute={"0": "checkpoint"})
    x = torch.ones(2, WIDTH)
    model(x).sum().backward()
    layer = model[0]
    layer.register_buffer("graph", layer.linear.weight.sum())
    y = model(x)
    last, config, other = layer.last, layer.config, layer.other
    if change == "number":
        layer.number = 3
    elif change == "buffer":
        del layer.graph
    y.sum().backward()
    assert layer.last is last and layer.config is config and layer.other is other
    assert getattr(layer, "number", 3) == 3 and hasattr(layer, "graph") is (change != "buffer")
    layer.last = None


class Weights(Tensor):
    """A tensor of another class."""


def test_the_library_finds_what_python_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> list:
        held = held_by(layer)
        assert held is not None
        states = held.states
        copies = [getattr(states, name) for name in ("_modules", "_attributes", "_containers", "_partial")]
        return [held.parameters, held.buffers, held.generators, *copies]

    layer = made("eager")[0]
    layer.config, layer.values, layer.parts.generator = types.SimpleNamespace(), [1], torch.Generator()
    layer.mean = layer.first.weight.sum(0)
    layer.weights = torch.ones(WIDTH).as_subclass(Weights)
    layer.parts.again = layer.first
    layer.register_parameter("missing", None)
    layer.register_buffer("no_buffer", None)
    layer.register_module("no_child", None)
    # Only an OrderedDict's own methods know the order after this.
    layer.second.register_forward_hook(lambda module, args, output: 3 * output, prepend=True)
    with monkeypatch.context() as patch:
        patch.setattr(runs.held, "copies_of", None)  # so that Python finds nothing
        compiled = found()
    monkeypatch.setattr(direct, "thin_module", None)
    for ours, expected in zip(compiled, found(), strict=True):
        assert len(ours) == len(expected)
        for one, other in zip(ours, expected, strict=True):
            if isinstance(one, dict):
                assert list(one) == list(other) and all(one[name] is other[name] for name in one)
            elif isinstance(one, tuple):
                assert all(map(operator.is_, one, other))
            else:
                assert one is other


class Recording(nn.Module):
    """A layer that writes to containers of all kinds, and reads one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.losses: list[Tensor] = []
        self.maps: dict[str, Any] = {"old": 1, "rows": [0], "nested": {"sizes": collections.deque([1], maxlen=2)}}
        self.seen, self.counts, self.deep = {0}, collections.Counter(), ([[[[0]]]], 1)
        self.losses_again = [self.losses]
        self.losses_again.append(self.losses_again)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x).exp()
        self.losses.append(y.mean())
        self.maps.pop("old", None)
        self.maps["y"] = y.detach()
        self.maps["rows"].append(len(x))
        self.maps["nested"]["sizes"].append(len(self.losses))
        self.seen.add(len(self.losses))
        self.counts["calls"] += 1
        self.deep[0][0][0][0].append(1)
        return y * len(self.maps["rows"][:2])


@pytest.mark.parametrize("level", ("none", "checkpoint"))
def test_containers_are_written_to_once(level: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Recording(), Recording())
    ckpt_kernels.convert(net, recompute={"*": level})
    outputs = [net(torch.randn(3, WIDTH)) for _ in range(2)]
    maps = [layer.maps["y"] for layer in net]
    (sum(output.sum() for output in outputs) + sum(layer.losses[0] for layer in net)).backward()
    for layer, last in zip(net, maps, strict=True):
        assert (
            len(layer.losses) == 2
            and layer.counts == {"calls": 2}
            and layer.deep == ([[[[0, 1, 1]]]], 1)
            and layer.seen == {0, 1, 2}
        )
        assert list(layer.maps) == ["rows", "nested", "y"] and layer.maps["y"] is last
        assert layer.maps["rows"] == [0, 3, 3] and list(layer.maps["nested"]["sizes"]) == [1, 2]


class Nested(nn.Module):
    """A layer whose containers hold containers, and one that holds itself."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.steps: collections.OrderedDict[str, list[list[int]]] = collections.OrderedDict(rows=[[]])
        self.around: list[Any] = []
        self.around.append(self.around)
        self.last = {0}

    def forward(self, x: Tensor) -> Tensor:
        self.steps["rows"][0].append(len(x))
        self.steps["row " + str(len(self.steps))] = []
        self.around.append(None)
        self.last.add(self.last.pop() + 1)
        return self.linear(x).exp()


def test_nested_containers_are_written_to_once() -> None:
    ckpt_kernels.convert(net := nn.Sequential(Nested()), recompute={"0": "checkpoint"})
    net(torch.randn(3, WIDTH)).sum().backward()
    assert net[0].steps == {"rows": [[3]], "row 1": []}
    assert net[0].around[0] is net[0].around and net[0].around[1:] == [None]
    assert net[0].last == {1}


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (2 * x).sin()


def test_a_layer_with_a_scripted_child() -> None:
    def derived(level: str) -> list[Tensor]:
        torch.manual_seed(0)
        scripted = torch.jit.script(Doubled())
        for _ in range(3):  # the first runs of scripted code save other tensors
            scripted(torch.ones(2, WIDTH, requires_grad=True)).sum().backward()
        model = nn.Sequential(nn.Sequential(nn.Linear(WIDTH, WIDTH), scripted, nn.Linear(WIDTH, WIDTH)))
        ckpt_kernels.convert(model, recompute={"0": level})
        return list(torch.autograd.grad(model(torch.ones(2, WIDTH)).sum(), list(model.parameters())))

    torch.testing.assert_close(derived("checkpoint"), derived("none"))

"""The recomputation of checkpointed layers finds the state of the forward pass: random numbers, buffers, autocast."""

import gc
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckpt_kernels
from ckpt_kernels.memory import saved_bytes
from ckpt_kernels.runs import is_repeating
from ckpt_kernels.runs.calls import Saved

from .test_runs import TREES, WIDTH, Tree, flat, inputs, made
from .test_runs_again import NESTED, ONE, FunctionLayer, by_tree, derived


@pytest.mark.parametrize("name", ("nested", "deeply"))
def test_autocast_within_nested_runs(name: str) -> None:
    def run(tree: Tree) -> list[Tensor]:
        net, x = made(tree), inputs()
        with torch.autocast("cpu", torch.bfloat16):
            output = net(x)
        return list(torch.autograd.grad(output.float().square().sum(), [x, *net.parameters()]))

    assert all(map(torch.equal, run(flat(TREES[name])), run(TREES[name])))


def test_statistics_within_nested_runs() -> None:
    def run(tree: Tree) -> list[Tensor]:
        torch.manual_seed(0)
        net = by_tree([nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)) for _ in range(3)], tree)
        return [*derived(net), *net.buffers()]

    assert all(map(torch.equal, run(flat(NESTED)), run(NESTED)))


class Counter(nn.Module):
    """A layer that writes to a buffer and reads the buffer."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("state", torch.ones(size, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.state += 1.0
        return self.linear(x * self.state[0]).sin() * self.state[0]


class NormedCounter(Counter):
    """Reads the buffer in an op with a recipe, whose operands must have no new version."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.state += 1.0
        return self.linear(nn.functional.gelu(self.norm(x)) / self.state[0])


def counted(level: str, size: int, kind: type[Counter] = Counter) -> list[Tensor]:
    torch.manual_seed(0)
    net, x = nn.Sequential(kind(size), kind(size)), inputs()
    ckpt_kernels.convert(net, recompute={"?": level})
    return [*torch.autograd.grad(net(x).square().sum(), [x, *net.parameters()]), *net.buffers()]


@pytest.mark.parametrize("size", (1, 8192))
@pytest.mark.parametrize("kind", (Counter, NormedCounter))
def test_buffers_that_a_layer_writes_to_and_reads(kind: type[Counter], size: int) -> None:
    torch.testing.assert_close(counted("none", size, kind), counted("checkpoint", size, kind))


def test_a_layer_that_only_reads_a_large_buffer_keeps_nothing() -> None:
    net = nn.Sequential(*(Scaled("never", copies=True) for _ in range(2)))
    net[1].table = torch.ones(2**16 + 1)
    ckpt_kernels.convert(net, recompute={"?": "checkpoint"})
    earlier = {id(saved): saved for saved in gc.get_objects() if type(saved) is Saved}
    loss = net(inputs()).sum()
    found = [saved for saved in gc.get_objects() if type(saved) is Saved and id(saved) not in earlier]
    assert found and all(saved.value is None for saved in found)
    loss.backward()


@pytest.mark.parametrize("every", (1, 2))
@pytest.mark.parametrize(
    "kind", ("torch", "python", "numpy", "normal", "own", "own of python", "own of numpy", "old of numpy")
)
def test_random_numbers_of_all_generators(kind: str, every: int) -> None:
    """If `every` is 2, every second layer draws a number, and so does the code behind each layer."""
    numpy = pytest.importorskip("numpy")

    class Noisy(nn.Module):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.number = number
            self.linear, self.generator = nn.Linear(WIDTH, WIDTH), generator_of_kind()
            if every == 2:
                self.register_forward_hook(lambda *given: None if is_repeating() else draw(self.generator) and None)

        def forward(self, x: Tensor) -> Tensor:
            factor = draw(self.generator) if self.number % every == 0 else 1.5
            return self.linear((x * factor).sin())

    def generator_of_kind() -> Any:
        if kind == "own of python":
            return random.Random(3)
        if kind == "own of numpy":
            return numpy.random.default_rng(3)
        return numpy.random.RandomState(3) if kind == "old of numpy" else torch.Generator().manual_seed(3)

    def draw(generator: Any) -> Any:
        if kind in ("torch", "own"):
            return torch.rand((), generator=generator if kind == "own" else None)
        if "of" in kind:
            return generator.gauss(0, 1) if kind == "own of python" else generator.standard_normal()
        if kind == "python":
            return random.random()
        # Of two normal numbers made together numpy holds the second back.
        return float(numpy.random.rand() if kind == "numpy" else numpy.random.standard_normal())

    def run(tree: Tree) -> list[Tensor]:
        torch.manual_seed(0)
        random.seed(0)
        numpy.random.seed(0)
        net = by_tree([Noisy(number) for number in range(3)], tree)
        return [*derived(net), torch.as_tensor(draw(net.layers[0].generator))]

    for tree in (Tree(["none"] * 3), NESTED):
        assert all(map(torch.equal, run(flat(tree)), run(tree)))


def test_a_layer_may_put_the_state_of_a_generator_back() -> None:
    def function(self: FunctionLayer, x: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            factor = torch.rand(())
        return self.linear(x * factor).sin()

    def run(tree: Tree) -> list[Tensor]:
        torch.manual_seed(0)
        net = by_tree([FunctionLayer(function) for _ in range(3)], tree)
        output = net(inputs())
        torch.rand(3)
        return list(torch.autograd.grad(output.square().sum(), list(net.parameters())))

    assert all(map(torch.equal, run(flat(NESTED)), run(NESTED)))


def test_a_generator_of_a_later_layer_is_restored() -> None:
    """The layer before draws nothing, and holds no generator."""

    def drawing(self: FunctionLayer, x: Tensor) -> Tensor:
        return self.linear(x * torch.rand(WIDTH, generator=self.own)).sin()

    def run(tree: Tree) -> list[Tensor]:
        torch.manual_seed(0)
        layers = [FunctionLayer(lambda self, x: self.linear(x).sin()), FunctionLayer(drawing)]
        layers[1].own = torch.Generator().manual_seed(3)
        return [*derived(by_tree(layers, tree)), torch.rand((), generator=layers[1].own)]

    assert all(map(torch.equal, run(flat(ONE)), run(ONE)))


class Conditioned(nn.Module):
    """A layer whose arguments or weights other layers read too, so that they share autocast's copies."""

    def __init__(self, shared: nn.Linear) -> None:
        super().__init__()
        self.norm, self.own, self.gate = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.shared, self.condition_norm = shared, nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        x = x + self.shared(self.condition_norm(condition))
        return x + torch.sigmoid(self.gate(condition)) * self.own(self.norm(x))


class OfConditioned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Conditioned(shared) for _ in range(3))
        self.learned = nn.Parameter(torch.randn(2, 4, WIDTH))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, self.learned if condition is None else condition)
        return x


@pytest.mark.parametrize("is_cast_in_backward", [False, True])
@pytest.mark.parametrize("given", ["parameter", "leaf", "computed"])
def test_layers_under_autocast_that_read_the_same_leaf(given: str, is_cast_in_backward: bool) -> None:
    def run(level: str) -> list[Tensor]:
        torch.manual_seed(0)
        model, x = OfConditioned(), torch.randn(2, 4, WIDTH)
        leaf = torch.randn(2, 4, WIDTH, requires_grad=True)
        condition = {"parameter": None, "leaf": leaf, "computed": leaf * 2}[given]
        ckpt_kernels.convert(model, recompute={"layers": level})
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x, condition).float().square().mean()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_cast_in_backward):
            return list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))

    for found, expected in zip(run("checkpoint"), run("none"), strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-3)


class Between(nn.Module):
    """A linear layer that the model calls between checkpointed layers, which keep nothing of autocast's copies."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4))
        self.shared = nn.Linear(WIDTH, 64 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) + self.shared(x)[:, :WIDTH]
        return x


def test_autocast_shares_copies_outside_of_checkpointed_layers() -> None:
    def kept(level: str) -> int:
        torch.manual_seed(0)
        ckpt_kernels.convert(model := Between(), recompute={"layers": level})
        with torch.autocast("cpu", torch.bfloat16):
            return saved_bytes(model, torch.randn(2, WIDTH))

    assert kept("checkpoint") <= kept("none")


def test_the_dtype_of_autocast_is_restored() -> None:
    def run(tree: Tree) -> list[Tensor]:
        net, x = made(tree), inputs()
        with torch.autocast("cpu", torch.float16):
            output = net(x)
        return list(torch.autograd.grad(output.float().square().sum(), [x, *net.parameters()]))

    assert all(map(torch.equal, run(flat(NESTED)), run(NESTED)))


def test_the_recomputation_uses_the_backend_of_the_forward() -> None:
    def run(tree: Tree) -> list[Tensor]:
        torch.manual_seed(0)
        layers = (nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2))
        net, x = by_tree(list(layers), tree), inputs()
        with ckpt_kernels.use_backend("reference"):
            output = net.layers[1](net.layers[0](x))
        return list(torch.autograd.grad(output.square().sum(), [x, *net.parameters()]))

    for tree in (Tree(["output"] * 2), Tree([["output"] * 2])):
        assert all(map(torch.equal, run(flat(tree)), run(tree)))


class Scaled(nn.Module):
    """Saves a buffer for the backward pass, and writes to the buffer before or after."""

    def __init__(self, write: str, copies: bool) -> None:
        super().__init__()
        self.linear, self.write, self.copies = nn.Linear(WIDTH, WIDTH), write, copies
        self.register_buffer("scale", torch.full((WIDTH,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        if self.write == "before":
            self.scale.mul_(1.5)
        y = self.linear(x) * (self.scale.clone() if self.copies else self.scale)
        if self.write == "after":
            self.scale.mul_(1.5)
        return y


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("write", ["before", "after"])
def test_a_saved_buffer_has_the_value_of_its_call(write: str, steps: int) -> None:
    """Eager torch raises an error where a call writes to the buffer that it, or an earlier call, has saved."""

    def gradients(copies: bool, level: str) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(Scaled(write, copies))
        ckpt_kernels.convert(model, recompute={"0": level})
        loss = sum(model(x).square().sum() for x in torch.randn(steps, 3, WIDTH))
        return list(torch.autograd.grad(loss, list(model.parameters()))) + list(model.buffers())

    for found, expected in zip(gradients(False, "checkpoint"), gradients(True, "none"), strict=True):
        torch.testing.assert_close(found, expected)


class _Writing(torch.autograd.Function):
    """A product with a buffer, saved twice, which the backward pass writes to."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale, scale[1:])
        return x * scale

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        scale, tail = ctx.saved_tensors
        grad_input = grad_outputs[0] * scale
        scale.mul_(0.5)
        return grad_input + tail.sum(), None


class LearnsInBackward(nn.Module):
    """A layer with a buffer that both passes write to, as an estimate of gradients does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("scale", torch.full((WIDTH,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        self.scale.add_(1.0)
        return _Writing.apply(self.linear(x), self.scale)


class SavesThenWritesData(LearnsInBackward):
    """Writes without a new version, so that autograd reads the later value."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x) * self.scale + self.linear(x) * self.scale.data
        self.scale.data.mul_(3.0)
        return y


class WritesThenSavesData(LearnsInBackward):
    """Saves an alias that has a version of its own, below that of the buffer."""

    def forward(self, x: Tensor) -> Tensor:
        self.scale.add_(1.0)
        y = self.linear(x) * self.scale.data
        self.scale.data.mul_(3.0)
        return y


@pytest.mark.parametrize("kind", [LearnsInBackward, SavesThenWritesData, WritesThenSavesData])
def test_the_backward_pass_reads_and_writes_a_saved_buffer_as_autograd_does(kind: type[LearnsInBackward]) -> None:
    def result(level: str) -> list[Tensor]:
        torch.manual_seed(0)
        layer = kind()
        ckpt_kernels.convert(model := nn.Sequential(layer), recompute={"0": level})
        found = []
        for x in torch.randn(2, 3, WIDTH):
            found += torch.autograd.grad(model(x).square().sum(), list(layer.parameters()))
            found.append(layer.scale.clone())
        return [*found, torch.tensor(layer.scale._version)]

    for found, expected in zip(result("checkpoint"), result("none"), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("op", [torch.relu, torch.sigmoid, torch.exp, torch.square], ids=lambda op: op.__name__)
def test_a_layer_that_writes_over_what_it_saved_is_an_error(op: Any) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            y = op(h)
            h.add_(1.0)
            y.add_(1.0)
            return self.last(y)

    for level in ("none", "checkpoint"):
        model = nn.Sequential(Layer())
        ckpt_kernels.convert(model, recompute={"0": level})
        loss = model(torch.randn(3, WIDTH)).sum()
        with pytest.raises(RuntimeError, match=r"modified by an in-?place operation"):
            loss.backward()

"""Runs, checkpoints over several calls of layers: equal gradients, saved tensors, randomness, and code in between."""

import gc
import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckpt_kernels
from ckpt_kernels.memory import saved_bytes
from ckpt_kernels.runs import Place, Run, is_repeating

WIDTH, ROWS = 16, 24
pytestmark = pytest.mark.usefixtures("one_thread")


class Layer(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.drop = nn.Dropout(dropout)
        self.calls = 0

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        h = self.drop(nn.functional.gelu(self.up(self.norm(x))))
        return x + self.down(h if scale is None else h * scale)


class Net(nn.Module):
    """Layers in a loop, with a function that is called between them."""

    def __init__(self, count: int = 6, dropout: float = 0.0, between: Callable[[int, Tensor], Tensor] | None = None):
        super().__init__()
        self.layers = nn.ModuleList(Layer(dropout) for _ in range(count))
        self.between = between

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = layer(x, scale)
            if self.between is not None:
                x = self.between(index, x)
        return x


class Tree:
    """A plan of levels by layer, with runs as nested lists."""

    def __init__(self, *parts: Any) -> None:
        self.found: list[tuple[str, list[tuple[int, int]]]] = []
        self.last: dict[int, int] = {}
        for part in parts:
            self._walk(part, [])

    def _walk(self, part: Any, runs: list[tuple[int, int]]) -> None:
        if isinstance(part, str):
            self.found.append((part, runs))
            return
        key = len(self.last)
        self.last[key] = -1
        runs = [*runs, (key, len(self.found))]
        for inside in part:
            self._walk(inside, runs)
        self.last[key] = len(self.found) - 1

    def levels_in(self, model: nn.Module) -> Mapping[str, tuple[str, tuple[Place, ...]]]:
        return {
            f"layers.{i}": (level, tuple(Place(key, i - first, i == self.last[key]) for key, first in runs))
            for i, (level, runs) in enumerate(self.found)
        }


TREES = {
    "one": Tree(["output"] * 6),
    "two": Tree(["none"] * 3, ["all"] * 3),
    "mixed": Tree("block", ["layer", "output"], "all", ["none"], "output"),
    "nested": Tree([["output", "none"], ["all", "block"], "none"], "none"),
    "deeply": Tree([["output", ["block", "none"], "all"], "layer", ["none"]]),
}


def inputs() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(ROWS, WIDTH, requires_grad=True)


def results(net: Any, x: Tensor, *rest: Any, of: nn.Module | None = None) -> list[Tensor]:
    module = net if of is None else of
    torch.manual_seed(2)
    output = net(x, *rest)
    (output * torch.linspace(-1, 1, WIDTH)).sum().backward()
    found = [output.detach(), *(p.grad for p in (x, *module.parameters()) if p.grad is not None)]
    x.grad = None
    module.zero_grad()
    return found


def made(tree: Any, **options: Any) -> Net:
    torch.manual_seed(0)
    net = Net(**options)
    if tree is not None:
        ckpt_kernels.convert(net, recompute=tree)
    return net


def flat(tree: Tree) -> Tree:
    """The same levels without runs."""
    return Tree(*(level for level, _ in tree.found))


@pytest.mark.parametrize("dropout", (0.0, 0.2))
@pytest.mark.parametrize("name", TREES)
def test_gradients_equal_those_without_runs(name: str, dropout: float) -> None:
    tree = TREES[name]
    x = inputs()
    for _ in range(2):
        expected = results(made(flat(tree), dropout=dropout), x)
        found = results(made(tree, dropout=dropout), x)
        assert len(expected) == len(found) == 2 + 6 * 6
        assert all(map(torch.equal, expected, found))


def test_gradients_equal_the_unconverted_models() -> None:
    for tree in TREES.values():
        torch.testing.assert_close(results(made(tree), inputs()), results(made(None), inputs()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "kept"), (("one", 1), ("two", 2)))
def test_a_run_keeps_the_input_of_its_first_layer(name: str, kept: int) -> None:
    x = inputs()
    # The first run's input is the model's input, a leaf that no hook saves.
    assert saved_bytes(made(TREES[name]), x) == (kept - 1) * x.nbytes
    net = made(TREES[name])
    before = whole_tensors()
    graph = net(x)
    # The result, and the second run's input.
    assert len(whole_tensors() - before) == kept
    del graph


def whole_tensors() -> set[int]:
    """The addresses of the living tensors that have the size of an input."""
    gc.collect()
    whole = [t for t in gc.get_objects() if type(t) is Tensor and t.shape == (ROWS, WIDTH)]
    return {tensor.untyped_storage().data_ptr() for tensor in whole}


def test_a_runs_input_may_be_kept_as_a_recipe() -> None:
    """The run's input is the output of a block."""

    class Front(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.net = nn.LayerNorm(WIDTH), Net(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(self.norm(x))

    front = Front()
    levels = {f"net.{name}": found for name, found in Tree(["none"] * 2).levels_in(front).items()}
    ckpt_kernels.convert(front, recompute=type("P", (), {"levels_in": lambda self, model: levels})())
    x = inputs()
    expected = saved_bytes(lambda: front.norm(x), parameters_of=front)
    assert saved_bytes(lambda: front(x), parameters_of=front) == expected


def between_in_place(index: int, x: Tensor) -> Tensor:
    return x.add_(1.0) if index == 2 else x


def between_another(index: int, x: Tensor) -> Tensor:
    return x * 0.5 if index in (1, 3) else x


def between_early(index: int, x: Tensor) -> Tensor:
    return x.detach().requires_grad_() if index == 3 else x


@pytest.mark.parametrize("between", (between_in_place, between_another, between_early))
@pytest.mark.parametrize("name", ("one", "nested"))
def test_code_between_layers(name: str, between: Callable[[int, Tensor], Tensor]) -> None:
    expected = results(made(flat(TREES[name]), between=between), inputs())
    found = results(made(TREES[name], between=between), inputs())
    assert all(map(torch.equal, expected, found))


def test_a_second_pass_over_the_layers_starts_another_run() -> None:
    net, x = made(TREES["one"]), inputs()
    before = whole_tensors()
    y = x
    for index in (0, 1, 0, 1):
        y = net.layers[index](y)
    # The result, and the second run's input.
    assert len(whole_tensors() - before) == 2


def test_another_backward_pass_between_layers_leaves_a_run_open() -> None:
    def between(index: int, x: Tensor) -> Tensor:
        if index == 2:
            other.backward()
        return x

    net, x = made(TREES["one"], between=between), inputs()
    other = made(TREES["two"])(inputs()).sum()
    before = whole_tensors()
    graph = net(x)
    assert len(whole_tensors() - before) == 1
    del graph


def test_a_step_after_an_error_within_a_run() -> None:
    def fail(index: int, x: Tensor) -> Tensor:
        if failing and index == 2:
            raise KeyError("mine")
        return x

    failing = True
    net, x = made(TREES["one"], between=fail), inputs()
    with pytest.raises(KeyError, match="mine"):
        net(x)
    failing = False
    assert all(map(torch.equal, results(net, x), results(made(flat(TREES["one"])), x)))


def test_random_numbers_and_statistics_advance_once() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm, self.drop = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.3)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.drop(self.norm(self.linear(x)))

    torch.manual_seed(0)
    nets = [nn.Sequential(*(Normed() for _ in range(3))) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    for net, level in zip(nets, ("output", "checkpoint"), strict=True):
        ckpt_kernels.convert(net, recompute=dict.fromkeys("012", level))
    states = []
    for net in nets:
        results(net, inputs())
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    for name, buffer in nets[0].named_buffers():
        assert torch.equal(buffer, dict(nets[1].named_buffers())[name]), name


def test_second_derivatives_and_retained_graphs() -> None:
    def second(net: Net, x: Tensor) -> list[Tensor]:
        (first,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        return [first, *torch.autograd.grad(first.square().sum(), [x, *net.parameters()], allow_unused=True)]

    def twice(net: Net, x: Tensor) -> list[Tensor]:
        output = net(x).square().sum()
        return [torch.autograd.grad(output, x, retain_graph=index == 0)[0] for index in range(2)]

    for run in (second, twice):
        for expected, found in zip(
            run(made(flat(TREES["two"])), inputs()), run(made(TREES["two"]), inputs()), strict=True
        ):
            assert (expected is None and found is None) or torch.equal(expected, found)


def test_recomputation_restores_state() -> None:
    """The generators of a layer and of Python, and a buffer that the output depends on."""

    class Moving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)
            self.generator = torch.Generator().manual_seed(3)
            self.register_buffer("seen", torch.ones(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            keep = torch.rand(x.shape, generator=self.generator) > 0.3
            self.seen.mul_(0.9).add_(x.detach().square().mean(0))
            return self.linear(x * keep) * random.uniform(0.5, 1.5) / self.seen.sqrt()

    found = []
    for level in ("none", "checkpoint"):
        torch.manual_seed(0)
        random.seed(0)
        net = nn.Sequential(Moving(), Moving())
        ckpt_kernels.convert(net, recompute=dict.fromkeys("01", level))
        found.append([*results(net, inputs()), *net.buffers(), torch.tensor(random.random())])
    assert all(map(torch.equal, *found))


def test_the_outer_of_nested_checkpoints_applies() -> None:
    net, x = made(None), inputs()
    expected = results(net, x)
    ckpt_kernels.convert(net, recompute={"": "checkpoint", "layers.*": "checkpoint"})
    torch.testing.assert_close(results(net, x), expected, rtol=1e-4, atol=1e-5)
    assert saved_bytes(net, x) == 0


def test_a_nested_run_within_torchs_checkpoint_and_under_torch_func() -> None:
    net, x = made(TREES["nested"]), inputs()
    expected = results(made(flat(TREES["nested"])), x)
    found = results(lambda given: torch.utils.checkpoint.checkpoint(net, given, use_reentrant=False), x, of=net)
    assert all(map(torch.equal, expected, found))
    parameters = dict(net.named_parameters())

    def loss(given: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(net, given, (x.detach(),)).sum()

    assert torch.func.grad(loss)(parameters).keys() == parameters.keys()


def test_recomputation_restores_autocast() -> None:
    def run(tree: Tree) -> list[Tensor]:
        net, x = made(tree), inputs()
        with torch.autocast("cpu", torch.bfloat16):
            output = net(x)
        return list(torch.autograd.grad(output.float().square().sum(), [x, *net.parameters()]))

    assert all(map(torch.equal, run(flat(TREES["one"])), run(TREES["one"])))


def test_an_argument_that_is_written_to_between_layers() -> None:
    class Noted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, note: Tensor) -> Tensor:
            return torch.tanh(self.linear(x) + note)

    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.layers = nn.Linear(WIDTH, WIDTH), nn.ModuleList(Noted() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            note = self.first(x)
            x = self.layers[0](x, note)
            note.mul_(2.0)
            return self.layers[1](x, note)

    torch.manual_seed(0)
    net, x = Writing(), inputs()
    expected = results(net, x)
    ckpt_kernels.convert(net, recompute=Tree(["none"] * 2))
    # The first layer's argument has been overwritten before the recomputation.
    with pytest.raises(RuntimeError, match="modified by an in-place"):
        results(net, x)
    ckpt_kernels.convert(net, recompute=Tree("none", ["none"]))
    net.zero_grad()
    torch.testing.assert_close(results(net, x), expected)


def test_an_argument_that_is_written_to_afterwards_is_an_error() -> None:
    net, x, scale = made(TREES["two"]), inputs(), torch.ones(4 * WIDTH)
    output = net(x, scale)
    scale.mul_(2.0)
    with pytest.raises(RuntimeError, match=r"argument of a checkpointed layer.*modified"):
        output.sum().backward()


def test_a_layer_with_another_shape_when_recomputed_is_an_error() -> None:
    class Fickle(Layer):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x if not is_repeating() else x[:2])

    net = nn.Sequential(Fickle())
    ckpt_kernels.convert(net, recompute={"0": "checkpoint"})
    with pytest.raises(RuntimeError, match=r"expected torch\.float32"):
        net(inputs()).sum().backward()


@pytest.mark.parametrize("name", TREES)
def test_nothing_of_a_run_outlives_its_backward_pass(name: str) -> None:
    net, x = made(TREES[name]), inputs()
    before = whole_tensors()
    gc.disable()
    try:
        loss = net(x).sum()
        loss.backward()
        assert not any(isinstance(o, Run) for o in gc.get_objects() if type(o) is Run)
        big = [o for o in gc.get_objects() if type(o) is Tensor and o.shape in ((ROWS, WIDTH), (ROWS, 4 * WIDTH))]
        # The input's gradient, and the result, which the last autograd node may keep.
        assert len({t.untyped_storage().data_ptr() for t in big} - before) <= 2
        del loss
    finally:
        gc.enable()


def test_layers_with_mutable_arguments_are_in_no_run() -> None:
    """A recomputation would fill a cache twice."""

    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

        def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
            cache: list[Tensor] = []
            for layer in self.layers:
                x = Caching.of(layer, x, cache)
            return x, cache

    class Caching(nn.Linear):
        @staticmethod
        def of(layer: nn.Module, x: Tensor, cache: list[Tensor]) -> Tensor:
            return layer(x, cache)

        def forward(self, x: Tensor, cache: list[Tensor]) -> Tensor:  # type: ignore[override]
            cache.append(x)
            return super().forward(x)

    net = Cached()
    net.layers = nn.ModuleList(Caching(WIDTH, WIDTH) for _ in range(2))
    ckpt_kernels.convert(net, recompute={"layers.*": "checkpoint"})
    output, cache = net(inputs())
    output.sum().backward()
    assert len(cache) == 2

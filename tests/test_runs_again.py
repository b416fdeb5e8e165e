"""The recomputation of checkpointed layers: which layers run again, and errors if the recomputation differs."""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import ckpt_kernels
from ckpt_kernels import recompute
from ckpt_kernels.bitwise_check import record_differences
from ckpt_kernels.convert.module_levels import Levels
from ckpt_kernels.memory import saved_bytes
from ckpt_kernels.runs import Run, is_repeating
from ckpt_kernels.runs.arguments import Link
from ckpt_kernels.runs.held import held_by
from ckpt_kernels.thin import direct

from .test_runs import ROWS, TREES, WIDTH, Net, Tree, flat, inputs, made

ONE, NESTED = Tree(["none"] * 2), Tree([["none"] * 2, "none"])


def by_tree(layers: list[nn.Module], tree: Tree) -> Net:
    net = Net(0)
    net.layers = nn.ModuleList(layers)
    ckpt_kernels.convert(net, recompute=tree)
    return net


def derived(net: nn.Module, *rest: Any) -> list[Tensor]:
    """The gradients of all layers in sequence."""
    x = y = inputs()
    for layer in net.layers:
        y = layer(y, *rest)
    return list(torch.autograd.grad(y.square().sum() + (y * x).sum(), [x, *net.parameters()]))


class FunctionLayer(nn.Module):
    """A layer that calls a function with the layer and the input."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function, self.linear = function, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Any, scale: None = None) -> Tensor:
        return self.function(self, x)


@pytest.mark.parametrize(
    ("function", "message"),
    (
        (lambda self, x: (x.double() if is_repeating() else x).exp().to(x.dtype), r"expected torch\.float32"),
        (lambda self, x: x.sin().sin() if is_repeating() else x.sin(), "saves more tensors"),
        (lambda self, x: x.sin() if is_repeating() else x.sin().sin(), "saves 1 tensors; expected 2"),
        (lambda self, x: x[:2].sin() if is_repeating() else x.sin(), r"saves torch\.float32 \(2, 16\); expected"),
    ),
)
def test_a_recomputation_that_saves_other_tensors_is_an_error(function: Any, message: str) -> None:
    net = by_tree([FunctionLayer(function) for _ in range(2)], ONE)
    with pytest.raises(RuntimeError, match=message):
        net(inputs()).sum().backward()


def test_the_recomputation_stops_at_the_last_saved_tensor() -> None:
    calls = []

    def function(self: FunctionLayer, x: Tensor) -> Tensor:
        y = x.sin()
        calls.append(is_repeating())
        return y

    by_tree([FunctionLayer(function), FunctionLayer(function)], ONE)(inputs()).sum().backward()
    assert calls == [False, False, True]


def test_a_recomputation_frees_each_output_after_the_last_call_that_takes_it() -> None:
    outputs: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def function(self: FunctionLayer, x: Tensor) -> Tensor:
        if is_repeating():
            alive.append(sum(output() is not None for output in outputs))
        y = self.linear(x).sin()
        outputs.append(weakref.ref(y))
        return y

    by_tree([FunctionLayer(function) for _ in range(5)], Tree([["none"] * 4, "none"]))(inputs()).sum().backward()
    # The five layers of the run, then the four of the inner run.
    assert alive == [0, 1, 1, 1, 1, 0, 1, 1, 1]


def test_arguments_that_are_one_tensor_are_one_when_an_inner_run_is_repeated() -> None:
    same: list[bool] = []

    def function(self: FunctionLayer, pair: tuple[Tensor, Tensor]) -> Tensor:
        same.append(pair[0] is pair[1])
        return self.linear(pair[0].sin() * pair[1])

    net, y = by_tree([FunctionLayer(function) for _ in range(4)], Tree([["none"] * 3, "none"])), inputs()
    for layer in net.layers:
        y = layer((y, y))
    y.sum().backward()
    # All layers twice, and those of the inner run a third time.
    assert same == [True] * (4 + 4 + 3)


def saves_nothing(self: FunctionLayer, x: Tensor) -> Tensor:
    again.append(self)
    return x + 1.0


def saves_input(self: FunctionLayer, x: Tensor) -> Tensor:
    again.append(self)
    return x.sin()


again: list[FunctionLayer] = []
TWO = Tree(["none"] * 2, ["none"] * 2)


@pytest.mark.parametrize(
    ("tree", "order", "first"),
    [
        (Tree(["none"] * 3), [(0, None), (1, 0), (2, 0)], 2),  # a layer that takes an earlier output
        (TWO, [(0, None), (3, 0)], 3),  # a layer in the middle of another run
        (Tree(["none"] * 2, "none"), [(0, None), (1, None)], 1),  # a layer that takes none
    ],
)
def test_a_call_that_does_not_follow_begins_a_run(tree: Tree, order: list, first: int) -> None:
    net = by_tree([FunctionLayer(saves_input) for _ in tree.found], tree)
    outputs: dict[int | None, Tensor] = {None: inputs()}
    for layer, argument in order:
        outputs[layer] = net.layers[layer](outputs[argument])
    again.clear()
    outputs[first].sum().backward()
    assert again[0] is net.layers[first]


def test_an_inner_run_at_the_end_of_a_run_begins_once() -> None:
    net = by_tree([FunctionLayer(saves_input) for _ in range(2)], Tree([["none"] * 2]))
    output = net(inputs())
    again.clear()
    output.sum().backward()
    assert again == [*net.layers]


def test_every_result_of_a_layer_is_linked() -> None:
    def function(self: FunctionLayer, x: Any) -> Any:
        one, other = x if isinstance(x, tuple) else (x, x)
        return one.sin(), other.cos()

    assert saved_bytes(by_tree([FunctionLayer(function) for _ in range(2)], ONE), inputs()) == 0


def test_a_call_that_takes_an_output_without_a_gradient_begins_a_run() -> None:
    first = FunctionLayer(lambda self, x: (saves_input(self, x), x.detach().cos()))
    net = by_tree([first, FunctionLayer(lambda self, x: self.linear(saves_input(self, x)))], ONE)
    pair = net.layers[0](inputs())
    output = net.layers[1](pair[1])
    again.clear()
    output.sum().backward()
    assert again == [net.layers[1]]


def test_a_last_layer_that_saves_nothing_does_not_run_again() -> None:
    net = by_tree([FunctionLayer(saves_input), FunctionLayer(saves_nothing)], ONE)
    output = net(inputs())
    again.clear()
    output.sum().backward()
    assert again == [net.layers[0]]


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, pair: tuple[Tensor, Tensor], *, named: dict[str, Tensor]) -> Tensor:
        return self.linear(x * pair[0] + pair[1]).sin() * named["c"] + named["x"].cos()


class Paired(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Pairs() for _ in range(3))

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        scale, shift = shift * 2.0, shift * 3.0
        for layer in self.layers:
            x = layer(x, (scale, shift), named={"c": scale, "x": x})
        return x


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("tree", (Tree(["none"] * 3), NESTED, Tree(["none", ["none"] * 2])))
def test_tuple_and_keyword_arguments(tree: Tree, requires_grad: bool) -> None:
    def run(tree: Tree) -> list[Tensor]:
        torch.manual_seed(0)
        net, x, shift = Paired(), inputs(), torch.randn(ROWS, WIDTH, requires_grad=requires_grad)
        ckpt_kernels.convert(net, recompute=tree)
        variables = [x, *([shift] if requires_grad else []), *net.parameters()]
        return list(torch.autograd.grad(net(x, shift).square().sum(), variables))

    assert all(map(torch.equal, run(flat(tree)), run(tree)))


def test_an_output_without_a_gradient_as_an_argument_of_an_inner_run() -> None:
    def function(self: FunctionLayer, pair: Any) -> Any:
        return self.linear(pair[0] * pair[1]).sin(), (pair[0].detach() > 0).float()

    def run(tree: Tree) -> list[Tensor]:
        torch.manual_seed(0)
        net, x = by_tree([FunctionLayer(function) for _ in range(3)], tree), inputs()
        output, _ = net((x, torch.ones(WIDTH)))
        return list(torch.autograd.grad(output.square().sum(), [x, *net.parameters()]))

    tree = Tree(["none", ["none"] * 2])
    assert all(map(torch.equal, run(flat(tree)), run(tree)))


@pytest.mark.parametrize("written", ["in a tuple", "in a dict"])
def test_a_write_to_a_tensor_in_a_container_is_an_error(written: str) -> None:
    net = nn.Sequential(Pairs())
    ckpt_kernels.convert(net, recompute={"0": "checkpoint"})
    shift, factor = torch.ones(WIDTH), torch.ones(WIDTH)
    output = net[0](inputs(), (shift, shift), named={"c": factor, "x": shift})
    (shift if written == "in a tuple" else factor).mul_(2.0)
    with pytest.raises(RuntimeError, match="argument of a checkpointed layer"):
        output.sum().backward()


class Exchanging(nn.Module):
    """Layers whose arguments are the last two results."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            FunctionLayer(lambda self, pair: self.linear(pair[0].sin() * pair[1])) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        before = x
        for layer in self.layers:
            x, before = layer((x, before)), x
        return x


def test_an_inner_run_in_the_middle_of_a_run() -> None:
    def run(tree: Tree) -> list[Tensor]:
        torch.manual_seed(0)
        net, x = Exchanging(), inputs()
        ckpt_kernels.convert(net, recompute=tree)
        return list(torch.autograd.grad(net(x).square().sum(), [x, *net.parameters()]))

    tree = Tree(["none", ["none"] * 2, "none"])
    assert all(map(torch.equal, run(flat(tree)), run(tree)))


def test_an_error_in_a_layer_closes_the_run() -> None:
    def function(self: FunctionLayer, x: Tensor) -> Tensor:
        if failing:
            raise KeyError("mine")
        return self.linear(x).sin()

    failing = True
    net, x = by_tree([FunctionLayer(function) for _ in range(2)], ONE), inputs()
    with pytest.raises(KeyError, match="mine"):
        net(x)
    failing = False
    assert saved_bytes(net, x) == 0


def test_a_tensor_with_the_identity_of_a_freed_output_is_no_link() -> None:
    run, tensor, output = Run(0), torch.ones(1), torch.ones(1)
    run._links[id(tensor)] = weakref.ref(output), 0, Link(0, 0)
    assert run._link(tensor) is None
    run._links[id(output)] = run._links.pop(id(tensor))
    assert run._link(output) == Link(0, 0)


def test_what_a_layer_holds_is_found_once() -> None:
    shared = nn.BatchNorm1d(WIDTH)
    layer = nn.Sequential(shared, nn.Sequential(shared))
    layer[1].add_module("around", layer)
    held = held_by(layer)
    assert held is not None and len(held.parameters) == 2 and len(held.buffers) == 3


LAZY: tuple[Callable[[], nn.Module], ...] = (
    lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LazyBatchNorm1d(affine=False)),
    lambda: nn.Sequential(nn.LazyLinear(WIDTH), nn.Tanh()),
)


@pytest.mark.parametrize("layer", LAZY, ids=["buffer", "parameter"])
@pytest.mark.parametrize("library", [True, False])
def test_a_layer_with_a_lazy_tensor_runs(
    library: bool, layer: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not library:
        monkeypatch.setattr(direct, "thin_module", None)
    net = by_tree([layer() for _ in range(2)], ONE)
    assert held_by(net.layers[0]) is None
    for _ in range(2):
        assert len(derived(net)) == 5


def test_layers_that_differ_when_recomputed_are_recorded() -> None:
    layers = [FunctionLayer(lambda self, x: (x * (1.0 + is_repeating())).sin()), FunctionLayer(lambda self, x: x.sin())]
    net = by_tree(layers, Tree(["none"], ["none"]))
    with record_differences() as differing:
        net(inputs()).sum().backward()
    assert differing == {net.layers[0]}


def test_gradients_within_the_forward_of_a_layer() -> None:
    """A gradient in the forward recomputes the layer before the forward has ended, from the initial state."""

    def function(self: FunctionLayer, x: Tensor) -> Tensor:
        z = x.detach().requires_grad_()
        self.count += 1
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad((nn.functional.dropout(z, 0.3) * self.count).sin().sum(), z)
        return self.linear(x * gradient).sin()

    def run(level: str) -> list[Tensor]:
        torch.manual_seed(0)
        net, x = nn.Sequential(FunctionLayer(function)), inputs()
        net[0].register_buffer("count", torch.ones(1))
        ckpt_kernels.convert(net, recompute={"0": level})
        found = torch.autograd.grad(net(x).square().sum(), [x, *net.parameters()])
        return [*found, *net.buffers(), torch.get_rng_state()]

    assert all(map(torch.equal, run("none"), run("checkpoint")))


@pytest.mark.parametrize("tree", [TREES["one"], Tree([["none"] * 6])], ids=["one", "within"])
def test_a_write_to_a_weight_before_the_backward_pass_is_an_error(tree: Tree) -> None:
    net = made(tree)
    output = net(inputs())
    with torch.no_grad():
        net.layers[2].up.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="parameter of a checkpointed layer"):
        output.sum().backward()


class Two(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return x * 2.0, x * 3.0

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0] * 2.0 + grad_outputs[1] * 3.0


def test_two_results_of_one_node_as_arguments_of_a_layer() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(8, 16, requires_grad=True), torch.randn(16, 16, requires_grad=True)

    def function(a: Tensor, b: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.silu(a + b), w) + (a.sin() + b.sin())

    def run(called: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(called(*Two.apply(x)).square().sum(), [x, w])

    assert all(map(torch.equal, run(function), run(recompute.layer(function))))


class Pair(NamedTuple):
    one: Tensor
    other: Tensor


def test_layers_with_named_tuples_are_in_no_run() -> None:
    """The recomputation would get a plain tuple."""
    net, x = nn.Sequential(FunctionLayer(lambda self, pair: self.linear(pair.one.sin() * pair.other))), inputs()
    ckpt_kernels.convert(net, recompute={"0": "checkpoint"})
    net(Pair(x, x)).sum().backward()
    assert x.grad is not None


def test_the_level_within_a_checkpoint_is_output() -> None:
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    assert Levels(net, {"0": "checkpoint"}).of(net[0]) == "output"


@pytest.mark.parametrize("tree", (ONE, NESTED, Tree([[["none"] * 2], "output"])), ids=("one", "nested", "deeply"))
def test_a_layer_that_asks_for_gradients_in_its_forward_pass(tree: Tree) -> None:
    def forward(self: FunctionLayer, x: Tensor) -> Tensor:
        z = x.detach().requires_grad_()
        (inner,) = torch.autograd.grad(self.linear(z).sigmoid().square().sum(), z, create_graph=True)
        return (x + inner).sin()

    torch.manual_seed(0)
    layers = [FunctionLayer(forward) for _ in tree.found]
    net = Net(0)
    net.layers = nn.ModuleList(layers)
    expected = derived(net)
    for mine, theirs in zip(derived(by_tree(layers, tree)), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


class Auxiliary(nn.Module):
    """A layer whose forward adds gradients of its own loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scale = torch.ones(WIDTH, requires_grad=True)

    def forward(self, x: Tensor) -> Tensor:
        (self.first(x.detach()) * self.scale).exp().sum().backward()
        (self.last.bias - 1.0).sum().backward()  # reads no saved tensor
        (self.scale + 1.0).sum().backward()
        return self.last(self.first(x).tanh())


@pytest.mark.parametrize("steps", [1, 2])
def test_gradients_of_a_loss_within_a_layer_are_added_once(steps: int) -> None:
    def gradients(level: str) -> list[Tensor | None]:
        torch.manual_seed(0)
        net = nn.Sequential(Auxiliary(), Auxiliary())
        ckpt_kernels.convert(net, recompute={"?": level})
        for x in torch.randn(steps, 3, WIDTH):
            net(x).sin().sum().backward()
        return [*(parameter.grad for parameter in net.parameters()), *(layer.scale.grad for layer in net)]

    for ours, expected in zip(gradients("checkpoint"), gradients("none"), strict=True):
        torch.testing.assert_close(ours, expected)


class ByGradient(nn.Module):
    """A layer that reads the gradient of its weight, which a step before has left."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        scale = 1.0 if self.linear.weight.grad is None else self.linear.weight.grad.norm()
        return (self.linear(x) / scale).sin()


def test_a_layer_that_reads_the_gradient_of_an_earlier_step() -> None:
    def gradients(level: str) -> list[Tensor | None]:
        torch.manual_seed(0)
        net = nn.Sequential(ByGradient(), ByGradient())
        ckpt_kernels.convert(net, recompute={"?": level})
        for x in torch.randn(2, 3, WIDTH):
            net(x).sum().backward()
        return [parameter.grad for parameter in net.parameters()]

    for ours, expected in zip(gradients("checkpoint"), gradients("none"), strict=True):
        torch.testing.assert_close(ours, expected)

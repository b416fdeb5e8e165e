"""Models to plan for: measured costs, models that are no chains, layers that must run once, and unchanged models."""

import copy
import functools
import os
import random
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ckpt_kernels import plan
from ckpt_kernels.convert.layers import layers_of
from ckpt_kernels.plan.bench import Bench
from ckpt_kernels.plan.chain import predicted
from ckpt_kernels.plan.costs import FIXED, Assignment, Checkpoint, StageAt
from ckpt_kernels.plan.marks import Segment
from ckpt_kernels.plan.measure import Measurements, measure_choices
from ckpt_kernels.plan.solve import Solver
from ckpt_kernels.plan.timing import Seconds

from .planned_models import TOKENS, WIDTH, Layer, Model, loss_of, made, peak, plan_of

pytestmark = pytest.mark.usefixtures("one_thread")


def test_costs_predict_peaks() -> None:
    """For random assignments with checkpoints over several layers, and for the leanest, with checkpoints in others."""
    model, tokens = made(layers=5)
    bench = Bench(model, (tokens,), {}, loss_of, lambda line: None)
    found = measure_choices(bench)
    layers = [index for index, name in enumerate(found.layers) if name]
    assert [found.layers[i] for i in layers] == [f"layers.{i}" for i in range(5)]
    rng = random.Random(0)
    tried = [with_random_runs(found, layers, rng) for _ in range(6)]
    solver = Solver(found.stages)
    leanest = solver.best(int(solver.front.needs[0]))
    assert leanest is not None and depth_of(leanest) >= 3
    for turn, parts in enumerate([*tried, leanest]):
        need, _ = predicted(found.stages, parts)
        real = bench.peak(f"{turn}", bench.twin(plan_of(model, found, parts)))
        # Half of a layer's output, and less than a hundredth of eager's peak.
        assert abs(need - real) <= found.stages[1].output / 2, parts


def depth_of(parts: Assignment) -> int:
    return max((1 + depth_of(part.inside) for part in parts if isinstance(part, Checkpoint)), default=0)


def with_random_runs(found: Measurements, layers: list[int], rng: random.Random) -> Assignment:
    parts: list[StageAt | Checkpoint] = []
    index = 0
    while index < len(found.stages):
        stage = found.stages[index]
        if index not in layers:
            parts.append(StageAt(index, FIXED))
            index += 1
            continue
        length = min(rng.choice((1, 1, 2, 3)), layers[-1] + 1 - index)
        chosen = tuple(StageAt(i, rng.choice(list(found.stages[i].costs))) for i in range(index, index + length))
        assert stage.checkpointed is not None
        parts += [Checkpoint(chosen)] if rng.random() < 0.5 else chosen
        index += length
    return tuple(parts)


def test_planning_does_not_change_the_model() -> None:
    model, tokens = made(dropout=0.2)
    stepped: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.grad = torch.ones_like(parameter)
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: stepped.append(name))
    called: list[str] = []
    model.layers[1].register_forward_hook(lambda *given: called.append("hook"))
    before = copy.deepcopy({name: value.clone() for name, value in model.state_dict().items()})
    states = torch.get_rng_state(), random.getstate()
    kinds = [type(module) for module in model.modules()]
    plan(model, tokens, budget=0.5, loss=loss_of)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is not None and torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert stepped == []


class Shared(nn.Module):
    """One layer that runs several times."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer()])

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.layers[0](x)
        return x


class Towers(nn.Module):
    """Two parallel stacks of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.ModuleList(Layer() for _ in range(2)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        left = right = x
        for layer in self.left:
            left = layer(left)
        for layer in self.right:
            right = layer(right)
        return left * right


class Ladder(nn.Module):
    """Layers with skip connections, as in a U-Net."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = (nn.ModuleList(Layer() for _ in range(3)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for layer in self.down:
            x = layer(x)
            skips.append(x)
        for layer in self.up:
            x = layer(x + skips.pop())
        return x


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(WIDTH, 64), nn.LayerNorm(64), nn.Linear(64, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(nn.functional.gelu(self.norm(self.one(x))))


@pytest.mark.parametrize("kind", (Shared, Towers, Ladder, Plain))
def test_models_that_are_no_plain_chains(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = kind(), torch.randn(2, TOKENS, WIDTH)
    found = plan(model, x, budget=1.0 if kind is Plain else 0.8)
    assert found.measured.peak <= found.budget
    found.apply()
    assert peak(model, x) <= found.budget
    assert (found.whole is not None) == (kind in (Shared, Plain))
    if kind is Shared:
        assert "more than once" in str(found)


def test_layers_that_are_fused_are_planned_as_one() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
    found = plan(model, torch.randn(4, WIDTH), budget=None)
    assert found.whole is not None and "computed as one" in str(found)


def test_layers_are_found_in_nested_lists() -> None:
    model, _ = made()
    assert list(layers_of(model)) == [f"layers.{i}" for i in range(4)]
    stages = nn.ModuleList(nn.Sequential(Layer(), Layer()) for _ in range(2))
    assert list(layers_of(nn.Sequential(nn.Linear(4, 4), stages))) == ["1.0.0", "1.0.1", "1.1.0", "1.1.1"]
    # Experts have no norms, so the module that holds them is the layer.
    expert = Layer()
    expert.experts = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 512), nn.Linear(512, WIDTH)) for _ in range(4))
    assert list(layers_of(nn.ModuleList([expert]))) == ["0"]


def test_layers_that_write_to_their_attributes_run_once() -> None:
    class Counting(Layer):
        seen = 0

        def __init__(self) -> None:
            super().__init__()
            self.seen = 0

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            return super().forward(x)

    model, tokens = made()
    model.layers = nn.ModuleList(Counting() for _ in range(4))
    bench = Bench(model, (tokens,), {}, loss_of, lambda line: None)
    assert all(stage.checkpointed is None for stage in measure_choices(bench).stages)
    assert [layer.seen for layer in model.layers] == [0] * 4


class Scaled(nn.Parameter):
    """A user's parameter class."""


def test_parameters_of_other_classes_and_with_attributes_are_left_alone() -> None:
    model, tokens = made()
    head = Scaled(model.head.weight.detach())
    head.scale = 2.0  # type: ignore[attr-defined]
    model.head.weight = head
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    head.register_post_accumulate_grad_hook(lambda p: optimizer.step())
    before = head.detach().clone()

    def loss(logits: Tensor) -> Tensor:
        return loss_of(logits) * 2.0

    plan(model, tokens, budget=None, loss=loss)
    assert head.grad is None
    assert torch.equal(head, before)


def test_models_whose_copies_would_run_the_model_itself_are_an_error() -> None:
    model, tokens = made()
    forward = model.layers[1].forward
    model.layers[1].forward = lambda x: forward(x) * 0.5  # type: ignore[method-assign]
    with pytest.raises(TypeError, match=r"layers\.1\.forward is a function that holds modules"):
        plan(model, tokens, budget=None, loss=loss_of)
    assert all(p.grad is None for p in model.parameters())
    del model.layers[1].forward
    for foreign in (made()[0].layers[1].forward, functools.partial(made()[0].layers[1].forward)):
        model.layers[1].elsewhere = foreign
        with pytest.raises(TypeError, match=r"layers\.1\.elsewhere is a function that holds modules"):
            plan(model, tokens, budget=None, loss=loss_of)


def test_methods_of_the_models_own_modules_are_bound_to_the_copies() -> None:
    """As in PEFT's model for causal language models, which keeps a method of the model inside."""
    model, tokens = made()
    model.layers[1].forward = model.layers[1].forward  # type: ignore[method-assign]
    model.kept_method = functools.partial(model.layers[0].forward)
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    found = plan(model, tokens, budget=None, loss=loss_of)
    assert found.layers and all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(dict(model.named_parameters()), expected, rtol=0, atol=0)


def test_models_that_skip_layers_at_random_are_planned_as_a_whole() -> None:
    class Dropping(Model):
        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embedding(tokens)
            for layer in self.layers:
                if random.random() < 0.5:
                    x = layer(x)
            return self.head(self.norm(x))

    torch.manual_seed(0)
    random.seed(0)
    found = plan(Dropping(8), torch.randint(0, 50, (2, TOKENS)), budget=None, loss=loss_of)
    assert found.whole is not None
    assert "at random" in found.note or "from step to step" in found.note


def test_layers_with_irreproducible_randomness_run_once() -> None:
    class Odd(Layer):
        def forward(self, x: Tensor) -> Tensor:
            noise = torch.tensor([float(b) for b in os.urandom(WIDTH)])
            return super().forward(x * noise)

    model, tokens = made()
    model.layers = nn.ModuleList(Odd() for _ in range(3))
    bench = Bench(model, (tokens,), {}, loss_of, lambda line: None)
    assert all(stage.checkpointed is None for stage in measure_choices(bench).stages)


def test_planning_does_not_change_the_inputs() -> None:
    """Also if one of the inputs cannot be copied."""

    class Masking(Model):
        def forward(self, x: Tensor, lock: Any) -> Tensor:  # type: ignore[override]
            x = x.mul_(1.5) if not x.requires_grad else x
            for layer in self.layers:
                x = layer(x)
            return x

    torch.manual_seed(0)
    x = torch.randn(2, TOKENS, WIDTH)
    before = x.clone()
    plan(Masking(2), x, threading.Lock(), budget=None)
    assert torch.equal(x, before)
    assert x.grad is None


def test_a_model_with_checkpointing_of_its_own_is_planned_as_a_whole() -> None:
    class Checkpointing(Model):
        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embedding(tokens)
            for layer in self.layers:
                x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
            return self.head(self.norm(x))

    torch.manual_seed(0)
    found = plan(Checkpointing(), torch.randint(0, 50, (2, TOKENS)), budget=None, loss=loss_of)
    assert found.whole is not None
    assert "checkpointing off" in found.note


def test_fitted_seconds_do_not_depend_on_the_machines_speed() -> None:
    """Each step is slower by an unknown factor, and each step has other choices."""
    truth = {"a": 1.0, "b": 1.5, "c": 2.0}
    choices = list(truth)
    steps, chosen = [], []
    for step, slow in enumerate((1.0, 3.0, 1.7)):
        levels = [choices[(place + step) % 3] for place in range(6)]
        segments = {("forward_gap", 0): Segment(0.1 * slow, 0, 0)}
        for index, level in enumerate(levels):
            for what in ("forward", "backward"):
                segments[what, index] = Segment(truth[level] * slow, 0, 0)
        steps.append(segments)
        chosen.append(levels)
    found = Seconds.fitted(steps, chosen, [0] * 6)
    for level, seconds in truth.items():
        assert found.of(("forward", 2), level) / found.of(("forward", 2), "a") == pytest.approx(seconds, rel=1e-6)


class Bottleneck(nn.Module):
    """A layer of a ResNet. At "output" the inputs of all layers of a stage are recomputed in one chain."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        before = width // stride
        self.first, self.norm1 = nn.Conv2d(before, width // 4, 1, bias=False), nn.BatchNorm2d(width // 4)
        self.middle = nn.Conv2d(width // 4, width // 4, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width // 4)
        self.last, self.norm3 = nn.Conv2d(width // 4, width, 1, bias=False), nn.BatchNorm2d(width)
        self.act = nn.ReLU()
        self.shortcut = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.norm1(self.first(x)))
        h = self.norm3(self.last(self.act(self.norm2(self.middle(h)))))
        return self.act(h + self.shortcut(x))


class Stages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        sizes = [(32, 1), (32, 1), (32, 1), (64, 2), (64, 1), (64, 1)]
        self.stem, self.norm = nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32)
        self.layers = nn.ModuleList([Bottleneck(*size) for size in sizes])

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        for layer in self.layers:
            x = layer(x)
        return x


def test_inputs_that_later_layers_recompute_are_counted_once() -> None:
    """The peaks of a ResNet with other levels in the first stage, whose maps are larger, than in the second."""
    torch.manual_seed(0)
    bench = Bench(Stages(), (torch.randn(2, 3, 32, 32),), {}, lambda y: y.square().mean(), lambda line: None)
    found = measure_choices(bench)
    for first, second in (("layer", "layer"), ("layer", "output"), ("output", "layer"), ("output", "output")):
        levels = dict.fromkeys(found.layers, FIXED) | {f"layers.{i}": first if i < 3 else second for i in range(6)}
        parts = tuple(StageAt(index, levels[name]) for index, name in enumerate(found.layers))
        need, _ = predicted(found.stages, parts)
        real = bench.peak(f"{first}, {second}", bench.twin(plan_of(bench.model, found, parts)))
        assert real <= need * 1.01 and need <= 1.3 * real, (first, second)

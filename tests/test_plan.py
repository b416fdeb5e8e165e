"""`plan`: peaks within the budget, unchanged models, models that are no chains, saved plans, and errors."""

import copy
import json
import os
import pathlib
import pickle
import random
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ckpt_kernels
from ckpt_kernels import DoesNotFit, Plan, cli, memory, plan
from ckpt_kernels.convert.layers import layers_of
from ckpt_kernels.levels import OF_MODULES
from ckpt_kernels.plan.bench import Bench, ChoiceByLayer, default_loss
from ckpt_kernels.plan.budget import bytes_of
from ckpt_kernels.plan.chain import predicted
from ckpt_kernels.plan.costs import FIXED, Checkpoint, StageAt
from ckpt_kernels.plan.marks import Segment
from ckpt_kernels.plan.measure import measure_choices
from ckpt_kernels.plan.timing import Seconds

WIDTH, TOKENS = 32, 64
pytestmark = pytest.mark.usefixtures("one_thread")


class Layer(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention_norm, self.norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(self.attention_norm(x)).chunk(3, -1)
        )
        a = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.drop(self.out(a.transpose(1, 2).flatten(-2)))
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    """A small language model."""

    def __init__(self, layers: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, WIDTH)
        self.layers = nn.ModuleList(Layer(dropout) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 50, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def loss_of(logits: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), torch.zeros(2 * (TOKENS - 1), dtype=torch.long))


def made(**options: Any) -> tuple[Model, Tensor]:
    torch.manual_seed(0)
    return Model(**options).train(), torch.randint(0, 50, (2, TOKENS))


def peak(model: nn.Module, *inputs: Any, loss: Any = default_loss) -> int:
    """The peak in bytes of a step that accumulates into existing gradients."""

    def step() -> None:
        output = model(*inputs)
        loss(output).backward()

    step()
    return memory.peak_bytes(step)


@pytest.mark.parametrize("budget", (0.7, 0.45, 0.3))
def test_a_step_keeps_to_the_budget(budget: float) -> None:
    model, tokens = made()
    found = plan(model, tokens, budget=budget, loss=loss_of)
    assert found.budget == int(budget * found.steps["eager"].peak)
    assert found.measured.peak <= found.budget
    found.apply()
    assert peak(model, tokens, loss=loss_of) <= found.budget
    found.revert()
    assert abs(peak(model, tokens, loss=loss_of) - found.steps["eager"].peak) <= 0.01 * found.steps["eager"].peak


def test_costs_predict_peaks() -> None:
    """For random assignments with checkpoints over several layers."""
    model, tokens = made(layers=5)
    bench = Bench(model, (tokens,), {}, loss_of, lambda line: None)
    found = measure_choices(bench)
    layers = [index for index, name in enumerate(found.layers) if name]
    assert [found.layers[i] for i in layers] == [f"layers.{i}" for i in range(5)]
    rng = random.Random(0)
    for turn in range(6):
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
        need, _ = predicted(found.stages, tuple(parts))
        mine = plan_of(model, found, tuple(parts))
        _, points = bench.step(f"{turn}", bench.twin(mine), memory=True)
        real = max(point.peak for point in points)
        assert abs(need - real) <= 0.01 * found.steps["eager"].peak, parts


def plan_of(model: nn.Module, found: Any, parts: tuple) -> Plan:
    from ckpt_kernels.plan.bench import StepCost
    from ckpt_kernels.plan.plan import structure_of

    nothing = StepCost(0, 0.0)
    return Plan(
        None, parts, nothing, nothing, {}, 0.0, [], found.stages, found.layers, structure_of(model), found.shapes
    )


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


def test_a_plan_gives_the_models_gradients() -> None:
    model, tokens = made(layers=6)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        loss_of(model(tokens)).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients()
    for budget in (0.6, 0.25):
        found = plan(model, tokens, budget=budget, loss=loss_of)
        found.apply()
        torch.testing.assert_close(gradients(), expected, rtol=1e-4, atol=1e-6)
        found.revert()


def test_plans_are_saved_and_loaded(tmp_path: pathlib.Path) -> None:
    model, tokens = made()
    found = plan(model, tokens, budget=0.4, loss=loss_of)
    found.save(tmp_path / "plan.json")
    read = Plan.load(tmp_path / "plan.json")
    assert read == found
    assert str(read) == str(found)
    with pytest.raises(ValueError, match="expected a model"):
        read.apply()
    # A model of the same structure, as in another process or rank.
    other, _ = made()
    report = ckpt_kernels.convert(other, recompute=read)
    assert report.recompute.startswith("by module: ")
    assert peak(other, tokens, loss=loss_of) <= found.budget
    names = [name or "0" for name in found.layers]
    for wrong in (
        {"budget": 3},
        found.as_dict() | {"budget": -1},
        found.as_dict() | {"bound": None},
        found.as_dict() | {"measured": {"peak": -1, "seconds": 1.0}},
        found.as_dict() | {"layers": names},
    ):
        (tmp_path / "no.json").write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match="holds no plan"):
            Plan.load(tmp_path / "no.json")


def test_a_plan_for_another_structure_is_an_error() -> None:
    model, tokens = made()
    found = plan(model, tokens, budget=None, loss=loss_of)
    found.apply()  # a converted model is of the same structure
    found.apply()
    found.revert()
    model.layers.append(Layer())
    with pytest.raises(ValueError, match="another structure"):
        found.apply()
    with pytest.raises(ValueError, match="another structure"):
        ckpt_kernels.convert(made(layers=3)[0], recompute=found)


def test_the_error_of_a_small_budget_names_the_least() -> None:
    model, tokens = made()
    with pytest.raises(DoesNotFit, match="budget is 1,000 bytes; expected at least") as raised:
        plan(model, tokens, budget=1000, loss=loss_of)
    found = plan(model, tokens, budget=int(raised.value.least * 1.02), loss=loss_of)
    assert found.measured.peak <= found.budget


@pytest.mark.parametrize(
    ("budget", "expected"),
    (
        (1000, 1000),
        ("12GiB", 12 * 2**30),
        ("1.5 mb", 1_500_000),
        ("2k", 2000),
        (" 7 ", 7),
        (0.5, 50),
        (1.0, 100),
        (1e9, 10**9),
        (np.int64(7), 7),
        ("9" * 400, 2**60),
        (None, None),
    ),
)
def test_budgets_in_bytes(budget: Any, expected: int | None) -> None:
    assert bytes_of(budget, 100, torch.device("cpu")) == expected


@pytest.mark.parametrize(
    "budget", (0, -1, 0.0, float("nan"), float("inf"), "", "12 GiBs", "1.2.3k", ".", "device", 1.5)
)
def test_invalid_budgets(budget: Any) -> None:
    with pytest.raises(ValueError, match="budget is"):
        bytes_of(budget, 100, torch.device("cpu"))


@pytest.mark.parametrize("budget", (True, [1], 1j))
def test_budgets_of_another_type(budget: Any) -> None:
    with pytest.raises(TypeError, match="budget is"):
        bytes_of(budget, 100, torch.device("cpu"))


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


@pytest.mark.parametrize(
    ("loss", "error"),
    ((3, TypeError), (lambda y: 1.0, TypeError), (lambda y: y, ValueError), (lambda y: y.detach().sum(), ValueError)),
)
def test_invalid_losses(loss: Any, error: type[Exception]) -> None:
    model, tokens = made(layers=2)
    with pytest.raises(error, match="loss"):
        plan(model, tokens, budget=None, loss=loss)


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


def test_the_error_of_a_small_budget_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(DoesNotFit(3, 5, "why")))
    assert (error.budget, error.least, str(error)) == (3, 5, str(DoesNotFit(3, 5, "why")))


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


def test_levels_by_name(recwarn: pytest.WarningsRecorder) -> None:
    """A name applies to all modules below, and a later name overrides an earlier one."""
    model, tokens = made()
    expected = loss_of(model(tokens))
    report = ckpt_kernels.convert(
        model, recompute={"layers.*": "all", "layers.0": "none", "layers.3": "checkpoint", "*.norm": "block"}
    )
    assert not any(entry.name.startswith("layers.0.") and entry.name != "layers.0.norm" for entry in report.replaced)
    torch.testing.assert_close(loss_of(model(tokens)), expected, rtol=1e-5, atol=1e-6)
    loss_of(model(tokens)).backward()
    with pytest.raises(ValueError, match=r"recompute\['layers.1'\] is 'most'"):
        ckpt_kernels.convert(model, recompute={"layers.1": "most"})
    with pytest.raises(ValueError, match=r"recompute names 'blocks\.\*'"):
        ckpt_kernels.convert(model, recompute={"blocks.*": "all"})
    with pytest.raises(TypeError, match="recompute is list"):
        ckpt_kernels.convert(model, recompute=["all"])  # type: ignore[arg-type]


@pytest.mark.parametrize("choice", OF_MODULES)
def test_a_level_for_each_layer_keeps_as_much_as_for_the_model(choice: str) -> None:
    model, tokens = made()
    ckpt_kernels.convert(model, recompute=ChoiceByLayer({f"layers.{i}": choice for i in range(4)}))
    other, _ = made()
    if choice not in ("none", "checkpoint"):
        ckpt_kernels.convert(other, recompute=choice)
    by_layer, whole = (memory.saved_bytes(module, tokens) for module in (model, other))
    if choice == "checkpoint":
        assert by_layer < 0.2 * whole
    else:
        # For the whole model a level also applies to the norm after the layers.
        assert abs(by_layer - whole) <= 2 * tokens.numel() * WIDTH * 4


def test_the_command_prints_saves_and_draws_a_plan(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    pytest.importorskip("matplotlib")
    out, png = tmp_path / "plan.json", tmp_path / "plan.png"
    target = f"{__name__}:model_for_the_command"
    assert cli.main(["plan", target, "--budget", "0.6", "--out", str(out), "--png", str(png)]) == 0
    assert str(Plan.load(out)) == capsys.readouterr().out.rstrip("\n")
    assert png.stat().st_size > 10_000
    assert cli.main(["plan", target, "--budget", "1k"]) == 1
    assert "the least that any choice takes" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["plan", target, "--budget", "much"])
    assert "budget is 'much'" in capsys.readouterr().err


def model_for_the_command() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Model(layers=3), torch.randint(0, 50, (2, TOKENS))

"""Plans within a budget: peaks and gradients of applied plans, saved plans, levels by name, the command, and errors."""

import json
import pathlib
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ckpt_kernels
from ckpt_kernels import DoesNotFit, Plan, cli, memory, plan
from ckpt_kernels.levels import OF_LAYERS, OF_MODULES
from ckpt_kernels.plan.bench import ChoiceByLayer
from ckpt_kernels.plan.budget import bytes_of

from .planned_models import TOKENS, WIDTH, Layer, Model, loss_of, made, peak

pytestmark = pytest.mark.usefixtures("one_thread")


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
        (10**400, 2**60),
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


@pytest.mark.parametrize(
    ("loss", "error"),
    ((3, TypeError), (lambda y: 1.0, TypeError), (lambda y: y, ValueError), (lambda y: y.detach().sum(), ValueError)),
)
def test_invalid_losses(loss: Any, error: type[Exception]) -> None:
    model, tokens = made(layers=2)
    with pytest.raises(error, match="loss"):
        plan(model, tokens, budget=None, loss=loss)


def test_the_error_of_a_small_budget_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(DoesNotFit(3, 5, "why")))
    assert (error.budget, error.least, str(error)) == (3, 5, str(DoesNotFit(3, 5, "why")))


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


# "checkpoint" for the model is one checkpoint around all layers.
@pytest.mark.parametrize(
    ("name", "level"),
    [(name, level) for name in ("layers", "layers*") for level in (*OF_MODULES, "all, tiles=2")]
    + [(name, level) for name in ("*", "") for level in OF_LAYERS],
)
def test_a_level_for_a_module_without_forward_or_for_the_model_applies_to_the_layers(name: str, level: str) -> None:
    def saved(recompute: dict[str, str]) -> int:
        model, tokens = made()
        ckpt_kernels.convert(model, recompute=recompute)
        return memory.saved_bytes(model, tokens)

    around = {} if name.startswith("layers") else {"": level.replace("layer", "all")}
    assert saved({name: level}) == saved({**around, "layers.*": level})


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
    assert "the smallest peak that was measured" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["plan", target, "--budget", "much"])
    assert "budget is 'much'" in capsys.readouterr().err


def model_for_the_command() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Model(layers=3), torch.randint(0, 50, (2, TOKENS))

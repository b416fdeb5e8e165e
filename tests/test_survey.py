"""The survey of architectures: the size of the catalogue, and crashes, timeouts and wrong results as results."""

import os
import pathlib

import pytest
import torch
from torch import nn

pytest.importorskip("rich", reason="rich is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from benchmarks import survey
from benchmarks.survey import report, run
from benchmarks.survey.entry import Entry, Shape

# The least number of architectures in the catalogue, by library.
AT_LEAST = {"torch": 12, "handwritten": 20, "transformers": 180, "diffusers": 40, "timm": 60, "torchvision": 10}


@pytest.mark.parametrize("library", AT_LEAST)
def test_catalogue_sizes(library):
    reason = survey.why_not(library)
    if reason:
        pytest.skip(reason)
    names = [name for name, entry in survey.catalogue().items() if entry.library == library]
    assert len(names) >= AT_LEAST[library]
    assert all(name.startswith(f"{library}/") for name in names)


def test_at_least_40_architectures_are_wide():
    if survey.why_not("transformers"):
        pytest.skip(survey.why_not("transformers"))
    assert sum(entry.has_wide for entry in survey.catalogue().values()) >= 40


def test_every_model_type_of_transformers_is_listed_or_left_out_with_a_reason():
    if survey.why_not("transformers"):
        pytest.skip(survey.why_not("transformers"))
    from transformers.models.auto import modeling_auto

    model_types = {f"transformers/{name}" for name in modeling_auto.MODEL_MAPPING_NAMES}
    assert model_types <= survey.catalogue().keys() | survey.left_out().keys()
    assert all(survey.left_out().values())


def test_patterns_select_architectures():
    assert [entry.name for entry in survey.chosen(["handwritten/swiglu*"])] == [
        "handwritten/swiglu_chunked",
        "handwritten/swiglu",
    ]
    assert [entry.name for entry in survey.chosen(["perceptron"])] == ["torch/perceptron"]
    with pytest.raises(KeyError):
        survey.chosen(["nothing_of_this_name"])


class Crashing(nn.Module):
    """A model that aborts the process after `fatal` forward passes."""

    def __init__(self, fatal: int) -> None:
        super().__init__()
        self.product = nn.Linear(8, 8)
        self.fatal = fatal

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.fatal -= 1
        if self.fatal < 0:
            os.abort()
        return self.product(x)


def _entry(name: str, model) -> Entry:
    return Entry(f"test/{name}", model, lambda made, shape: {"x": torch.randn(shape.batch, shape.length, 8)})


def _raise(width: int) -> nn.Module:
    raise ValueError(f"no model of width {width}")


def test_a_crash_is_a_result():
    entries = [_entry("crashes", lambda width: Crashing(0)), _entry("raises", _raise)]
    crashed, not_built = run.survey(entries, jobs=2, timeout=60)
    assert crashed["phases"]["eager"]["raised"] == "crash: SIGABRT"
    assert "test_survey.py" in crashed["phases"]["eager"]["where"]
    assert "no model of width" in not_built["phases"]["build"]["raised"]
    assert report.verdict(crashed) == "not run: crash: SIGABRT"


def test_a_crash_in_one_phase_keeps_the_others(monkeypatch):
    import ckpt_kernels

    def convert(model: nn.Module, *, recompute: str):
        if recompute == "output":
            os.abort()
        return real(model, recompute=recompute)

    real = ckpt_kernels.convert
    monkeypatch.setattr(ckpt_kernels, "convert", convert)
    (found,) = run.survey(survey.chosen(["torch/perceptron"]), timeout=60)
    assert found["phases"]["output"]["raised"] == "crash: SIGABRT"
    assert all("kept" in found["phases"][level] for level in ("eager", "block", "all"))
    assert report.raised(found) == ["output: crash: SIGABRT"]


def test_a_timeout_is_a_result():
    (found,) = run.survey([_entry("hangs", lambda width: Hanging())], timeout=2)
    assert found["phases"]["eager"]["raised"] == "timeout after 2 s"


class Hanging(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        while True:
            pass


class Writing(nn.Module):
    """A model whose output depends on the number of calls."""

    def __init__(self) -> None:
        super().__init__()
        self.product = nn.Linear(8, 8)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.product(x) * self.calls


def test_faults_of_a_conversion_are_found(monkeypatch):
    """The conversion changes an attribute, draws random numbers and scales a weight."""
    import ckpt_kernels

    class Report:
        replaced, left_alone = (), ()

    def convert(model: nn.Module, *, recompute: str) -> Report:
        model.calls += 1
        torch.rand(1)
        with torch.no_grad():
            model.product.weight.mul_(1.01)
        return Report()

    monkeypatch.setattr(ckpt_kernels, "convert", convert)
    monkeypatch.setattr(ckpt_kernels, "revert", lambda model: None)
    (found,) = run.survey([_entry("writing", lambda width: Writing())], timeout=60)
    changes = "\n".join(report.changed(found))
    assert "by converting: product.weight: 64 of 64 numbers differ" in changes
    assert "by converting: the model.calls: 0 became 1" in changes
    assert "by converting: torch" in changes
    assert any("outputs" in text for text in report.wrong(found))
    assert any("gradients" in text for text in report.wrong(found))


def test_end_to_end(tmp_path: pathlib.Path):
    """The survey of three models finds no fault."""
    names = ["torch/perceptron", "handwritten/block_pre", "handwritten/counting"]
    results = run.survey(survey.chosen(names), jobs=2, timeout=60)
    assert sorted(found["name"] for found in results) == sorted(names)
    for found in results:
        assert report.runs(found)
        assert report.verdict(found) == ""
        assert report.ratio(found, "all") <= report.ratio(found, "block") <= 1
    report.write(tmp_path, {"date": "today"}, results, {"timm": "timm does not import"})
    text = (tmp_path / "survey.md").read_text()
    assert "| torch/perceptron |" in text and "- timm: timm does not import" in text
    assert (tmp_path / "survey.png").stat().st_size > 10_000
    assert report.summary(results)[-1][:6] == ["all", "3", "0", "0", "0", "0"]


def test_times_of_a_wide_model():
    from benchmarks.survey import timing

    found = timing.timed(survey.catalogue()["torch/perceptron"], timeout=60)
    assert all(found[shape]["ratio"] > 0 for shape in timing.SHAPES)
    assert timing.cells(found)[0] == "torch/perceptron" and len(timing.cells(found)) == len(timing.COLUMNS)
    late = timing.timed(survey.catalogue()["torch/perceptron"], timeout=0)
    assert timing.cells(late)[1:] == ["-"] * 4 and timing.summary([late]) == []


def test_shapes_differ_between_batches():
    from benchmarks.survey.step import Subject

    first, second = Subject(survey.catalogue()["handwritten/swiglu"]).batches
    assert first["x"].shape[:2] == Shape(2, 24) and second["x"].shape[:2] == Shape(3, 16)

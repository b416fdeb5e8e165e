"""The examples that people run first, at toy size: they run, the ways train alike, and the picture is drawn."""

import importlib
import json
import pathlib
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("rich", reason="rich is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
# Each with what it needs, its sizes, and the names of the sizes of its data.
TOYS: dict[str, tuple[tuple[str, ...], str, dict[str, Any], str, dict[str, Any]]] = {
    "finetune_lora": (
        ("transformers", "peft"),
        "Tuned",
        {"WIDTH": 16, "LAYERS": 2, "HEADS": 2},
        "train_lm",
        {"CONTEXT": 16, "BATCH": 2},
    ),
    "convert_vit": (
        ("transformers",),
        "Classifier",
        {"WIDTH": 16, "LAYERS": 2, "HEADS": 2, "SIZE": 8},
        "train_unet",
        {"SIZE": 8, "BATCH": 2},
    ),
    "convert_unet": (("diffusers",), "Denoiser", {"WIDTHS": (8, 8, 8)}, "train_unet", {"SIZE": 8, "BATCH": 2}),
}


@pytest.mark.parametrize("name", TOYS)
def test_an_example_runs(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    needs, kind, sizes, source, of_data = TOYS[name]
    for package in needs:
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for module in ("side_by_side", "train_lm", "train_unet", name):
        monkeypatch.delitem(sys.modules, module, raising=False)
    data = importlib.import_module(source)
    for key, value in of_data.items():
        monkeypatch.setattr(data, key, value)
    example = importlib.import_module(name)
    for key, value in sizes.items():
        monkeypatch.setattr(example, key, value)
    side_by_side = importlib.import_module("side_by_side")
    for key in side_by_side.RAISED_THRESHOLDS:
        monkeypatch.setenv(key, "0")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--steps", "2", "--out", str(tmp_path)])
    with torch.random.fork_rng():
        ways = example.WAYS[:2]
        assert side_by_side.main("", getattr(example, kind), example.draw_batch, "cpu", 2, ways=ways) == 0
    runs = json.loads((tmp_path / f"{name}.json").read_text())["runs"]
    assert list(runs) == ["eager", "checkpointed", "ours, output"]
    for run in runs.values():
        assert run["losses"] == pytest.approx(runs["eager"]["losses"], rel=1e-4)
    assert runs["ours, output"]["saved_bytes"] < runs["eager"]["saved_bytes"]
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000

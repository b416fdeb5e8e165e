"""Examples run as notebooks and as a script at toy size: losses of all ways to train agree, and the picture is drawn.

The cells of a notebook run one after the other in one namespace, without a Jupyter kernel, which starts slowly.
"""

import importlib
import json
import pathlib
import sys
from typing import Any

import pytest
import torch

from tools import notebooks

pytest.importorskip("rich", reason="rich is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

# For each example: required packages, toy sizes, the module of the data, and the sizes of the data.
TOYS: dict[str, tuple[tuple[str, ...], dict[str, Any], str, dict[str, Any]]] = {
    "finetune_lora": (
        ("transformers", "peft"),
        {"WIDTH": 16, "LAYERS": 2, "HEADS": 2},
        "train_lm",
        {"CONTEXT": 16, "BATCH": 2},
    ),
    "convert_vit": (
        ("transformers",),
        {"WIDTH": 16, "LAYERS": 2, "HEADS": 2, "SIZE": 8},
        "train_unet",
        {"SIZE": 8, "BATCH": 2},
    ),
    "convert_unet": (("diffusers",), {"WIDTHS": (8, 8, 8)}, "train_unet", {"SIZE": 8, "BATCH": 2}),
}


@pytest.fixture
def side_by_side(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that the examples share, imported anew, as by a program in the folder of the examples."""
    monkeypatch.syspath_prepend(str(notebooks.EXAMPLES))
    for name in ("side_by_side", "train_lm", "train_unet", *TOYS):
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module("side_by_side")
    for key in module.RAISED_THRESHOLDS:
        monkeypatch.setenv(key, "0")
    return module


def code_cells(name: str) -> list[str]:
    cells = json.loads((notebooks.EXAMPLES / f"{name}.ipynb").read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def make_small(name: str, example: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets toy sizes in an example and in the module of its data."""
    _, sizes, source, of_data = TOYS[name]
    for key, value in of_data.items():
        monkeypatch.setattr(importlib.import_module(source), key, value)
    assert sizes.keys() <= example.keys()
    example.update(sizes, WAYS=example["WAYS"][:2])


@pytest.mark.parametrize("name", notebooks.NAMES)
def test_notebooks_equal_their_scripts(name: str) -> None:
    written = (notebooks.EXAMPLES / f"{name}.ipynb").read_text()
    assert written == notebooks.notebook(name), "python -m tools.notebooks"


@pytest.mark.parametrize("name", notebooks.NAMES)
def test_a_notebook_runs(name: str, side_by_side: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    for package in TOYS[name][0]:
        pytest.importorskip(package, reason=f"{package} is not installed")
    pictures = []

    def compare(*args: Any, **options: Any) -> None:
        pictures.append(side_by_side_compare(*args, **options | {"steps": 2, "out": tmp_path}))

    side_by_side_compare = side_by_side.compare
    monkeypatch.setattr(side_by_side, "compare", compare)
    # The setting would stay for the other tests of this process.
    monkeypatch.setattr("ckpt_kernels.memory.keep_freed_memory", lambda: True)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    with torch.random.fork_rng():
        for cell in code_cells(name):
            exec(cell, namespace)
            if "WAYS" in namespace and "small" not in namespace:
                make_small(name, namespace, monkeypatch)
                namespace["small"] = True
    runs = json.loads((tmp_path / f"{name}.json").read_text())["runs"]
    assert list(runs) == ["eager", "checkpointed", "ours, output"]
    for run in runs.values():
        assert run["losses"] == pytest.approx(runs["eager"]["losses"], rel=1e-4)
    assert runs["ours, output"]["saved_bytes"] < runs["eager"]["saved_bytes"]
    (picture,) = pictures
    assert picture._repr_png_().startswith(b"\x89PNG") and len(picture._repr_png_()) > 10_000


def test_a_script_runs(side_by_side: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    example = importlib.import_module("convert_vit")
    make_small("convert_vit", vars(example), monkeypatch)
    options = ["--steps", "1", "--recompute", "output", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["convert_vit.py", *options])
    with torch.random.fork_rng():
        ways = ("checkpoint",)
        assert side_by_side.main("", example.Classifier, example.draw_batch, "cpu", steps=60, ways=ways) == 0
    runs = json.loads((tmp_path / "convert_vit.json").read_text())["runs"]
    assert {name: len(run["losses"]) for name, run in runs.items()} == {"eager": 1, "ours, output": 1}
    assert (tmp_path / "convert_vit.png").exists()

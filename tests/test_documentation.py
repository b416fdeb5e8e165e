"""Entries of the reference are complete, and examples in the documentation run."""

import doctest
import importlib
import inspect
import pathlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import ckpt_kernels
from benchmarks import llama_layer
from ckpt_kernels import functional, memory, nn

ROOT = pathlib.Path(__file__).parent.parent
# Examples of integrations need their framework. The example of memory.freed_memory runs in its own test.
MODULES = (
    "activations",
    "backends",
    "check",
    "convert",
    "convert.swap",
    "functional.add_row_norm",
    "functional.bias_act",
    "functional.channel_norm",
    "functional.dyt",
    "functional.gated_row_norm",
    "functional.glu",
    "functional.linear",
    "functional.linear_loss",
    "functional.mlps",
    "functional.modulated_row_norm",
    "logits",
    "functional.rotary",
    "functional.row_norm",
    "integrations.common",
    "integrations.accelerate",
    "integrations.axolotl",
    "integrations.lightning",
    "integrations.torchtitan",
    "integrations.transformers",
    "memory.by_module",
    "memory.peak",
    "memory.saved",
    "nn.add_row_norm",
    "nn.bias_act",
    "nn.channel_norm",
    "nn.dyt",
    "nn.gated_row_norm",
    "nn.glu",
    "nn.linear",
    "nn.mlp",
    "nn.modulated_row_norm",
    "nn.rotary",
    "nn.row_norm",
    "offload",
    "plan",
    "recompute.contexts",
    "recompute.layers",
)
FUNCTION = ("Args", "Returns", "Kept for backward", "Raises", "Example", "Source")
MODULE = ("Args", "Shape", "Kept for backward", "Example")
# Pages whose Python code blocks form one program.
PAGES = ("README.md", "docs/index.md", "docs/tutorial.md")


def section(entry: str, title: str) -> str:
    """The text below a title; empty without this title."""
    found = re.search(rf"^{title}:\n((?:    .*\n?|\n)*)", entry, re.MULTILINE)
    return found[1].strip() if found else ""


def missing(entry: str, titles: tuple[str, ...]) -> list[str]:
    """The missing parts of an entry: sections with these titles, and a formula."""
    lacks = [title for title in titles if not section(entry, title)]
    return lacks if ".. math::\n    " in entry else ["formula", *lacks]


def arguments(entry: str) -> list[str]:
    """The names of the arguments below "Args"."""
    lines = re.findall(r"^ {4}(\w[\w, ]*): ", "    " + section(entry, "Args"), re.MULTILINE)
    return [name for line in lines for name in line.split(", ")]


def parameters(function: Callable[..., Any]) -> list[str]:
    found = inspect.signature(function).parameters.values()
    return [p.name for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


@pytest.mark.parametrize("name", functional.__all__)
def test_function_docstrings_are_complete(name: str) -> None:
    function = getattr(functional, name)
    entry = inspect.getdoc(function)
    assert missing(entry, FUNCTION) == []
    assert arguments(entry) == parameters(function)


@pytest.mark.parametrize("name", nn.__all__)
def test_module_docstrings_are_complete(name: str) -> None:
    module = getattr(nn, name)
    entry = inspect.getdoc(module)
    assert missing(entry, MODULE) == []
    # Channel norms pass all arguments but the activation to torch's class, whose arguments depend on the version.
    accepted = {name for kind in module.__mro__[:-1] if kind is not torch.nn.Module for name in parameters(kind)}
    assert set(parameters(module)) <= set(arguments(entry)) <= accepted
    called = re.findall(r"`functional\.(\w+)`", entry.rpartition("Errors and source:")[2])
    assert called and set(called) <= set(functional.__all__)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    torch.manual_seed(0)
    given = {"torch": torch, "ckpt_kernels": ckpt_kernels, "F": functional, "saved_bytes": memory.saved_bytes}
    try:
        module = importlib.import_module(f"ckpt_kernels.{name}")
    except ModuleNotFoundError as error:
        # The framework or a dependency may be missing; a module of this package may not.
        if not name.startswith("integrations.") or str(error.name).startswith("ckpt_kernels"):
            raise
        pytest.skip(str(error))
    result = doctest.testmod(module, extraglobs=given)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("page", PAGES)
def test_pages_run(page: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python code blocks of a page run as one program."""
    pytest.importorskip("triton")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    # The arguments of `convert` in README.md.
    model = torch.nn.Sequential(torch.nn.LayerNorm(64), torch.nn.GELU(), torch.nn.Linear(64, 64))
    names = {"__name__": "page", "model": model, "batch": torch.randn(8, 64)}
    text = (ROOT / page).read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert blocks
    for block in blocks:
        # At the line of the page, because Triton reads the source of a kernel from the file.
        before = "\n" * (text[: block.start()].count("\n") + 1)
        exec(compile(before + block[1], str(ROOT / page), "exec"), names)


def test_the_drawing_of_a_llama_layer_shows_the_kept_tensors() -> None:
    llama_layer.check()

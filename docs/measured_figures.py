"""Puts the figures of benchmarks/results/cpu into the reference: a table in each entry, and docs/measured/layers.md."""

import json
import pathlib
import re
from typing import Any

from benchmarks import report

DOCS = pathlib.Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results" / "cpu"
MEASURED = json.loads((RESULTS / "results.json").read_text())
# These functions are measured in whole layers only, at the end of their page.
IN_LAYERS = ("norm_linear", "act_linear", "mlp", "gated_mlp")
# For each module, the function that the module calls. The module shows the figures of this function.
CALLED = {
    "LayerNorm": "layer_norm",
    "RMSNorm": "rms_norm",
    "AddLayerNorm": "add_layer_norm",
    "AddRMSNorm": "add_rms_norm",
    "GatedRMSNorm": "gated_rms_norm",
    "ModulatedLayerNorm": "modulated_layer_norm",
    "ModulatedRMSNorm": "modulated_rms_norm",
    "BatchNorm1d": "batch_norm",
    "BatchNorm2d": "batch_norm",
    "BatchNorm3d": "batch_norm",
    "SyncBatchNorm": "batch_norm",
    "GroupNorm": "group_norm",
    "InstanceNorm1d": "instance_norm",
    "InstanceNorm2d": "instance_norm",
    "InstanceNorm3d": "instance_norm",
    "GLU": "glu",
    "BiasAct": "bias_act",
    "DyT": "dyt",
    "Rotary": "rotary",
    "NormLinear": "norm_linear",
    "ActLinear": "act_linear",
    "MLP": "mlp",
    "GatedMLP": "gated_mlp",
}


def write_layers() -> None:
    """Writes docs/measured/layers.md, which the page of linear layers includes."""
    folder = DOCS / "measured"
    folder.mkdir(exist_ok=True)
    (folder / "layers.md").write_text((RESULTS / "layers.md").read_text().partition("\n\n")[2])


def add_figures(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Adds the figures to the entry of a function, or refers from the entry of a module to them."""
    package, _, own = name.rpartition(".")
    if what == "function" and package == "ckpt_kernels.functional":
        lines += ["", ".. rubric:: Measured", "", *_figures(own)]
    elif what == "class" and package == "ckpt_kernels.nn":
        lines += ["", f"Measured: :func:`ckpt_kernels.functional.{CALLED[own]}`."]


def _figures(function: str) -> list[str]:
    """The table of a function's figures as reStructuredText."""
    if function in IN_LAYERS:
        return ["In whole layers: the table at the end of this page."]
    found = [result for result in MEASURED["results"] if _function_of(result["case"]) == function]
    if not found:
        return ["Not by itself."]
    about = MEASURED["machine"]
    where = f"{about['device']}, {about['threads']} threads, torch {about['torch']}, {about['date']}"
    head, _, *rows = report.summary(found).splitlines()
    table = [[cell.strip() for cell in row.strip("|").split("|")] for row in (head, *rows)]
    return [
        f"``{about['command']}`` on {where}, forward and backward; eager and torch.compile are how many times as long "
        "those take. :doc:`/benchmarking` says what the columns are.",
        "",
        ".. list-table::",
        "   :header-rows: 1",
        "",
        *(f"   {'  - ' if index else '* - '}{cell}" for row in table for index, cell in enumerate(row)),
    ]


def _function_of(case: str) -> str:
    """The function of a case: `layer_norm` for "layer_norm+gelu", `bias_act` for "bias_act (gelu)"."""
    return re.match(r"\w+", case)[0]

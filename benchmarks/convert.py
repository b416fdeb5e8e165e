"""`python -m benchmarks.convert`: the bytes that models keep for backward, unconverted and converted at each level.

`--survey` compares hundreds of models with their converted copies, each in a process of its own (see `survey`).
"""

import argparse
import datetime
import json
import pathlib
import sys
import warnings
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import ckpt_kernels
from ckpt_kernels.cli_arguments import amount, folder, positive
from ckpt_kernels.levels import OF_MODELS
from ckpt_kernels.memory import saved_bytes

from . import report
from .architectures import ARCHITECTURES, build, outputs_of, why_not
from .survey import main as surveying
from .survey.run import TIMEOUT


def measure(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """The bytes kept by a forward pass in training mode, by level, and the counts of replaced and other modules."""
    model, inputs = build(name, dtype)

    def kept() -> int:
        return saved_bytes(lambda: outputs_of(model, inputs))

    found: dict[str, Any] = {"architecture": name, "eager": kept()}
    for level in OF_MODELS:
        conversion = ckpt_kernels.convert(model, recompute=level)
        found[level] = kept()
    return found | {"replaced": len(conversion.replaced), "left_alone": len(conversion.left_alone)}


def cells(found: dict[str, Any]) -> list[str]:
    ratios = [f"{found[level] / found['eager']:.2f}" for level in OF_MODELS]
    counts = [str(found["replaced"]), str(found["left_alone"])]
    return [found["architecture"], f"{found['eager'] / 2**20:.2f}", *ratios, *counts]


COLUMNS = ["architecture", "eager, MiB", *OF_MODELS, "replaced", "left"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convert", description=__doc__)
    parser.add_argument("architectures", nargs="*", metavar="NAME", help=f"of {', '.join(ARCHITECTURES)}; default all")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--out", type=folder, default=pathlib.Path("out"))
    parser.add_argument("--survey", action="store_true", help="architectures by the hundred; NAME may have * and ?")
    parser.add_argument("--jobs", type=positive, default=2, help="processes of the survey at a time")
    parser.add_argument("--timeout", type=amount, default=TIMEOUT, help="seconds that the survey gives to one of them")
    options = parser.parse_args()
    if options.survey:
        return surveying.main(options.architectures, options.out, options.jobs, options.timeout)
    unknown = [name for name in options.architectures if name not in ARCHITECTURES]
    if unknown:
        parser.error(f"no such architecture: {', '.join(unknown)}; there are {', '.join(ARCHITECTURES)}")
    warnings.filterwarnings("ignore", module=r"diffusers\.|transformers\.")
    console = Console()
    names = options.architectures or list(ARCHITECTURES)
    for reason in dict.fromkeys(filter(None, map(why_not, names))):
        console.print(f"left out: {reason}")
    names = [name for name in names if why_not(name) is None]
    results = [measure(n, getattr(torch, options.dtype)) for n in track(names, "converting", console=console)]
    title = f"Kept for backward in {options.dtype}: as it is, and converted as a fraction of that"
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if index else "left")
    for found in results:
        table.add_row(*cells(found))
    console.print(table)
    options.out.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python -m benchmarks.convert", *sys.argv[1:]])
    about = report.machine(command, datetime.date.today().isoformat()) | {"dtype": options.dtype}
    (options.out / "convert.json").write_text(json.dumps({"machine": about, "results": results}, indent=1))
    lines = ["| " + " | ".join(COLUMNS) + " |", "| --- |" + " ---: |" * (len(COLUMNS) - 1)]
    lines += ["| " + " | ".join(cells(found)) + " |" for found in results]
    (options.out / "convert.md").write_text("\n".join(lines) + "\n")
    console.print(f"convert.json and convert.md are in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

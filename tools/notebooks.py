"""Writes the notebooks of examples from their scripts: `python -m tools.notebooks`.

A script is cut into cells: the docstring, the imports, the constants together, and each class and function by itself.
The last cell calls `compare` with the arguments that the script passes to `main`. (`main` reads a command line and
restarts Python; the cell makes the allocator keep freed memory instead.) Notebooks are written without results.
"""

import ast
import json
import pathlib
import re
from typing import Any

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
NAMES = ("finetune_lora", "convert_unet", "convert_vit")


def cell(kind: str, text: str, number: int) -> dict[str, Any]:
    """One cell; kind is "code" or "markdown"."""
    made = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": text.splitlines(keepends=True)}
    return made | ({"execution_count": None, "outputs": []} if kind == "code" else {})


def cells_of(name: str, script: str) -> list[tuple[str, str]]:
    """The kinds and texts of the cells of a script."""
    lines = script.splitlines(keepends=True)
    docstring, *statements, last = ast.parse(script).body
    title, _, more = ast.literal_eval(docstring.value).strip().partition("\n")
    cells = [("markdown", f"# {title}\n{more}")]
    group: type | None = None
    # The text between two statements belongs to the second.
    end = docstring.end_lineno
    for statement in statements:
        text = "".join(lines[end : statement.end_lineno]).strip("\n")
        end = statement.end_lineno
        kind = ast.Import if isinstance(statement, (ast.Import, ast.ImportFrom)) else type(statement)
        # Imports share a cell, and so do constants; each class and function has a cell of its own.
        if kind is group and kind in (ast.Import, ast.Assign):
            cells[-1] = ("code", f"{cells[-1][1]}\n{text}")
        else:
            cells.append(("code", text))
        group = kind
    call = re.search(r"main\(__doc__, (.*)\)\)$", ast.get_source_segment(script, last)).group(1)
    cells.append(("code", f'keep_freed_memory()\ncompare("{name}", {call})'))
    kind, imports = cells[1]
    imports = re.sub(r"^import sys\n+", "", imports.replace("import arrange, main", "import arrange, compare"))
    cells[1] = (kind, f"{imports}\n\nfrom ckpt_kernels.memory import keep_freed_memory")
    return cells


def notebook(name: str) -> str:
    """The notebook of an example, as the text of its file."""
    cells = cells_of(name, (EXAMPLES / f"{name}.py").read_text())
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    made = {
        "cells": [cell(kind, text, number) for number, (kind, text) in enumerate(cells)],
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(made, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for name in NAMES:
        (EXAMPLES / f"{name}.ipynb").write_text(notebook(name))

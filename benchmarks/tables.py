"""`python -m benchmarks.tables`: writes the tables of blocks in README.md and docs/floors.md, from the catalogue."""

import argparse
import itertools
import pathlib
import sys
from collections.abc import Callable, Iterable, Sequence

import torch

from ckpt_kernels.catalogue.block import Block
from ckpt_kernels.catalogue.blocks import ACTIVATION_BLOCKS, BLOCKS, DROPOUT_BLOCKS
from ckpt_kernels.catalogue.linear import PAIRS, Pair
from ckpt_kernels.levels import OF_FUNCTIONS
from ckpt_kernels.memory import saved_bytes

ROOT = pathlib.Path(__file__).parent.parent
BEGIN, END = "<!-- {}: by python -m benchmarks.tables -->\n", "<!-- end -->"
_WORDS = {"output 0": "output", "output 1": "r"}


def of_functions() -> list[Sequence[str]]:
    """The formula and the kept tensors of each function. If they depend on the activation, the usual case is first."""
    rows: list[Sequence[str]] = [("function", "computes", "keeps for backward")]
    for formula, blocks in _grouped((*BLOCKS, *ACTIVATION_BLOCKS), lambda block: block.formula):
        functions = dict.fromkeys(f"`{block.function}`" for block in blocks)
        by_kept = {kept: [b.options.get("activation", "") for b in own] for kept, own in _grouped(blocks, _kept)}
        usual, *others = sorted(by_kept, key=lambda kept: -len(by_kept[kept]))
        beside = "; ".join(f"{', '.join(dict.fromkeys(by_kept[kept]))}: {kept}" for kept in others)
        rows.append((", ".join(functions), formula, usual + (f" ({beside})" if beside else "")))
    for formula, pairs in _grouped(PAIRS, lambda pair: pair.formula):
        kept = [", ".join(pairs[0].kept[level]) for level in ("output", "all")]
        beside = f'; at `"all"` {kept[1]}' if kept[1] != kept[0] else ""
        rows.append((f"`{pairs[0].function}`", formula, kept[0] + beside))
    return rows


def level_of_blocks() -> list[Sequence[str]]:
    """The kept tensors in eager torch and in the block, and the traffic, for each block unlike the previous."""
    rows: list[Sequence[str]] = [
        ("block", "eager torch keeps", "kept", "forward, read + written", "backward, read + written")
    ]
    for figures, blocks in itertools.groupby((*BLOCKS, *DROPOUT_BLOCKS), _figures):
        rows.append((", ".join(block.name for block in blocks), *figures))
    return rows


def of_pairs() -> list[Sequence[str]]:
    """The kept tensors of each block with linear layers, in eager torch and at each level."""
    levels = [f'"{level}"' for level in OF_FUNCTIONS]
    rows: list[Sequence[str]] = [("block and linear layers", "eager torch keeps", *levels, 'kept at "output"')]
    for pair in PAIRS:
        units = [str(pair.units(level)) for level in OF_FUNCTIONS]
        rows.append((pair.name, _eager_keeps(pair), *units, ", ".join(pair.kept["output"])))
    return rows


# For each file, the functions that write the tables, by the name of the table.
TABLES: dict[str, dict[str, Callable[[], list[Sequence[str]]]]] = {
    "README.md": {"functions": of_functions},
    "docs/floors.md": {"blocks": level_of_blocks, "pairs": of_pairs},
}


def _grouped(blocks: Iterable, key: Callable) -> list[tuple[str, list]]:
    found: dict[str, list] = {}
    for block in blocks:
        found.setdefault(key(block), []).append(block)
    return list(found.items())


def _kept(block: Block) -> str:
    return ", ".join(_WORDS.get(name, name) for name in block.kept) or "nothing"


def _figures(block: Block) -> tuple[str, ...]:
    count = (2 if block.packed else 1) * len(set(block.kept).difference(block.samples, block.tables))
    kept = f"{count}: {_kept(block)}" if block.kept else "0"
    return _eager_keeps(block), kept, *(f"{read} + {written}" for read, written in (block.forward, block.backward))


def _eager_keeps(block: Block | Pair) -> str:
    """The kept bytes in eager torch, in tensors so large that statistics, tables and rows of samples do not count."""
    lead, columns = (2, 512), 128 if isinstance(block, Pair) else 512
    lead = (64, 32) if isinstance(block, Block) and block.tables else lead
    found = saved_bytes(block.eager, **block.operands(lead, columns, torch.float32, "cpu"))
    return f"{round(found / (lead[0] * lead[1] * columns * 4), 1):g}"


def markdown(rows: list[Sequence[str]]) -> str:
    head, *body = rows
    return "".join("| " + " | ".join(cells) + " |\n" for cells in (head, ["---"] * len(head), *body))


def parts(text: str, name: str) -> tuple[str, str, str]:
    """The text before a table, the table, and the text after it. Raises ValueError if there is no such table."""
    before, begin, rest = text.partition(BEGIN.format(name))
    table, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"there is no table {name!r}; expected one between {BEGIN.format(name).strip()} and {END}")
    return before + begin, table, end + after


def main() -> int:
    argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__).parse_args()
    for file, tables in TABLES.items():
        path = ROOT / file
        for name, rows in tables.items():
            before, _, after = parts(path.read_text(), name)
            path.write_text(before + markdown(rows()) + after)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What a conversion did, for people and programs."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Replaced:
    """A converted module: its name, the class it is of, and what it computes with now."""

    name: str
    kind: str
    by: str


@dataclass(frozen=True)
class LeftAlone:
    """A module that might have been converted and was not, and why."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What `convert` replaced in a model, and what it left alone."""

    recompute: str
    replaced: list[Replaced]
    left_alone: list[LeftAlone]

    def __str__(self) -> str:
        lines = [f"replaced, recompute={self.recompute!r}:" if self.replaced else "nothing was replaced"]
        lines += _table(
            (count, kind, "->", by, example) for (kind, by), count, example in _grouped(self.replaced, "by")
        )
        if self.left_alone:
            lines.append("left alone:")
            groups = _grouped(self.left_alone, "reason")
            lines += _table((count, kind, ":", reason, example) for (kind, reason), count, example in groups)
        return "\n".join(lines)


def _grouped(entries: list[Any], attribute: str) -> Iterator[tuple[tuple[str, str], str, str]]:
    """Each kind with each text: how many there are, and the name of the first."""
    counts = Counter((entry.kind, getattr(entry, attribute)) for entry in entries)
    for key, count in counts.items():
        first = next(e.name for e in entries if (e.kind, getattr(e, attribute)) == key)
        yield key, f"{count} x", first or "(the model itself)"


def _table(rows: Iterator[tuple[str, ...]]) -> list[str]:
    cells = list(rows)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells]

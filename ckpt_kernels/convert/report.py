"""What a conversion did, for people and programs."""

from collections.abc import Sequence
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
        rows = [
            (f"{len(entries)} x", kind, by, entries[0].name or "(the model itself)")
            for (kind, by), entries in _grouped(self.replaced, "by")
        ]
        if rows:
            lines += _table([("", "module", "computes with", "first"), *rows])
        if self.left_alone:
            lines.append("left alone:")
            groups = _grouped(self.left_alone, "reason")
            lines += _table(
                [(f"{len(es)} x", kind, reason, es[0].name or "(the model itself)") for (kind, reason), es in groups]
            )
        return "\n".join(lines)


def _grouped(entries: Sequence[Any], attribute: str) -> list[tuple[tuple[str, str], list[Any]]]:
    """The entries of each kind with each text."""
    groups: dict[tuple[str, str], list[Any]] = {}
    for entry in entries:
        groups.setdefault((entry.kind, getattr(entry, attribute)), []).append(entry)
    return list(groups.items())


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]

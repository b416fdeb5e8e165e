"""The report of a conversion: the modules that were replaced or left alone, as a table and as data."""

import html
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Replaced:
    """A converted module.

    Attributes:
        name: the module's name in the model.
        kind: the name of the module's class.
        by: the functions that the module computes with now.
    """

    name: str
    kind: str
    by: str


@dataclass(frozen=True)
class LeftAlone:
    """A module that looked convertible and was not converted, or not for all inputs.

    Attributes:
        name: the module's name in the model.
        kind: the name of the module's class.
        reason: why the module was left alone.
    """

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Report:
    """The modules of a model that `convert` replaced and left alone.

    Attributes:
        recompute: the level.
        backend: the backend that serves calls on the model's device.
        replaced: a `Replaced` for each converted module.
        left_alone: a `LeftAlone` for each module that looked convertible and was not converted.
        kept: the bytes that a forward pass keeps for backward, before and after the conversion; None where `convert`
            was given no inputs.
    """

    recompute: str
    backend: str
    replaced: list[Replaced]
    left_alone: list[LeftAlone]
    kept: tuple[int, int] | None = None

    def as_dict(self) -> dict[str, Any]:
        """The report as nested dicts and lists."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"recompute={self.recompute!r}, served by the {self.backend} backend{_COST.get(self.backend, '')}"]
        lines.append("replaced:" if self.replaced else f"nothing was replaced{self._why_nothing()}")
        if self.replaced:
            lines += in_columns([("", "module", "computes with", "first"), *self._rows(self.replaced, "by")])
        if self.left_alone:
            lines += ["left alone:", *in_columns(self._rows(self.left_alone, "reason"))]
        if self.kept is not None:
            before, after = self.kept
            ratio = f" ({after / before:.2f})" if before else ""
            lines.append(f"kept for backward, measured: {before:,} -> {after:,} bytes{ratio}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """The report as HTML tables, for notebooks."""
        head = str(self).partition("\n")[0]
        parts = [f"<p>{html.escape(head)}</p>"]
        for title, entries, attribute in (
            ("replaced", self.replaced, "by"),
            ("left alone", self.left_alone, "reason"),
        ):
            if entries:
                rows = "".join(
                    "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
                    for row in self._rows(entries, attribute)
                )
                parts.append(f"<table><caption>{title}</caption>{rows}</table>")
        if self.kept is not None or not self.replaced:
            last = f"nothing was replaced{self._why_nothing()}" if not self.replaced else str(self).rpartition("\n")[2]
            parts.append(f"<p>{html.escape(last)}</p>")
        return "".join(parts)

    def _why_nothing(self) -> str:
        if self.left_alone:
            return "; the reasons are below"
        return ": it has no norm, activation, dropout, gate or MLP that ours compute"

    @staticmethod
    def _rows(entries: Sequence[Any], attribute: str) -> list[tuple[str, ...]]:
        """One row for all entries of the same kind and text: their number, kind, text, and the first name."""
        groups: dict[tuple[str, str], list[Any]] = {}
        for entry in entries:
            groups.setdefault((entry.kind, getattr(entry, attribute)), []).append(entry)
        return [(f"{len(es)} x", *key, es[0].name or "(the model itself)") for key, es in groups.items()]


_COST = {"reference": ", which is plain torch: right, but no faster than the model was"}


def in_columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The lines of a table without rules, indented by two spaces."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]

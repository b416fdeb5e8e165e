"""What a conversion did, for people and programs."""

import html
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Replaced:
    """A converted module.

    Attributes:
        name: of the module.
        kind: the name of its class.
        by: what the module computes with now.
    """

    name: str
    kind: str
    by: str


@dataclass(frozen=True)
class LeftAlone:
    """A module that might have been converted and was not, or not in all cases.

    Attributes:
        name: of the module.
        kind: the name of its class.
        reason: why.
    """

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What `convert` replaced in a model, and what it left alone.

    Attributes:
        recompute: the level.
        backend: the backend that serves the calls of the model's device.
        replaced: a `Replaced` for each converted module.
        left_alone: a `LeftAlone` for each module that might have been converted and was not.
        kept: bytes kept for backward by a forward pass of the inputs that `convert` was given, before and after; None
            where it was given none.
    """

    recompute: str
    backend: str
    replaced: list[Replaced]
    left_alone: list[LeftAlone]
    kept: tuple[int, int] | None = None

    def as_dict(self) -> dict[str, Any]:
        """All of it as data."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"recompute={self.recompute!r}, served by the {self.backend} backend{_COST.get(self.backend, '')}"]
        lines.append("replaced:" if self.replaced else f"nothing was replaced{self._why_nothing()}")
        if self.replaced:
            lines += _lines([("", "module", "computes with", "first"), *self._rows(self.replaced, "by")])
        if self.left_alone:
            lines += ["left alone:", *_lines(self._rows(self.left_alone, "reason"))]
        if self.kept is not None:
            before, after = self.kept
            ratio = f" ({after / before:.2f})" if before else ""
            lines.append(f"kept for backward, measured: {before:,} -> {after:,} bytes{ratio}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """For notebooks: the same as tables."""
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
        """A row for the entries of each kind with each text: how many, and the first of them."""
        groups: dict[tuple[str, str], list[Any]] = {}
        for entry in entries:
            groups.setdefault((entry.kind, getattr(entry, attribute)), []).append(entry)
        return [(f"{len(es)} x", *key, es[0].name or "(the model itself)") for key, es in groups.items()]


_COST = {"reference": ", which is plain torch: right, but no faster than the model was"}


def _lines(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]

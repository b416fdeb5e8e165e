"""Compares two runs of the benchmarks, and finds the times that changed by more than the noise of both."""

import json
import pathlib
from dataclasses import dataclass
from typing import Any

_KEY = ("case", "shape", "dtype", "provider")
# Medians on one machine vary by this fraction from run to run, even if each run is quiet.
_FROM_RUN_TO_RUN = 0.05


@dataclass(frozen=True)
class Move:
    """A provider's time for a block in both runs; the ratio may differ from 1 by `noise` by chance."""

    name: str
    before_ms: float
    now_ms: float
    noise: float
    copy_ratio: float

    @property
    def ratio(self) -> float:
        return self.now_ms / self.before_ms

    @property
    def beyond_noise(self) -> bool:
        return max(self.ratio, 1 / self.ratio) > 1 + self.noise

    def cells(self) -> list[str]:
        """One row of a table with `COLUMNS`."""
        return [
            self.name,
            f"{self.before_ms:.3f}",
            f"{self.now_ms:.3f}",
            f"{self.ratio:.2f}",
            f"{self.noise:.2f}",
            f"{self.copy_ratio:.2f}",
        ]


COLUMNS = ["block", "before ms", "now ms", "now / before", "noise", "copy, now / before"]


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """The results in an earlier run's results.json. Raises ValueError for any other file."""
    try:
        results = json.loads(path.read_text())["results"]
        for result in results:
            _ = [result[key] for key in (*_KEY, "total_ms", "copy_ms")]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not the results.json of a run of these benchmarks: {error!r}") from error
    return results


def moves(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[Move]:
    """The changes of every block and provider in both runs, the greatest slowdown first.

    The noise is three times the spreads of both runs (half the distance between the quartiles, over the median), plus
    the variation of medians from run to run.
    """
    earlier = {tuple(result[key] for key in _KEY): result for result in before}
    found = []
    for result in now:
        key = tuple(result[key] for key in _KEY)
        if key in earlier:
            old = earlier[key]
            noise = _FROM_RUN_TO_RUN + 3 * (old.get("spread", 0.0) + result.get("spread", 0.0))
            copy_ratio = result["copy_ms"] / old["copy_ms"]
            found.append(Move(" ".join(key), old["total_ms"], result["total_ms"], noise, copy_ratio))
    return sorted(found, key=lambda move: -move.ratio)

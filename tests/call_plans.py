"""Calls with and without plans, for the tests of small calls."""

import contextlib
from collections.abc import Iterator

import pytest

from ckpt_kernels import thin
from ckpt_kernels.thin import plan, plan_cache


@contextlib.contextmanager
def full_path() -> Iterator[None]:
    """Context in which no call uses a plan."""
    key = plan_cache.key
    plan_cache.key = lambda *call: None
    try:
        yield
    finally:
        plan_cache.key = key


class Counted:
    """Counts the calls that found a plan, and those that the plan refused."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found = self.refused = 0
        plan_of, refused = plan_cache.plan_of, plan.Plan.fall_back

        def counted(*call: object) -> object:
            found = plan_of(*call)
            self.found += found is not None
            return found

        def counted_refusal(*arguments: object) -> object:
            self.refused += 1
            return refused(*arguments)

        monkeypatch.setattr(thin, "plan_of", counted)
        monkeypatch.setattr(plan.Plan, "fall_back", counted_refusal)

    @property
    def served(self) -> int:
        return self.found - self.refused

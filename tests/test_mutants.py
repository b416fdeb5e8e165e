"""Every fault of the table is one that its file can have: what it replaces is there, once."""

import pathlib

import pytest

from .mutants.mutant import Mutant
from .mutants.table import MUTANTS

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_fault_applies(mutant: Mutant) -> None:
    before, original, after = mutant.parts((ROOT / mutant.file).read_text())
    assert original and before + mutant.replace + after != before + original + after

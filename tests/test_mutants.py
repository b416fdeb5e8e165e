"""Every mutant of the table applies: the replaced text occurs once in the file."""

import pathlib

import pytest

from .mutants.mutant import Mutant
from .mutants.table import MUTANTS

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_applies(mutant: Mutant) -> None:
    before, original, after = mutant.parts((ROOT / mutant.file).read_text())
    assert original and before + mutant.replace + after != before + original + after

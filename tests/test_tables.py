"""The tables of blocks in README and docs equal those made from the catalogue."""

import pytest
import torch

pytest.importorskip("rich", reason="rich is not installed")

from benchmarks import tables

FILES = [(file, name) for file, of_file in tables.TABLES.items() for name in of_file]
# The torch version of the figures for eager torch in docs/floors.md.
MEASURED = "2.13."


@pytest.mark.parametrize(("file", "name"), FILES)
def test_tables_are_up_to_date(file: str, name: str) -> None:
    text = (tables.ROOT / file).read_text()
    written = [line.strip("|\n").split(" | ") for line in tables.parts(text, name)[1].splitlines()]
    made = [line.strip("|\n").split(" | ") for line in tables.markdown(tables.TABLES[file][name]()).splitlines()]
    if "eager torch keeps" in made[0]:
        assert f"torch {MEASURED.rstrip('.')}" in text
        if not torch.__version__.startswith(MEASURED):
            written, made = ([[*row[:1], *row[2:]] for row in rows] for rows in (written, made))
    assert made == written, "python -m benchmarks.tables writes it anew"


def test_a_missing_table_is_an_error() -> None:
    with pytest.raises(ValueError, match="there is no table 'blocks'; expected one between <!-- blocks"):
        tables.parts("# Floors", "blocks")

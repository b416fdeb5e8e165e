"""The tables of blocks in README and docs say what the catalogue says."""

import pytest
import torch

pytest.importorskip("rich", reason="rich is not installed")

from benchmarks import tables

FILES = [(file, name) for file, of_file in tables.TABLES.items() for name in of_file]
# That whose figures of eager torch are in docs/floors.md.
MEASURED = "2.13."


@pytest.mark.parametrize(("file", "name"), FILES)
def test_a_table_is_what_the_catalogue_says(file: str, name: str) -> None:
    text = (tables.ROOT / file).read_text()
    written = [line.strip("|\n").split(" | ") for line in tables.parts(text, name)[1].splitlines()]
    made = [line.strip("|\n").split(" | ") for line in tables.markdown(tables.TABLES[file][name]()).splitlines()]
    if "eager torch keeps" in made[0]:
        assert f"torch {MEASURED.rstrip('.')}" in text
        if not torch.__version__.startswith(MEASURED):
            written, made = ([[*row[:1], *row[2:]] for row in rows] for rows in (written, made))
    assert made == written, "python -m benchmarks.tables writes it anew"


def test_where_no_table_stands_it_is_said() -> None:
    with pytest.raises(ValueError, match="there is no table 'blocks'; expected one between <!-- blocks"):
        tables.parts("# Floors", "blocks")

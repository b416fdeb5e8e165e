"""Every Triton kernel that the launch tables choose, compiled for real: nothing spilled, accesses of 16 bytes."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = pathlib.Path(__file__).parent.parent
# One length of row for each kind of tile: packed, one row, the widest, and walked in blocks.
COLUMNS = "64,1024,8192,32768"


def compiled_for(target: str, cache: pathlib.Path) -> dict[str, dict]:
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.triton_resources", target, COLUMNS],
        cwd=ROOT,
        env=inherited | {"TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_no_spills_and_full_width_accesses(arch: str, tmp_path: pathlib.Path) -> None:
    found = compiled_for(f"cuda:{arch}", tmp_path)
    assert len(found) == (10 + 12 + 8) * 4 * 2
    for name, used in found.items():
        assert used["STACK"] == 0 and used["LOCAL"] == 0, (name, used)
        assert 16 in used["widths"], (name, used)
        # Statistics are single numbers, a dropout seed is eight bytes, and long bfloat16 rows are read beside
        # float32 partial sums in the layout of these.
        assert set(used["widths"]) <= {4, 8, 16}, (name, used)


def test_compiles_for_amd(tmp_path: pathlib.Path) -> None:
    found = compiled_for("hip:gfx942", tmp_path)
    assert found and all(used["binary"] > 0 for used in found.values())

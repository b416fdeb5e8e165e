"""`python -m tests.fuzz`: random calls, as in `tests/test_fuzz.py`, for a given time."""

import argparse
import sys
import time

import hypothesis

from ckpt_kernels import backends

from .calls import Call, calls
from .conftest import DEVICE
from .test_fuzz import check

BATCH = 200


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600, help="for how long (default: ten minutes)")
    parser.add_argument("--seed", type=int, default=0, help="of the first batch (default: 0)")
    options = parser.parse_args()
    counts = {"calls": 0, "nonsense": 0}

    def counted(call: Call) -> None:
        counts["calls"] += 1
        counts["nonsense"] += call.nonsense is not None
        check(call)

    start, seed = time.monotonic(), options.seed
    while time.monotonic() - start < options.seconds:
        batch = hypothesis.seed(seed)(hypothesis.given(calls())(lambda call: counted(call)))
        quiet = list(hypothesis.HealthCheck)
        hypothesis.settings(
            max_examples=BATCH, deadline=None, derandomize=False, database=None, suppress_health_check=quiet
        )(batch)()
        seed += 1
        elapsed = time.monotonic() - start
        print(f"\r{elapsed:6.0f} s  {counts['calls']} calls ({counts['nonsense']} with nonsense), seed {seed}", end="")
    by = f"{backends.selected_name(DEVICE)} on {DEVICE}"
    print(f"\n{counts['calls']} calls, served by {by}: none differed from the reference, crashed or changed anything")
    return 0


if __name__ == "__main__":
    sys.exit(main())

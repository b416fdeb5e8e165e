"""`python -m tests.programs`: runs generated programs on a model and a converted twin.

With --seed, runs one program and prints the source and the differences. Otherwise runs many programs and prints a
summary of the failures.
"""

import argparse
import collections
import sys
import tempfile
import time
import warnings
from pathlib import Path

import ckpt_kernels

from .actions import LEVELS
from .grammar import write
from .runner import Result, run
from .shrink import shrunk


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.programs", description=__doc__)
    parser.add_argument("--seed", type=int, help="run this program only")
    parser.add_argument(
        "--level", choices=LEVELS, help="recompute level (default: all three for one program, or in turn)"
    )
    parser.add_argument("--start", type=int, default=0, help="the first seed of many (default: 0)")
    parser.add_argument("--count", type=int, default=1000, help="how many programs (default: 1000)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--shrink", action="store_true", help="make failing programs smaller before they are printed")
    parser.add_argument(
        "--strict", action="store_true", help="a write that is an error in eager torch must be an error"
    )
    parser.add_argument("--verbose", action="store_true", help="print the sources of failing programs")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        return _one(options, Path(folder)) if options.seed is not None else _many(options, Path(folder))


def _one(options: argparse.Namespace, folder: Path) -> int:
    failed = 0
    for level in [options.level] if options.level else LEVELS:
        result = run(write(options.seed), level, folder)
        if result.differences and options.shrink:
            result = shrunk(result, folder, ckpt_kernels.convert)
        failed += _fails(result, options.strict)
        print(result, end="\n\n")
        print(f"# {result.replaced} modules replaced; eager torch raised: {', '.join(result.raised) or 'nothing'}\n")
    return min(failed, 1)


def _many(options: argparse.Namespace, folder: Path) -> int:
    counts: collections.Counter[str] = collections.Counter()
    failed: dict[str, list[str]] = collections.defaultdict(list)
    start = time.monotonic()
    for seed in range(options.start, options.start + options.count):
        if time.monotonic() - start > options.seconds:
            break
        result = run(write(seed), options.level or LEVELS[seed % 3], folder)
        counts["programs"] += 1
        counts["raise in eager"] += bool(result.raised)
        counts["have replacements"] += bool(result.replaced)
        counts["more lenient than eager"] += result.lenient
        if _fails(result, options.strict):
            counts["failed"] += 1
            first = result.differences[0] if result.differences else "eager raised, converted did not"
            failed[first.partition("[")[0].partition(":")[0]].append(f"{seed}/{result.level}")
            if options.verbose:
                if options.shrink and result.differences:
                    result = shrunk(result, folder, ckpt_kernels.convert)
                print(f"\n{result}\n")
        progress = ", ".join(f"{count} {what}" for what, count in counts.items())
        print(f"\r{time.monotonic() - start:6.0f} s  {progress}, seed {seed}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print(", ".join(f"{count} {what}" for what, count in counts.items()))
    for what, seeds in sorted(failed.items(), key=lambda pair: -len(pair[1])):
        print(f"  {len(seeds):4} differ first in {what}: {' '.join(seeds)}")
    return 1 if failed else 0


def _fails(result: Result, strict: bool) -> bool:
    return bool(result.differences) or (strict and result.lenient)


if __name__ == "__main__":
    sys.exit(main())

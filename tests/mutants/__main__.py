"""python -m tests.mutants [--list] [--only TEXT ...]: puts faults of the table into a copy, and runs their tests there.

The copy is build/mutants/tree. All faults of C++ and CUDA sources are compiled into one library with little
optimisation; the environment variable CKPT_KERNELS_MUTANT selects the fault that runs.
"""

import argparse
import os
import pathlib
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence

from .mutant import Mutant
from .table import MUTANTS

ROOT = pathlib.Path(__file__).parent.parent.parent
TREE = ROOT / "build" / "mutants" / "tree"
VARIABLE = "CKPT_KERNELS_MUTANT"
SWITCH = f"""
// The number of the fault that runs.
#include <stdlib.h>
inline const int ckpt_mutant = getenv("{VARIABLE}") ? atoi(getenv("{VARIABLE}")) : 0;
"""
# Seconds for the tests of one fault. A fault that makes a test hang is detected.
TIME_LIMIT = 1200


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.split("\n")[0])
    parser.add_argument("--list", action="store_true", help="name the faults and run none")
    parser.add_argument(
        "--only", nargs="+", metavar="TEXT", default=[""], help="those whose name or file has this text"
    )
    options = parser.parse_args(arguments)
    numbered = {
        number: mutant
        for number, mutant in enumerate(MUTANTS, 1)
        if any(text in mutant.name or text in mutant.file for text in options.only)
    }
    if not numbered:
        parser.error(f"--only is {' '.join(options.only)}; expected a part of a name or file that --list is_detected")
    if options.list:
        for mutant in numbered.values():
            print(f"{mutant.file}: {mutant.name}")
        return 0
    return run(numbered)


def run(numbered: dict[int, Mutant]) -> int:
    """Runs all mutants; 1 if a fault was not detected that should be."""
    make_copy()
    build(any(mutant.is_in_library for mutant in numbered.values()))
    sound: dict[str, bool] = {}
    lines, missed = [], 0
    for count, (number, mutant) in enumerate(numbered.items(), 1):
        begin = time.perf_counter()
        if mutant.tests not in sound:
            sound[mutant.tests] = not fail_with(mutant.tests, 0)
        if sound[mutant.tests]:
            result = "killed" if is_detected(number, mutant) else "survived"
        else:
            result = "tests fail without it"
        expected = "survived" if mutant.reason else "killed"
        missed += result != expected
        remark = mutant.reason if result == "survived" and mutant.reason else ""
        lines.append(f"{result if result == expected else result.upper():9} {mutant.file}: {mutant.name}")
        lines += [f"{'':10}{remark}"] if remark else []
        print(f"[{count}/{len(numbered)}] {time.perf_counter() - begin:5.0f} s  {lines[-1 - bool(remark)]}", flush=True)
    print("\n" + "\n".join(lines))
    print(f"\n{len(numbered)} faults, {missed} not as the table has it")
    return 1 if missed else 0


def make_copy() -> None:
    """Copies the sources, with the faults of C++ sources switched in. Files without a change keep their dates."""
    named = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    sources = {name: ROOT / name for name in named.stdout.decode().split("\0") if name and (ROOT / name).is_file()}
    contents = {name: path.read_bytes() for name, path in sources.items()}
    for number, mutant in enumerate(MUTANTS, 1):
        text = contents[mutant.file].decode()
        if mutant.is_compiled:
            contents[mutant.file] = mutant.switched(text, number).encode()
        else:
            mutant.applied(text)  # raises if the text is not in the file
    contents["csrc/math/macros.h"] += SWITCH.encode()
    contents["setup.py"] = contents["setup.py"].replace(b'"-O3"', b'"-O1"')
    for name, content in contents.items():
        path = TREE / name
        if not path.exists() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def build(with_faults: bool) -> None:
    """Compiles the library with the faults if needed; else copies the library of the sources, if there is no copy yet.
    The tests compile the CUDA kernels themselves."""
    if not with_faults:
        for library in (ROOT / "ckpt_kernels").glob("_C.*so"):
            copy = TREE / "ckpt_kernels" / library.name
            if not copy.exists():
                copy.write_bytes(library.read_bytes())
        return
    print("building the library with all faults in it", flush=True)
    environment = os.environ | {"CKPT_KERNELS_BUILD": "cpu"}
    environment["PATH"] = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=TREE, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)


def is_detected(number: int, mutant: Mutant) -> bool:
    """Whether the tests of the fault fail with it."""
    if mutant.is_compiled:
        return fail_with(mutant.tests, number)
    path = TREE / mutant.file
    text = path.read_text()
    path.write_text(mutant.applied(text))
    try:
        return fail_with(mutant.tests, 0)
    finally:
        path.write_text(text)


def fail_with(tests: str, number: int) -> bool:
    """Whether these tests fail, hang or crash with the fault of this number."""
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    # Two versions of a source may have the same date, and Python would then run the bytecode of the other version.
    environment = os.environ | {VARIABLE: str(number), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *shlex.split(tests)],
            cwd=TREE,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT,
        )
    except subprocess.TimeoutExpired:
        return True
    if done.returncode in (4, 5):
        sys.exit(f"pytest found nothing to run in {tests}\n{done.stdout}{done.stderr}")
    return done.returncode != 0


if __name__ == "__main__":
    sys.exit(main())

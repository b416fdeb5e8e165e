"""python -m tests.mutants [--list] [--only TEXT ...]: puts faults of the table into a copy, and runs their tests there.

The copy is build/mutants/tree. Faults of C++ and CUDA sources are compiled into it together, each behind a number that
the process is told by CKPT_KERNELS_MUTANT, so that each library is built once, and without much optimisation.
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
// Which of the faults that are compiled in is the one to show.
#include <stdlib.h>
inline const int ckpt_mutant = getenv("{VARIABLE}") ? atoi(getenv("{VARIABLE}")) : 0;
"""
# Of one run of the tests of a fault; one that makes them hang is noticed.
LONGEST = 1200


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
        parser.error(f"--only is {' '.join(options.only)}; expected a part of a name or file that --list shows")
    if options.list:
        for mutant in numbered.values():
            print(f"{mutant.file}: {mutant.name}")
        return 0
    return run(numbered)


def run(numbered: dict[int, Mutant]) -> int:
    """Runs all; 1 if a fault was not noticed that should be."""
    make_copy()
    build(any(mutant.is_in_library for mutant in numbered.values()))
    sound: dict[str, bool] = {}
    lines, missed = [], 0
    for count, (number, mutant) in enumerate(numbered.items(), 1):
        begin = time.perf_counter()
        if mutant.tests not in sound:
            sound[mutant.tests] = not notices(mutant.tests, 0)
        if sound[mutant.tests]:
            result = "killed" if shows(number, mutant) else "survived"
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
    """The sources as they are, with all faults of C++ behind their numbers. What has not changed keeps its date."""
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
            mutant.applied(text)  # to see that it can be
    contents["csrc/math/macros.h"] += SWITCH.encode()
    contents["setup.py"] = contents["setup.py"].replace(b'"-O3"', b'"-O1"')
    for name, content in contents.items():
        path = TREE / name
        if not path.exists() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def build(with_faults: bool) -> None:
    """The compiled library, where one with the faults is needed; else that of the sources will do, or an earlier one.
    The tests build the kernels of CUDA themselves."""
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


def shows(number: int, mutant: Mutant) -> bool:
    """Whether the tests notice the fault."""
    if mutant.is_compiled:
        return notices(mutant.tests, number)
    path = TREE / mutant.file
    text = path.read_text()
    path.write_text(mutant.applied(text))
    try:
        return notices(mutant.tests, 0)
    finally:
        path.write_text(text)


def notices(tests: str, number: int) -> bool:
    """Whether these tests fail with the fault of this number, or hang, or crash."""
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    # Two states of a source may have one date, by which Python would take the bytecode of one for the other's.
    environment = os.environ | {VARIABLE: str(number), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *shlex.split(tests)],
            cwd=TREE,
            env=environment,
            capture_output=True,
            text=True,
            timeout=LONGEST,
        )
    except subprocess.TimeoutExpired:
        return True
    if done.returncode in (4, 5):
        sys.exit(f"pytest found nothing to run in {tests}\n{done.stdout}{done.stderr}")
    return done.returncode != 0


if __name__ == "__main__":
    sys.exit(main())

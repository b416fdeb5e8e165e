"""Every header of csrc compiles by itself: it includes all headers that it uses."""

import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parent.parent
CSRC = ROOT / "csrc"


def includes(path: pathlib.Path) -> list[str]:
    """The names of a file's includes, in order, with quotes or brackets."""
    return [line.split()[1] for line in path.read_text().splitlines() if line.startswith("#include")]


def first_includes(path: pathlib.Path) -> set[pathlib.Path]:
    """The header that a file includes first, the header that this header includes first, and so on."""
    first = next(iter(includes(path)), "")
    if not first.startswith('"'):
        return set()
    header = (path.parent / first.strip('"')).resolve()
    return {header} | first_includes(header)


def includes_torch(header: pathlib.Path) -> bool:
    """Whether a header includes torch's headers, directly or indirectly."""
    return any(
        name.startswith("<torch/") or (name.startswith('"') and includes_torch(header.parent / name.strip('"')))
        for name in includes(header)
    )


# The build compiles the header that a source includes first by itself. launcher.cuh needs CUDA's headers.
BUILT = set().union(*(first_includes(source) for source in CSRC.rglob("*.cpp")))
HEADERS = [path for path in sorted(CSRC.rglob("*.*h")) if path not in BUILT and path.name != "launcher.cuh"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
@pytest.mark.parametrize("header", HEADERS, ids=lambda path: str(path.relative_to(CSRC)))
def test_a_header_compiles_by_itself(header: pathlib.Path) -> None:
    options = [
        "-std=c++17",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        "-Wno-unused-parameter",
        "-Wno-psabi",
        "-Werror",
    ]
    if header.parent.name == "cuda":
        # In place of CUDA's headers, which may be missing.
        options += ["-include", "tests/host/cuda_on_host.h", "-Wno-unknown-pragmas", "-Wno-sign-compare"]
    if includes_torch(header):
        from torch.utils import cpp_extension

        options += [option for path in cpp_extension.include_paths() for option in ("-isystem", path)]
        options += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA"]
    done = subprocess.run(
        ["g++", *options, "-fsyntax-only", "-I", str(ROOT), "-x", "c++", "-"],
        input=f'#include "{header.relative_to(ROOT)}"\n',
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr

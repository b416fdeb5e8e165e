"""Every header of csrc compiles by itself: it includes what it uses, whatever was included before it."""

import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parent.parent
CSRC = ROOT / "csrc"
# launcher.cuh takes CUDA's own headers. The other CUDA headers take what tests/host/cuda_on_host.h has in their place.
HEADERS = [path for path in sorted(CSRC.rglob("*.*h")) if path.name != "launcher.cuh"]


def takes_torch(header: pathlib.Path, seen: frozenset[pathlib.Path] = frozenset()) -> bool:
    """Whether a header includes torch's, by itself or by others."""
    included = [line.split()[1] for line in header.read_text().splitlines() if line.startswith("#include")]
    own = [(header.parent / name.strip('"')).resolve() for name in included if name.startswith('"')]
    return any(name.startswith("<torch/") for name in included) or any(
        takes_torch(path, seen | {header}) for path in own if path not in seen
    )


def syntax_only(headers: list[pathlib.Path], *options: str) -> str:
    """What the compiler says of each header, included by itself."""
    said = ""
    for header in headers:
        command = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-psabi", "-Werror", *options]
        source = f'#include "{header.relative_to(ROOT)}"\n'
        done = subprocess.run(
            [*command, "-fsyntax-only", "-I", str(ROOT), "-x", "c++", "-"],
            input=source,
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        said += done.stderr
    return said


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
@pytest.mark.parametrize("folder", [".", "math", "cpu", "cuda"])
def test_headers_compile_by_themselves(folder: str) -> None:
    headers = [path for path in HEADERS if path.parent == (CSRC / folder).resolve() and not takes_torch(path)]
    assert headers
    shim = ["-include", "tests/host/cuda_on_host.h", "-Wno-unknown-pragmas", "-Wno-sign-compare"] * (folder == "cuda")
    assert syntax_only(headers, *shim) == ""


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_headers_that_take_torch_compile_by_themselves() -> None:
    from torch.utils import cpp_extension

    headers = [path for path in HEADERS if takes_torch(path)]
    assert {"row_tasks.h", "row_norm_ops.h"} <= {path.name for path in headers}
    torch_headers = [option for path in cpp_extension.include_paths() for option in ("-isystem", path)]
    assert syntax_only(headers, *torch_headers, "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA") == ""

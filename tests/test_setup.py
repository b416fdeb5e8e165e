"""How the C++ sources are built: by which compilers, and what setup.py says where something is missing."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# Runs setup.py in a Python that does not find torch.
WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None
sys.argv = ["setup.py", "--version"]
runpy.run_path("setup.py", run_name="__main__")
"""


def run(build: str, program: str = WITHOUT_TORCH, **variables: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"CKPT_KERNELS_BUILD": build} | variables
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("build", ["auto", "cpu", "cuda"])
def test_without_torch_it_says_what_to_install(build: str) -> None:
    done = run("" if build == "auto" else build)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "compiled against torch, which cannot be imported here" in done.stderr
    assert "pip install 'torch>=2.11'" in done.stderr and "CKPT_KERNELS_BUILD=none" in done.stderr


@pytest.mark.parametrize("error", ["OSError('libtorch_cpu.so: not found')", "ImportError('undefined symbol')"])
def test_with_a_torch_that_does_not_load_it_says_what_to_install(error: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(f"raise {error}\n")
    program = WITHOUT_TORCH.replace('sys.modules["torch"] = None', f"sys.path.insert(0, {str(tmp_path)!r})")
    done = run("cpu", program)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert error.replace("('", ": ").replace("')", "") in done.stderr
    assert "pip install --force-reinstall 'torch>=2.11'" in done.stderr


def test_nothing_is_needed_where_nothing_is_built() -> None:
    from ckpt_kernels import __version__

    done = run("none")
    assert done.returncode == 0 and done.stdout.split()[-1] == __version__


def test_without_a_compiler_it_says_so() -> None:
    done = run("cpu", PATH="/nowhere", CXX="")
    assert done.returncode == 1 and "no C++ compiler was found" in done.stderr


@pytest.mark.parametrize("source", ["isa_generic", "isa_avx512"])
@pytest.mark.parametrize("compiler", ["g++", "clang++", "aarch64-linux-gnu-g++"])
def test_the_loops_have_no_warnings(compiler: str, source: str) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no {compiler}")
    warnings = ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-psabi", "-Wno-unknown-pragmas", "-Werror"]
    if compiler != "clang++":
        # GCC 12 warns of its own intrinsics headers.
        warnings += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    command = [compiler, "-std=c++17", *warnings, "-fsyntax-only", f"csrc/cpu/{source}.cpp"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

"""The build of the C++ sources: compilers, flags, and messages of setup.py if something is missing."""

import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from torch.utils import cpp_extension

from ckpt_kernels.libraries import library

ROOT = pathlib.Path(__file__).parent.parent
# The lines that install packages before a wheel is built or tested.
WHEELS = re.compile(r"(?m)^before-build = .*(?:\n.*)*?^before-test = .*$")
# Runs setup.py in a Python without torch.
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
def test_a_missing_torch_is_a_named_error(build: str) -> None:
    done = run("" if build == "auto" else build)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "compiled against torch, which cannot be imported here" in done.stderr
    assert "pip install 'torch>=2.11'" in done.stderr and "CKPT_KERNELS_BUILD=none" in done.stderr


@pytest.mark.parametrize("error", ["OSError('libtorch_cpu.so: not found')", "ImportError('undefined symbol')"])
def test_a_torch_that_does_not_load_is_a_named_error(error: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(f"raise {error}\n")
    program = WITHOUT_TORCH.replace('sys.modules["torch"] = None', f"sys.path.insert(0, {str(tmp_path)!r})")
    done = run("cpu", program)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert error.replace("('", ": ").replace("')", "") in done.stderr
    assert "pip install --force-reinstall 'torch>=2.11'" in done.stderr


def test_a_build_of_nothing_needs_no_torch() -> None:
    from ckpt_kernels import __version__

    done = run("none")
    assert done.returncode == 0 and done.stdout.split()[-1] == __version__


def test_a_missing_compiler_is_a_named_error() -> None:
    done = run("cpu", PATH="/nowhere", CXX="")
    assert done.returncode == 1 and "no C++ compiler was found" in done.stderr


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, after it has printed the version."""
    monkeypatch.setenv("CKPT_KERNELS_BUILD", "none")
    monkeypatch.setattr(sys, "argv", ["setup.py", "-q", "--version"])
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("ckpt_kernels_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_windows_uses_clang_and_its_flags(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    here = setup.cxx_flags(cpp_extension)
    assert here[0] == "-std=c++17" and setup.compiler_runtime() == {}
    called = []
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(setup, "WINDOWS", True)
    monkeypatch.setattr(setup, "is_gcc", lambda: False)
    monkeypatch.setattr(setup.shutil, "which", lambda name: called.append(name) or f"C:/{name}.exe")
    assert setup.compiler() == "C:/clang-cl.exe" and set(called) == {"clang-cl"}
    there = setup.cxx_flags(cpp_extension)
    # All other flags are passed to clang unchanged.
    assert there[0] == "/std:c++17" and {"/clang:" + flag for flag in setup.MATH} <= set(there[1:])
    assert all(flag.startswith("/clang:-") for flag in there[1:])
    printed = subprocess.CompletedProcess([], 0, "C:/LLVM/lib/clang/22\n")
    monkeypatch.setattr(setup.subprocess, "run", lambda *args, **kwargs: printed)
    runtime = setup.compiler_runtime()
    assert runtime["libraries"] == ["clang_rt.builtins-x86_64"]
    assert pathlib.Path(runtime["library_dirs"][0]) == pathlib.Path("C:/LLVM/lib/clang/22/lib/windows")


def test_paths_of_the_build_and_of_torch_are_mapped(setup: ModuleType) -> None:
    torch_folder = pathlib.Path(torch.__file__).parent
    assert setup.path_maps(cpp_extension) == [
        f"-ffile-prefix-map={ROOT.resolve()}=.",
        f"-ffile-prefix-map={torch_folder}=torch",
    ]


def test_wheels_are_built_with_the_tested_torch() -> None:
    pinned = re.search(r"TORCH \?= (torch==\S+)", (ROOT / "Makefile").read_text()).group(1)
    installed = re.findall(r"\btorch\b[^\s\"']*", WHEELS.search((ROOT / "pyproject.toml").read_text()).group(0))
    assert installed == [pinned, pinned]


@pytest.mark.parametrize("name", ["_C.abi3.so", "_C.pyd"])
def test_libraries_are_found_with_any_systems_suffix(name: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / name).touch()
    assert library("_C", tmp_path) == tmp_path / name
    assert library("_C_cuda", tmp_path) is None


@pytest.mark.parametrize("source", ["isa_generic", "isa_avx512", "isa_avx512_bf16"])
@pytest.mark.parametrize("compiler", ["g++", "clang++", "aarch64-linux-gnu-g++"])
def test_the_loops_have_no_warnings(compiler: str, source: str) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no {compiler}")
    warnings = ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-psabi", "-Wno-unknown-pragmas", "-Werror"]
    if compiler != "clang++":
        # GCC 12 has warnings in its own headers of intrinsics.
        warnings += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    command = [compiler, "-std=c++17", *warnings, "-fsyntax-only", f"csrc/cpu/{source}.cpp"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

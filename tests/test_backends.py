"""The choice of a backend, missing backends, instruction sets, and the findings of doctor."""

import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator

import pytest
import torch

import ckpt_kernels
from ckpt_kernels import backends, functional, set_backend, use_backend
from ckpt_kernels.backends import native
from ckpt_kernels.thin import direct

from .interrupts import interrupted_at_every_step

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = pathlib.Path(ckpt_kernels.__file__).parent

CALL = """
import torch, ckpt_kernels
x = torch.randn(4, 8, requires_grad=True)
ckpt_kernels.functional.layer_norm(x, 8, activation="silu").sum().backward()
from ckpt_kernels import backends
print(backends.selected_name("cpu"))
"""


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    inherited = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "CKPT_KERNELS_BACKEND")}
    settings = inherited | {"PYTHONPATH": str(ROOT)} | environment
    # In another folder than the checkout, whose package Python would import before the package in PYTHONPATH.
    return subprocess.run(
        [sys.executable, *command], cwd=tempfile.gettempdir(), env=settings, capture_output=True, text=True, timeout=300
    )


def test_use_backend_as_a_context_and_as_a_call() -> None:
    before = backends.selected_name("cpu")
    with use_backend("reference"):
        assert backends.selected_name("cpu") == "reference"
        with use_backend("native"):
            assert backends.selected_name("cpu") == "native"
        assert backends.selected_name("cpu") == "reference"
    assert backends.selected_name("cpu") == before
    set_backend("reference")
    assert backends.selected_name("cpu") == "reference"
    set_backend("auto")
    assert backends.selected_name("cpu") == before


def test_nothing_changes_before_the_context_is_entered() -> None:
    before = backends.chosen()
    prepared = use_backend("reference")
    assert backends.chosen() == before
    for _ in range(2):
        with prepared:
            assert backends.chosen() == "reference"
        assert backends.chosen() == before
    with pytest.warns(UserWarning, match=r"'reference'\) was not entered.*call set_backend\('reference'\)"):
        use_backend("reference")
    assert backends.chosen() == before


def test_threads_choose_independently() -> None:
    """Four threads leave their contexts in the order in which they entered, so that the contexts overlap."""
    names = ("reference", "native", "auto", "reference")
    before, barrier = backends.chosen(), threading.Barrier(len(names))
    seen: list[tuple[str, str]] = []

    def work(index: int, name: str) -> None:
        context = use_backend(name)
        for turn in range(2 * len(names)):
            if turn == index:
                context.__enter__()
            if turn == index + len(names):
                context.__exit__(None, None, None)
            barrier.wait()
            inside = index <= turn < index + len(names)
            seen.append((name if inside else before, backends.chosen()))

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(names)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 32 and all(expected == found for expected, found in seen)
    assert backends.chosen() == before


def test_a_context_may_end_in_another_thread() -> None:
    def steps() -> Iterator[None]:
        with use_backend("reference"):
            yield

    before, generator = backends.chosen(), steps()
    next(generator)
    inside = backends.chosen()
    found: list[str] = []

    def close() -> None:
        with use_backend("native"):
            generator.close()
            found.append(backends.chosen())

    thread = threading.Thread(target=close)
    thread.start()
    thread.join()
    assert (inside, found, backends.chosen()) == ("reference", ["native"], before)


def test_an_interrupt_at_any_step_of_a_context_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    before, swallowed = backends.chosen(), []
    monkeypatch.setattr(sys, "unraisablehook", swallowed.append)

    def run() -> None:
        with use_backend("reference"):
            pass

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in interrupted_at_every_step(run):
            assert backends.chosen() == before, f"interrupted at step {step}"
    assert step > 20
    assert not swallowed


def test_a_backward_pass_uses_the_backend_of_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass runs in a thread without a choice, as autograd's threads for a GPU."""
    served: list[str] = []
    reference = backends.backend_module("reference")
    for name in ("row_norm_backward", "glu_backward"):
        inner = getattr(reference, name)
        monkeypatch.setattr(reference, name, lambda *a, inner=inner, name=name: (served.append(name), inner(*a))[1])
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    with use_backend("reference"):
        normed = functional.norm_linear(functional.layer_norm(x, 8), 8, None, None, w)
        loss = functional.glu(normed, normed).sum()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert sorted(served) == ["glu_backward", "row_norm_backward", "row_norm_backward"]


def test_unknown_and_unavailable_backends_are_errors() -> None:
    with pytest.raises(ValueError, match="backend is 'cudnn'; expected one of auto, triton, native, reference"):
        use_backend("cudnn")
    assert run("-c", CALL, CKPT_KERNELS_BACKEND="cudnn").stderr.count("CKPT_KERNELS_BACKEND is 'cudnn'") == 1
    failed = run("-c", "import ckpt_kernels; ckpt_kernels.use_backend('triton')")
    if not torch.cuda.is_available():
        assert "backend 'triton' is not available: on cpu: Triton has no code generator for cpu" in failed.stderr
        with use_backend("triton"), pytest.raises(RuntimeError, match=r"does not compute in torch\.float64"):
            functional.layer_norm(torch.randn(2, 4, dtype=torch.float64), 4)


@pytest.mark.parametrize("name", ["native", "reference"])
def test_the_environment_variable_selects_the_backend(name: str) -> None:
    assert run("-c", CALL, CKPT_KERNELS_BACKEND=name).stdout.strip() == name


def test_works_without_triton() -> None:
    hidden = "import sys; sys.modules['triton'] = None\n"
    assert run("-c", hidden + CALL).stdout.strip() == "native"


def copy_without_libraries(target: pathlib.Path) -> None:
    for path in PACKAGE.rglob("*.py"):
        copy = target / "ckpt_kernels" / path.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())


def test_works_without_the_libraries_and_doctor_says_so(tmp_path: pathlib.Path) -> None:
    copy_without_libraries(tmp_path)
    assert run("-c", CALL, PYTHONPATH=str(tmp_path)).stdout.strip() == "reference"
    done = run("-m", "ckpt_kernels", "doctor", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "the library _C was not built" in done.stdout and "served by reference" in done.stdout


def test_doctor_names_a_library_that_does_not_load(tmp_path: pathlib.Path) -> None:
    copy_without_libraries(tmp_path)
    (tmp_path / "ckpt_kernels" / "_C.abi3.so").write_bytes(b"not a library")
    assert run("-c", CALL, PYTHONPATH=str(tmp_path)).stdout.strip() == "reference"
    done = run("-m", "ckpt_kernels", "doctor", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and "_C.abi3.so does not load" in done.stdout


def test_doctor_finds_no_problem_with_the_library() -> None:
    done = run("-m", "ckpt_kernels", "doctor")
    assert done.returncode == 0, done.stdout
    assert "cpu calls" in done.stdout and "served by native" in done.stdout
    assert "instruction set" in done.stdout and "all is well" in done.stdout


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "avx512_bf16"])
def test_every_instruction_set_of_this_machine(isa: str) -> None:
    program = """
import torch
from tests.blocks import BLOCKS, with_gradients
from tests.conftest import serving
from ckpt_kernels.backends import native
print(native.cpu_isa())
for block in BLOCKS:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for columns in (5, 333):
            operands = block.operands((2, 7), columns, dtype, "cpu")
            with serving("reference"):
                expected = with_gradients(block.call, operands)
            with serving("native"):
                found = with_gradients(block.call, operands)
            for name, value in expected.items():
                error = (found[name].float() - value.float()).abs().max()
                # The reference's own rounding in a sum over all elements.
                terms = operands["input"].numel() ** 0.5 if name.removeprefix("grad ") in block.numbers else 1
                bound = 8 * torch.finfo(dtype).eps * (terms + value.float().abs().max())
                assert error <= bound, (block.name, name, error)
"""
    done = run("-c", program, CKPT_KERNELS_CPU_ISA=isa)
    if "which this processor lacks" in done.stderr:
        pytest.skip(f"this processor lacks {isa}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == isa


def test_an_unknown_instruction_set_is_an_error() -> None:
    done = run("-c", CALL, CKPT_KERNELS_CPU_ISA="sse9")
    assert "CKPT_KERNELS_CPU_ISA is 'sse9'; expected generic, avx2, avx512 or avx512_bf16" in done.stderr


def test_bfloat16_instructions_round_as_the_other_sets() -> None:
    """Ties, denormals, infinities and NaNs, of which the instruction itself would lose denormals and payloads."""
    program = """
import torch
from ckpt_kernels import functional as F
bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
every = bits.view(torch.bfloat16)
scale = torch.tensor([1.0, 1.00390625, 0.333, 1e-4, -3e-39], dtype=torch.bfloat16)
products = [F.glu(s.expand_as(every).contiguous(), every, activation="identity") for s in scale]
print(torch.stack(products).view(torch.int16).long().mul(bits.long() + 1).sum().item())
"""
    found = {isa: run("-c", program, CKPT_KERNELS_CPU_ISA=isa) for isa in ("generic", "avx512", "avx512_bf16")}
    if "which this processor lacks" in found["avx512_bf16"].stderr:
        pytest.skip("this processor lacks avx512_bf16")
    assert len({done.stdout for done in found.values()}) == 1, found
    assert all(done.returncode == 0 for done in found.values()), found


@pytest.mark.skipif(not list(PACKAGE.glob("_C_cuda.*so")), reason="the CUDA library is not built here")
def test_the_cuda_library_finds_torchs_cuda_symbols() -> None:
    """libtorch_cuda.so has the symbols. A CPU-only torch lacks this library, so ours is linked to libtorch.so, which
    every torch has."""
    library = next(PACKAGE.glob("_C_cuda.*so")).read_bytes()
    assert b"\0libtorch.so\0" in library


def test_small_calls_are_direct_if_torch_allows() -> None:
    """A library that was not built or does not load must not skip the tests of small calls."""
    can_be = native.why_not("cpu", torch.float32) is None and hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
    assert direct.is_available == can_be, direct.why_not

"""Fixtures and parameters that the tests share: backends, dtypes, and which of their pairs run on this machine.

Without a GPU, Triton kernels run in Triton's interpreter. Triton reads the variable that selects it on import.
"""

import os

# OpenMP reads this when torch is imported. Idle threads sleep; by default they spin, and take the cores from the other
# test processes.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import contextlib
import gc
import inspect
from collections.abc import Callable, Iterator

import hypothesis
import pytest

from ckpt_kernels import backends, use_backend
from ckpt_kernels.thin import plan_cache

from .call_plans import Counted
from .host import cuda_on_host

hypothesis.settings.register_profile("default", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("default")

# MKL picks the kernel of a vector function at the function's first call. If two threads make the first call at once,
# one of them may use a kernel of low accuracy (torch issue 188792). A call with one element runs on one thread.
for function in (torch.exp, torch.expm1, torch.log, torch.log1p, torch.sqrt, torch.tanh, torch.erf, torch.erfc):
    for argument in (torch.ones(1), torch.ones(1, dtype=torch.float64)):
        function(argument)

# Tests compare two runs of a convolution bit for bit.
torch.backends.cudnn.deterministic = True

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("reference", "native", "triton", "cuda_on_host")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@contextlib.contextmanager
def serving(backend: str) -> Iterator[None]:
    """Context in which `backend` serves every call; also accepts the tests' own `cuda_on_host`."""
    if backend != "cuda_on_host":
        with use_backend(backend):
            yield
        return
    select = backends.select
    backends.select = lambda tensor: cuda_on_host
    try:
        # Some code calls the native backend without `select`; with this backend selected the code does not.
        with use_backend("reference"):
            yield
    finally:
        backends.select = select


def where(condition: Callable[..., bool]) -> pytest.MarkDecorator:
    """Restricts a test to the combinations of parameters for which `condition`, a function of some of them, holds."""
    return pytest.mark.where.with_args(condition)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Deselects combinations that `where` excludes or that no backend serves. Long tests run first, so that no process
    is left alone with one at the end."""
    items[:] = filter(_is_selected, items)
    items.sort(key=lambda item: not item.path.name.startswith(("test_triton_compile", "test_programs")))


def pytest_collection_finish() -> None:
    """Excludes the objects of torch and Triton from garbage collections, so that `gc.collect` in a test is fast."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Returns the frozen objects to the garbage collector."""
    gc.unfreeze()


def _is_selected(item: pytest.Item) -> bool:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    conditions = [mark.args[0] for mark in item.iter_markers("where")]
    if "served" in item.fixturenames:
        conditions.append(lambda backend, dtype: unserved(backend, torch.float32) or not unserved(backend, dtype))
    return all(
        condition(**{name: parameters[name] for name in inspect.signature(condition).parameters})
        for condition in conditions
    )


def emulated(backend: str) -> bool:
    """Whether GPU kernels run on the CPU, interpreted or compiled for the host, a thousand times slower."""
    return backend in ("triton", "cuda_on_host") and DEVICE == "cpu"


def interprets(backend: str) -> bool:
    """Whether kernels run in Triton's interpreter, the slower of the two emulations."""
    return backend == "triton" and emulated(backend)


def unserved(backend: str, dtype: torch.dtype, device: str = DEVICE) -> str | None:
    """The reason why a backend cannot serve tensors of this dtype on this machine; None if it can."""
    if backend == "cuda_on_host":
        return cuda_on_host.why_not(device, dtype)
    return backends.why_not(backend, device, dtype)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    reason = unserved(request.param, torch.float32)
    if reason:
        pytest.skip(f"{request.param} on {DEVICE}: {reason}")
    with serving(request.param):
        yield request.param


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def served(backend: str, dtype: torch.dtype) -> tuple[str, torch.dtype]:
    """Every pair of a backend and a dtype that the backend serves. Other pairs are not collected; pairs of a missing
    backend are skipped."""
    reason = unserved(backend, dtype)
    if reason:
        pytest.skip(f"{backend} on {DEVICE}: {reason}")
    return backend, dtype


@pytest.fixture
def without_plans() -> Iterator[None]:
    """Small calls have made no plans before the test, and leave none."""
    plan_cache._plans.clear()
    yield
    plan_cache._plans.clear()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Limits torch to one thread, with which small operations are faster."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

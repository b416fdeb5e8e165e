"""Where there is no GPU, Triton kernels run in Triton's interpreter, which must be asked for before it is imported."""

import os

# Must be asked for before torch is imported: threads that wait for work sleep. By default they spin, and take the cores
# of the other processes of tests.
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

from .host import cuda_on_host

hypothesis.settings.register_profile("default", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("default")

# MKL picks the kernel of each of its vector functions at that function's first call; if two of torch's threads make it
# at once, one of them may compute its share with a kernel of low accuracy (torch issue 188792). One element, one thread
for function in (torch.exp, torch.expm1, torch.log, torch.log1p, torch.sqrt, torch.tanh, torch.erf, torch.erfc):
    for one in (torch.ones(1), torch.ones(1, dtype=torch.float64)):
        function(one)

# Of convolutions too two runs are to give the same bits.
torch.backends.cudnn.deterministic = True

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("reference", "native", "triton", "cuda_on_host")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@contextlib.contextmanager
def serving(backend: str) -> Iterator[None]:
    """Every call in this block is served by `backend`, the tests' own `cuda_on_host` included."""
    if backend != "cuda_on_host":
        with use_backend(backend):
            yield
        return
    select = backends.select
    backends.select = lambda tensor: cuda_on_host
    try:
        # Whoever calls the native backend without asking `select` does not do so then.
        with use_backend("reference"):
            yield
    finally:
        backends.select = select


def where(condition: Callable[..., bool]) -> pytest.MarkDecorator:
    """Of all combinations of a test's parameters, those for which `condition`, which names some of them, holds."""
    return pytest.mark.where.with_args(condition)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """No tests but those `where` they are wanted and served; the longest first, so that no process is left alone with
    them."""
    items[:] = filter(_is_wanted, items)
    items.sort(key=lambda item: not item.path.name.startswith(("test_triton_compile", "test_programs")))


def pytest_collection_finish() -> None:
    """What there is by now, torch and Triton, the collector need not walk again in every test that asks for it."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """At the end all may go."""
    gc.unfreeze()


def _is_wanted(item: pytest.Item) -> bool:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    conditions = [mark.args[0] for mark in item.iter_markers("where")]
    if "served" in item.fixturenames:
        conditions.append(lambda backend, dtype: unserved(backend, torch.float32) or not unserved(backend, dtype))
    return all(
        condition(**{name: parameters[name] for name in inspect.signature(condition).parameters})
        for condition in conditions
    )


def emulated(backend: str) -> bool:
    """Whether a GPU's kernels run on the CPU, interpreted or built for the host, a thousand times slower."""
    return backend in ("triton", "cuda_on_host") and DEVICE == "cpu"


def interprets(backend: str) -> bool:
    """Whether kernels run in Triton's interpreter, the slower of the two."""
    return backend == "triton" and emulated(backend)


def unserved(backend: str, dtype: torch.dtype, device: str = DEVICE) -> str | None:
    """Why a backend cannot serve such tensors on this machine; None if it can."""
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
    """Every pair of backend and dtype that goes together; others are not collected, but where a backend is missing."""
    reason = unserved(backend, dtype)
    if reason:
        pytest.skip(f"{backend} on {DEVICE}: {reason}")
    return backend, dtype


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch's threads, of which there is one within: small operations take less time so."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

"""`keep_freed_memory`, in processes of their own, because the setting applies to the whole process."""

import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest

from ckpt_kernels import doctor, memory
from ckpt_kernels.memory import freed_memory
from ckpt_kernels.memory.freed_memory import FreshMemory

# Prints the page faults while a tensor above glibc's own threshold is made and filled four times.
FAULTS = """
import ctypes, resource, sys, torch
from ckpt_kernels import memory

if "keep" in sys.argv:
    assert memory.keep_freed_memory() is True

def fill():
    torch.empty(12 * 2**20).fill_(1.0)

for _ in range(3):
    fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*arguments: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def glibc() -> bool:
    return sys.platform.startswith("linux") and platform.libc_ver()[0] == "glibc"


@pytest.mark.skipif(not glibc(), reason="the setting is of glibc's allocator")
def test_kept_memory_is_not_faulted_in_again() -> None:
    by_default = faults()
    if by_default < 100:
        pytest.skip("the allocator of this process keeps freed memory already")
    assert faults("keep") < by_default / 20


def test_the_example_runs() -> None:
    code = "import doctest, ckpt_kernels.memory.freed_memory as module; print(doctest.testmod(module))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().startswith("TestResults(failed=0, attempted=2")


def test_other_systems_return_false(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert memory.keep_freed_memory() is False
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(freed_memory.ctypes, "CDLL", lambda name: object())
    assert memory.keep_freed_memory() is False


def test_doctor_reports_slow_page_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    for measured, advised in ((FreshMemory(2.0, 9.0), True), (FreshMemory(2.0, 2.5), False)):
        monkeypatch.setattr(doctor, "fresh_memory", lambda measured=measured: measured)
        (found,) = (finding for finding in doctor.findings() if finding.subject == "page faults")
        assert f"{measured.fresh:.1f} ms" in found.text and not found.problem
        assert ("keep_freed_memory" in found.text) is advised


def test_fresh_memory_is_the_least_of_five_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A simulated clock is read at the start of each turn, after the warm fill, and after the fresh fill."""
    turns = [(3.0, 9.0), (2.0, 8.0), (4.0, 5.0), (2.5, 7.0), (6.0, 6.0)]
    now, times = 0.0, []
    for warm, fresh in turns:
        times += [now, now + warm, now + warm + fresh]
        now += 100.0
    monkeypatch.setattr(freed_memory.time, "perf_counter", iter(times).__next__)
    assert freed_memory.fresh_memory() == FreshMemory(warm=2000.0, fresh=5000.0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have no setting")
@pytest.mark.parametrize("refused", [-1, -3, None])
def test_both_thresholds_must_be_set(monkeypatch: pytest.MonkeyPatch, refused: int | None) -> None:
    library = SimpleNamespace(gnu_get_libc_version=None, mallopt=lambda name, value: int(name != refused))
    monkeypatch.setattr(freed_memory.ctypes, "CDLL", lambda name: library)
    assert memory.keep_freed_memory() is (refused is None)


@pytest.mark.parametrize(("warm", "fresh", "is_slow"), [(1.0, 1.0, False), (1.0, 2.0, False), (1.0, 2.1, True)])
def test_fresh_memory_is_slow_above_twice_the_time(warm: float, fresh: float, is_slow: bool) -> None:
    assert FreshMemory(warm, fresh).is_slow is is_slow

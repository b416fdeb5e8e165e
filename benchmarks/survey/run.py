"""Runs every architecture in a process of its own, so that a crash or a hang is a result like any other."""

import contextlib
import faulthandler
import importlib
import multiprocessing
import os
import pathlib
import re
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from . import declare_missing_operators
from .entry import Entry
from .measure import PHASES, Measured, said

TIMEOUT = 120.0

# Modules with a long import time. A fork of a process that has imported them does not import them again.
_HEAVY = ("numpy", "transformers", "transformers.modeling_utils", "diffusers", "timm", "torchvision")

Found = dict[str, Any]
_fork = multiprocessing.get_context("fork")


def prepare() -> None:
    """Imports the heavy modules, with one thread: a process with threads cannot be forked safely."""
    torch.set_num_threads(1)
    declare_missing_operators()
    warnings.filterwarnings("ignore")
    for name in _HEAVY:
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def _child(send: Connection, errors: str, entry: Entry, phases: tuple[str, ...]) -> None:
    """Sends (phase, None) before each phase, and (phase, results) after the phase."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    with open(errors, "w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        faulthandler.enable(stream)
        send.send(("build", None))
        try:
            measured = Measured(entry)
        except Exception as error:
            send.send(("build", {"raised": said(error)}))
            return
        for phase in phases:
            send.send((phase, None))
            begin = time.perf_counter()
            try:
                found = measured.phase(phase)
            except Exception as error:
                found = {"raised": said(error), "where": _where(error)}
            send.send((phase, found | {"seconds": time.perf_counter() - begin}))
            if phase == "eager" and "raised" in found:
                return


def _where(error: BaseException) -> str:
    """The innermost three frames, as file and line."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    return ", ".join(f"{os.path.basename(frame.filename)}:{frame.lineno}" for frame in frames)


class _Running:
    """The run of one architecture. If the process dies in a phase, another continues with the remaining phases."""

    def __init__(self, entry: Entry, timeout: float) -> None:
        self.entry = entry
        self.timeout = timeout
        self.left = PHASES
        self.found: Found = {"name": entry.name, "library": entry.library, "phases": {}}
        self.began = time.perf_counter()
        self._start()

    def _start(self) -> None:
        self.deadline = time.perf_counter() + self.timeout
        self.phase = "build"
        descriptor, self.errors = tempfile.mkstemp(prefix="survey")
        os.close(descriptor)
        self.receive, send = _fork.Pipe(duplex=False)
        arguments = (send, self.errors, self.entry, self.left)
        self.process = _fork.Process(target=_child, args=arguments, daemon=True)
        self.process.start()
        send.close()

    def advance(self) -> bool:
        """Receives the messages of the process. True once the run is complete."""
        try:
            while self.receive.poll():
                self.phase, found = self.receive.recv()
                if found is not None:
                    self.found["phases"][self.phase] = found
            late = time.perf_counter() > self.deadline
        except EOFError:
            self.process.join()
            return self._ended(self.process.exitcode)
        if not late:
            return False
        self.process.kill()
        self.process.join()
        return self._ended(None)

    def _ended(self, code: int | None) -> bool:
        output = pathlib.Path(self.errors).read_text(errors="replace")
        os.unlink(self.errors)
        self.receive.close()
        again = False
        if code != 0:
            how = f"timeout after {self.timeout:.0f} s" if code is None else f"crash: {_signal(code)}"
            self.found["phases"][self.phase] = {"raised": how, "where": _last_frames(output)}
            # The new process runs the earlier phases again, but does not send them twice.
            rest = PHASES[PHASES.index(self.phase) + 1 :] if self.phase in PHASES[1:] else ()
            if rest and code is not None:
                self.left = ("eager", *rest)
                again = True
        if again:
            self._start()
            return False
        self.found["seconds"] = time.perf_counter() - self.began
        return True


def _signal(code: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"exit status {code}"


def _last_frames(output: str) -> str:
    """The innermost frames in the output of a crash."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', output)[:3]
    return ", ".join(f"{os.path.basename(file)}:{line}" for file, line in frames)


def survey(
    entries: Iterable[Entry],
    *,
    jobs: int = 2,
    timeout: float = TIMEOUT,
    done: Callable[[Found], None] = lambda found: None,
) -> list[Found]:
    """The results of the entries, in the order of `entries`. Calls `done` with each result when it arrives."""
    entries = list(entries)
    waiting, running, finished = entries[::-1], [], {}
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(_Running(waiting.pop(), timeout))
        wait([one.receive for one in running], timeout=1.0)
        for one in [one for one in running if one.advance()]:
            running.remove(one)
            finished[one.entry.name] = one.found
            done(one.found)
    return [finished[entry.name] for entry in entries]

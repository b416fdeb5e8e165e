"""Interrupts where a signal may come: as a function begins, and after a call."""

import inspect
import itertools
import pathlib
import sys
import types
from collections.abc import Callable, Iterator

import ckpt_kernels

_PACKAGE = str(pathlib.Path(ckpt_kernels.__file__).parent)


def interrupted_at_every_step(run: Callable[[], None]) -> Iterator[int]:
    """Runs it again and again, interrupted at the first step that is taken in this package, at the second, and so on;
    gives the number of the step each time, until it runs to its end."""
    for step in itertools.count(1):
        left = step

        def profile(frame: types.FrameType, event: str, argument: object) -> None:
            nonlocal left
            inside = frame.f_code.co_filename.startswith(_PACKAGE) or frame.f_code.co_filename.endswith("contextlib.py")
            # What is raised by a profiler as a generator goes on or yields ends it, which a signal there does not.
            switches = event in ("call", "return") and frame.f_code.co_flags & inspect.CO_GENERATOR
            if inside and event != "c_call" and not switches:
                left -= 1
                if left == 0:
                    raise KeyboardInterrupt

        try:
            sys.setprofile(profile)
            run()
            return
        except KeyboardInterrupt:
            pass
        finally:
            sys.setprofile(None)
        yield step

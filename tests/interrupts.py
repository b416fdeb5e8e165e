"""Interrupts code at every point where Python handles a signal: at the start of a function, and after a call."""

import inspect
import itertools
import pathlib
import sys
import types
from collections.abc import Callable, Iterator

import ckpt_kernels

_PACKAGE = str(pathlib.Path(ckpt_kernels.__file__).parent)


def interrupted_at_every_step(run: Callable[[], None]) -> Iterator[int]:
    """Runs a function again and again, interrupted at the first step within this package, at the second, and so on.

    Yields the number of the step after each interrupt, and ends when a run completes.
    """
    for step in itertools.count(1):
        left = step

        def profile(frame: types.FrameType, event: str, argument: object) -> None:
            nonlocal left
            inside = frame.f_code.co_filename.startswith(_PACKAGE) or frame.f_code.co_filename.endswith("contextlib.py")
            # An exception that a profiler raises as a generator resumes or yields ends the generator; a signal doesn't.
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

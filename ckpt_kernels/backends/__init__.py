"""Which backend serves a call, and why: the one place where this is decided.

- `triton`: Triton kernels, on a GPU (on the CPU only in Triton's interpreter, for tests).
- `native`: the compiled C++ and CUDA libraries.
- `reference`: plain torch.

Left alone, a call on a GPU goes to `triton`, else `native`, else `reference`; a call on the CPU goes to
`native`, else `reference`. The environment variable CKPT_KERNELS_BACKEND and `set_backend` choose another for the whole
process, and `use_backend` for what runs in its `with`.

A backward pass is served by the backend that was asked for in its forward pass, whatever thread it runs in: every op
remembers it (`ops.registration`), and so does every recipe.
"""

import contextvars
import functools
import importlib
import os
import warnings
import weakref
from types import ModuleType, TracebackType

import torch

NAMES = ("triton", "native", "reference")
_AUTOMATIC = {"cpu": ("native", "reference"), "meta": ("reference",)}
_AUTOMATIC_ELSEWHERE = ("triton", "native", "reference")

_of_process = os.environ.get("CKPT_KERNELS_BACKEND", "") or "auto"


class _Choice:
    """That of one `with`. It is over when it says so, wherever that was found out, or when its context is gone, which
    an interrupt may have kept from saying so: see `serving`."""

    __slots__ = ("context", "is_ended", "name", "outer")

    def __init__(self, name: str, outer: "_Choice | None", context: "weakref.ref[serving] | None") -> None:
        self.name = name
        self.outer = outer
        self.context = context
        self.is_ended = False

    @property
    def is_over(self) -> bool:
        return self.is_ended or (self.context is not None and self.context() is None)


_choice: contextvars.ContextVar[_Choice | None] = contextvars.ContextVar("ckpt_kernels_backend", default=None)


def backend_module(name: str) -> ModuleType:
    """The module that implements backend `name`; ImportError if it cannot be imported."""
    return importlib.import_module(f"{__name__}.{name}")


@functools.cache
def why_not(name: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why a backend cannot serve a call; None if it can.

    Args:
        name: "triton", "native" or "reference".
        device_type: "cpu", "cuda", ...
        dtype: of the call's main input.

    Returns:
        The reason in words, or None.

    Example:
        >>> ckpt_kernels.backends.why_not("reference", "cpu", torch.float32) is None
        True
    """
    try:
        module = backend_module(name)
    except ImportError as error:
        return f"it cannot be imported ({error})"
    return module.why_not(device_type, dtype)


@functools.cache
def _select(requested: str, device_type: str, dtype: torch.dtype) -> ModuleType:
    if requested == "auto":
        for name in _AUTOMATIC.get(device_type, _AUTOMATIC_ELSEWHERE):
            if why_not(name, device_type, dtype) is None:
                return backend_module(name)
    _check_name(requested, "CKPT_KERNELS_BACKEND")
    reason = why_not(requested, device_type, dtype)
    if reason is not None:
        raise RuntimeError(f"backend '{requested}' was asked for but cannot serve {dtype} on {device_type}: {reason}")
    return backend_module(requested)


def select(tensor: torch.Tensor) -> ModuleType:
    """The backend module that serves a call whose main input is `tensor`."""
    return _select(chosen(), tensor.device.type, tensor.dtype)


def selected_name(device_type: str, dtype: torch.dtype = torch.float32) -> str:
    """The name of the backend that would serve such a call.

    Args:
        device_type: "cpu", "cuda", ...
        dtype: of the call's main input.

    Returns:
        "triton", "native" or "reference".

    Raises:
        RuntimeError: the backend that was asked for cannot serve the call.

    Example:
        >>> with ckpt_kernels.use_backend("reference"):
        ...     ckpt_kernels.backends.selected_name("cpu")
        'reference'
    """
    return _select(chosen(), device_type, dtype).__name__.rpartition(".")[2]


def chosen() -> str:
    """What was asked for here, by `use_backend`, `set_backend` or the environment: a backend, or "auto".

    Returns:
        "auto", "triton", "native" or "reference".

    Example:
        >>> with ckpt_kernels.use_backend("reference"):
        ...     ckpt_kernels.backends.chosen()
        'reference'
    """
    choice = _choice.get()
    if choice is None:  # as nearly always
        return _of_process
    choice = _innermost()
    return _of_process if choice is None else choice.name


def _innermost() -> _Choice | None:
    choice = _choice.get()
    while choice is not None and choice.is_over:
        choice = choice.outer
    return choice


def _check_name(name: str, argument: str) -> None:
    if name not in ("auto", *NAMES):
        raise ValueError(f"{argument} is {name!r}; expected auto, {', '.join(NAMES)}")


def _check_available(name: str) -> None:
    _check_name(name, "backend")
    if name == "auto":
        return
    reasons = {device: why_not(name, device, torch.float32) for device in ("cpu", "cuda")}
    if all(reasons.values()):
        detail = "; ".join(f"on {device}: {reason}" for device, reason in reasons.items())
        raise RuntimeError(f"backend '{name}' is not available: {detail}")


def set_backend(name: str) -> None:
    """Makes one backend serve every call of this process from now on, in all threads, but not within `use_backend`.

    Args:
        name: "auto", "triton", "native" or "reference".

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the backend is not there; the error says why.

    Example:
        >>> before = ckpt_kernels.backends.chosen()
        >>> ckpt_kernels.set_backend("reference")
        >>> ckpt_kernels.backends.chosen()
        'reference'
        >>> ckpt_kernels.set_backend(before)
    """
    global _of_process
    _check_available(name)
    _of_process = name


class serving:
    """`use_backend` for a name that is known to be right.

    The end is a mark on the choice itself, so that it holds wherever the context ends: in another thread or task, whose
    own choice is not touched. An interrupt just as `__exit__` begins keeps it from being made: then the choice is over
    when the interrupt's traceback, which holds the context, is dropped.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._entered: list[_Choice] = []

    def __enter__(self) -> "serving":
        # A compiler traces this, and not the interrupts.
        context = None if torch.compiler.is_compiling() else weakref.ref(self)
        choice = _Choice(self._name, _innermost(), context)
        try:
            self._entered.append(choice)
            _choice.set(choice)
            return self
        except BaseException:  # an interrupt after one of these steps
            choice.is_ended = True
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Before anything is called, for after a call an interrupt may come.
        self._entered[-1].is_ended = True
        choice = self._entered.pop()
        if _choice.get() is choice:
            _choice.set(choice.outer)


class use_backend(serving):
    """A context in which one backend serves every call.

    It holds for what runs in the `with`, in its thread or asyncio task, and for the backward passes of that, wherever
    and whenever they run. (Of a graph that torch.compile made, the backward pass goes by what is chosen where it runs:
    on a GPU that is a thread of autograd's own, and so the choice of the process.) Nothing changes before the `with` is
    entered: a call for good is `set_backend`, and an object that goes without having been entered warns of that.

    Args:
        name: "auto", "triton", "native" or "reference".

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the backend is not there; the error says why.

    Example:
        >>> with ckpt_kernels.use_backend("reference"):
        ...     y = F.layer_norm(torch.randn(8, 64), 64)
    """

    def __init__(self, name: str) -> None:
        _check_available(name)
        super().__init__(name)
        self._idle: weakref.finalize | None = None
        if not torch.compiler.is_compiling():
            # Taken off by `__enter__`: a `__del__` would run at the end of each `with`, and Python swallows an
            # interrupt in there.
            self._idle = weakref.finalize(self, _warn_of_idle, name)
            self._idle.atexit = False

    def __enter__(self) -> "use_backend":
        if self._idle is not None:
            self._idle.detach()
            self._idle = None
        super().__enter__()
        return self


def _warn_of_idle(name: str) -> None:
    warnings.warn(
        f"use_backend({name!r}) was not entered, and changed nothing: it holds within its `with`; "
        f"for the whole process call set_backend({name!r})",
        # The line at whose end the object goes, past weakref's own frame.
        stacklevel=3,
    )

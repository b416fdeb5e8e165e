"""Selects the backend that serves a call.

- `triton`: Triton kernels, on a GPU (on the CPU only in Triton's interpreter, for tests).
- `native`: the compiled C++ and CUDA libraries.
- `reference`: plain torch.

By default a call on a GPU goes to the first of `triton`, `native` and `reference` that can serve the call, and a call
on the CPU to the first of `native` and `reference`. The environment variable CKPT_KERNELS_BACKEND and `set_backend`
choose another backend for the whole process, and `use_backend` for the code within a `with`.

A backward pass uses the backend that was requested in the forward pass, in whatever thread the backward pass runs:
every op (`ops.registration`) and every recipe records the request.
"""

import contextvars
import functools
import importlib
import os
import warnings
import weakref
from types import ModuleType, TracebackType

import torch

from ..arguments import one_of

NAMES = ("triton", "native", "reference")
_AUTOMATIC = {"cpu": ("native", "reference"), "meta": ("reference",)}
_AUTOMATIC_ELSEWHERE = ("triton", "native", "reference")

_process_choice = os.environ.get("CKPT_KERNELS_BACKEND", "") or "auto"


class _Choice:
    """The choice of one `with` block.

    The choice is over when it is marked as ended, or when its context was garbage-collected without a mark, because an
    interrupt came first: see `serving`.
    """

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
    """Import the module that implements backend `name`; raises ImportError."""
    return importlib.import_module(f"{__name__}.{name}")


@functools.cache
def why_not(name: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Return the reason why a backend cannot serve a call, or None.

    Args:
        name: "triton", "native" or "reference".
        device_type: "cpu", "cuda", ...
        dtype: the dtype of the call's main input.

    Returns:
        The reason in words, or None.

    Raises:
        ValueError: the name is unknown.

    Example:
        >>> ckpt_kernels.backends.why_not("reference", "cpu", torch.float32) is None
        True
    """
    one_of(name, NAMES, "name")
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
    """Return the backend module that serves a call whose main input is `tensor`."""
    return _select(chosen(), tensor.device.type, tensor.dtype)


def selected_name(device_type: str, dtype: torch.dtype = torch.float32) -> str:
    """Return the name of the backend that would serve a call.

    Args:
        device_type: "cpu", "cuda", ...
        dtype: the dtype of the call's main input.

    Returns:
        "triton", "native" or "reference".

    Raises:
        RuntimeError: the requested backend cannot serve the call.

    Example:
        >>> with ckpt_kernels.use_backend("reference"):
        ...     ckpt_kernels.backends.selected_name("cpu")
        'reference'
    """
    return _select(chosen(), device_type, dtype).__name__.rpartition(".")[2]


def chosen() -> str:
    """Return the backend requested here by `use_backend`, `set_backend` or the environment variable.

    Returns:
        "auto", "triton", "native" or "reference".

    Example:
        >>> with ckpt_kernels.use_backend("reference"):
        ...     ckpt_kernels.backends.chosen()
        'reference'
    """
    choice = _choice.get()
    if choice is None:  # the usual case
        return _process_choice
    choice = _innermost()
    return _process_choice if choice is None else choice.name


def _innermost() -> _Choice | None:
    """Return the innermost choice of this thread or task that is not over."""
    choice = _choice.get()
    while choice is not None and choice.is_over:
        choice = choice.outer
    return choice


def _check_name(name: str, argument: str) -> None:
    one_of(name, ("auto", *NAMES), argument)


def _check_available(name: str) -> None:
    _check_name(name, "backend")
    if name == "auto":
        return
    reasons = {device: why_not(name, device, torch.float32) for device in ("cpu", "cuda")}
    if all(reasons.values()):
        detail = "; ".join(f"on {device}: {reason}" for device, reason in reasons.items())
        raise RuntimeError(f"backend '{name}' is not available: {detail}")


def set_backend(name: str) -> None:
    """Choose the backend for all later calls in this process, in all threads, except within `use_backend`.

    Args:
        name: "auto", "triton", "native" or "reference".

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the backend is not available; the error says why.

    Example:
        >>> before = ckpt_kernels.backends.chosen()
        >>> ckpt_kernels.set_backend("reference")
        >>> ckpt_kernels.backends.chosen()
        'reference'
        >>> ckpt_kernels.set_backend(before)
    """
    global _process_choice
    _check_available(name)
    _process_choice = name


class serving:
    """`use_backend` without the check of the name.

    `__exit__` marks the choice itself as ended, so that the mark takes effect even if the context is left in another
    thread or task, whose own choice stays. If an interrupt arrives just as `__exit__` begins, the mark is not made;
    then the choice is over when the interrupt's traceback, which holds the context, is freed.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._entered: list[_Choice] = []

    def __enter__(self) -> "serving":
        # torch.compile only traces this code, so that no interrupt has to be handled there.
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
        # The mark comes first, since an interrupt may arrive at any later call.
        self._entered[-1].is_ended = True
        choice = self._entered.pop()
        if _choice.get() is choice:
            _choice.set(choice.outer)


class use_backend(serving):
    """A context in which one backend serves every call.

    The choice applies to calls within the `with`, in the same thread or asyncio task, and to their backward passes,
    wherever and whenever these run. The backward pass of a graph that torch.compile made is an exception: it follows
    the choice at the place where it runs, on a GPU an autograd thread, which sees the choice of the process. The object
    has no effect before the `with` is entered, and warns if it is freed without having been entered; `set_backend`
    makes a permanent choice.

    Args:
        name: "auto", "triton", "native" or "reference".

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the backend is not available; the error says why.

    Example:
        >>> with ckpt_kernels.use_backend("reference"):
        ...     y = F.layer_norm(torch.randn(8, 64), 64)
    """

    def __init__(self, name: str) -> None:
        _check_available(name)
        super().__init__(name)
        self._idle: weakref.finalize | None = None
        if not torch.compiler.is_compiling():
            # `__enter__` detaches the finalizer. A `__del__` would run at the end of each `with`, and Python swallows
            # interrupts in `__del__`.
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
        # The line that frees the object, past weakref's own frame.
        stacklevel=3,
    )

"""Which backend serves a call, and why: the one place where this is decided.

- `triton`: Triton kernels, on a GPU (on the CPU only in Triton's interpreter, for tests).
- `native`: the compiled C++ and CUDA libraries.
- `reference`: plain torch.

Left alone, a call on a GPU goes to `triton`, else `native`, else `reference`; a call on the CPU goes to
`native`, else `reference`. `use_backend` and the environment variable CKPT_KERNELS_BACKEND override this.
"""

import functools
import importlib
import os
from types import ModuleType, TracebackType

import torch

NAMES = ("triton", "native", "reference")
_AUTOMATIC = {"cpu": ("native", "reference")}
_AUTOMATIC_ELSEWHERE = ("triton", "native", "reference")

_chosen = os.environ.get("CKPT_KERNELS_BACKEND", "") or "auto"


def backend_module(name: str) -> ModuleType:
    """The module that implements backend `name`; ImportError if it cannot be imported."""
    return importlib.import_module(f"{__name__}.{name}")


@functools.cache
def why_not(name: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why backend `name` cannot serve tensors of this device and dtype; None if it can."""
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
    return _select(_chosen, tensor.device.type, tensor.dtype)


def selected_name(device_type: str, dtype: torch.dtype = torch.float32) -> str:
    """The name of the backend that would serve such a call; RuntimeError if the one asked for cannot."""
    return _select(_chosen, device_type, dtype).__name__.rpartition(".")[2]


def chosen() -> str:
    """What was asked for, by `use_backend` or the environment: a backend, or "auto"."""
    return _chosen


def _check_name(name: str, argument: str) -> None:
    if name not in ("auto", *NAMES):
        raise ValueError(f"{argument} is {name!r}; expected auto, {', '.join(NAMES)}")


class use_backend:
    """Makes `name` ("auto", "triton", "native" or "reference") serve every call of this process.

    As a call it holds until the next one; as a context manager, until the end of the `with`. It holds for the
    whole process, not the calling thread, because backward passes run in threads of their own.

    Raises ValueError for an unknown name, and RuntimeError, saying why, for a backend that is not there.
    """

    def __init__(self, name: str) -> None:
        global _chosen
        _check_name(name, "backend")
        if name != "auto":
            reasons = {device: why_not(name, device, torch.float32) for device in ("cpu", "cuda")}
            if all(reasons.values()):
                detail = "; ".join(f"on {device}: {reason}" for device, reason in reasons.items())
                raise RuntimeError(f"backend '{name}' is not available: {detail}")
        self._previous = _chosen
        _chosen = name

    def __enter__(self) -> "use_backend":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _chosen
        _chosen = self._previous

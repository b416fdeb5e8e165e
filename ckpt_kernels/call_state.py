"""Autocast and buffers at the start of a layer's call, restored when the call is repeated."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

AutocastState = list[tuple[str, dict[str, Any]]]
_last: AutocastState = []


def autocast_state() -> AutocastState:
    """The autocast settings of each device. Calls under equal settings share one object."""
    global _last
    state = [
        (
            device,
            {
                "dtype": torch.get_autocast_dtype(device),
                "enabled": torch.is_autocast_enabled(device),
                "cache_enabled": torch.is_autocast_cache_enabled(),
            },
        )
        for device in _devices()
    ]
    if state != _last:
        _last = state
        return state
    return _last


@functools.cache
def _devices() -> tuple[str, ...]:
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


class BufferSnapshot:
    """The value of a buffer before a call, and whether the call has written to the buffer.

    Batch norms write to their buffers without a new version, so small buffers are compared. On a GPU a comparison would
    wait for the device, so buffers of a norm in training count as written.
    """

    _MOST = 65536

    def __init__(self, tensor: Tensor, module: nn.Module) -> None:
        self.tensor = tensor
        self._is_moved = module.training and module._buffers.get("running_mean") is not None
        self._version = None if tensor.is_inference() else tensor._version
        is_compared = tensor.numel() <= self._MOST and type(tensor) is Tensor and tensor.layout is torch.strided
        self._value = tensor.detach().clone() if is_compared else None

    def is_written(self) -> bool:
        if self._version is not None and self.tensor._version != self._version:
            return True
        if self._value is None or self.tensor.is_cuda:
            return self._value is not None and self._is_moved
        return not torch.equal(self._value, self.tensor)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """A context in which the buffer has the value from the start of the first pass; afterwards the current value
        returns.

        The values are written through `.data`, and the version counter returns too: a node may have saved the buffer.
        """
        current = self.tensor.detach().clone()
        if self._value is not None:
            self.tensor.data.copy_(self._value)
        elif self.is_written():
            raise RuntimeError(
                f"a checkpointed layer writes to a buffer of {self.tensor.numel():,} elements; expected at most "
                f"{self._MOST:,}, of which a copy is kept, or a layer that is not checkpointed"
            )
        is_versioned = self._version is not None
        try:
            with (
                torch.autograd._unsafe_preserve_version_counter(self.tensor)
                if is_versioned
                else contextlib.nullcontext()
            ):
                yield
        finally:
            self.tensor.data.copy_(current)

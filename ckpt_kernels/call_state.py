"""The state at the start of a layer's call, restored when the call is repeated."""

import contextlib
import random
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .convert.loads import modules_of
from .nested_values import tensors_among


def autocast_state() -> list[tuple[str, dict[str, Any]]]:
    """The autocast settings of each device."""
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return [
        (
            device,
            {
                "dtype": torch.get_autocast_dtype(device),
                "enabled": torch.is_autocast_enabled(device),
                "cache_enabled": torch.is_autocast_cache_enabled(),
            },
        )
        for device in devices
    ]


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

        The values are written through `.data`, so that version counters do not change: a node may have saved the
        buffer.
        """
        current = self.tensor.detach().clone()
        if self._value is not None:
            self.tensor.data.copy_(self._value)
        elif self.is_written():
            raise RuntimeError(
                f"a checkpointed layer writes to a buffer of {self.tensor.numel():,} elements; expected at most "
                f"{self._MOST:,}, of which a copy is kept, or a layer that is not checkpointed"
            )
        try:
            yield
        finally:
            self.tensor.data.copy_(current)


class RandomState:
    """The states of torch's generators for the CPU, for the devices of a call's tensors and within the layer; and of
    Python's and numpy's."""

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self._states = [(generator, generator.get_state()) for generator in generators]
        self._python = random.getstate()
        numpy = sys.modules.get("numpy")
        self._numpy = None if numpy is None else numpy.random.get_state()

    @staticmethod
    def capture(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> "RandomState":
        """The state before a call of a module."""
        generators = [torch.default_generator]
        devices = {tensor.device.index for tensor in tensors_among((args, kwargs)) if tensor.is_cuda}
        generators += [torch.cuda.default_generators[index] for index in sorted(devices)]
        attributes = (value for submodule in modules_of(module) for value in vars(submodule).values())
        return RandomState([*generators, *(value for value in attributes if isinstance(value, torch.Generator))])

    def is_current(self) -> bool:
        """Whether no random number has been drawn since."""
        if not all(torch.equal(generator.get_state(), state) for generator, state in self._states):
            return False
        if random.getstate() != self._python:
            return False
        if self._numpy is None:
            return True
        numpy = sys.modules["numpy"].random.get_state()
        return numpy[2:] == self._numpy[2:] and bool((numpy[1] == self._numpy[1]).all())

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """A context in which the generators have these states; afterwards the current states return."""
        current = RandomState([generator for generator, _ in self._states])
        self._set()
        try:
            yield
        finally:
            current._set()

    def _set(self) -> None:
        for generator, state in self._states:
            generator.set_state(state)
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)

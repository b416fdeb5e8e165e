"""Autocast and buffers at the start of a layer's call, restored when the call is repeated."""

import contextlib
import functools
import weakref
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
    """The value of a buffer before a call, for a second run of the call.

    Batch norms write to their buffers without a new version, so small buffers are compared. On a GPU a comparison would
    wait for the device, so buffers of a norm in training count as written. The copies of small buffers are kept, for
    writes by others before the second run; calls share a copy until the buffer changes.

    Attributes:
        tensor: the buffer.
        is_written: whether the call has written to the buffer; True until `end_call`.
        is_copied: whether there is a copy, for plain tensors of at most 65,536 elements and the statistics of norms.
    """

    _MOST = 65536

    def __init__(self, tensor: Tensor, module: nn.Module) -> None:
        self.tensor = tensor
        self.is_written = True
        self._is_moved = module.training and module._buffers.get("running_mean") is not None
        self._version = None if tensor.is_inference() else tensor._version
        self.is_copied = (self._is_moved or tensor.numel() <= self._MOST) and _has_own_elements(tensor)
        self._copy = _copy_of(tensor, self._version, not self._is_moved) if self.is_copied else None
        self._version_now: int | None = None

    def end_call(self) -> None:
        """Finds out whether the call has written to the buffer."""
        if self._has_new_version():
            return
        if self._copy is None or self.tensor.is_cuda:
            self.is_written = self._copy is not None and self._is_moved
        else:
            self.is_written = not self._is_same()

    def _has_new_version(self) -> bool:
        return self._version is not None and self.tensor._version != self._version

    def is_needed(self) -> bool:
        """Whether a second run would find another value: the call, or someone since, has written to the buffer."""
        if self._copy is None:
            return self._has_new_version()
        is_comparable = not (self.is_written or self.tensor.is_cuda)
        return self.is_written or self._has_new_version() or (is_comparable and not self._is_same())

    def _is_same(self) -> bool:
        return self._copy is not None and torch.equal(self._copy.value, self.tensor)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """A context in which the buffer has the value from the start of the first pass; afterwards the current value
        returns.

        The values are written through `.data`, and the version counter returns too: a node may have saved the buffer.
        """
        if self._copy is None:
            raise RuntimeError(
                f"a buffer of a checkpointed layer, {_described(self.tensor)}, was modified by an in-place operation "
                f"since; expected a plain tensor of at most {self._MOST:,} elements, each with memory of its own, of "
                "which a copy is kept, or a layer that is not checkpointed"
            )
        current = self.tensor.detach().clone()
        self.tensor.data.copy_(self._copy.value)
        is_versioned = self._version is not None
        self._version_now = self.tensor._version if is_versioned else None
        try:
            with (
                torch.autograd._unsafe_preserve_version_counter(self.tensor)
                if is_versioned
                else contextlib.nullcontext()
            ):
                yield
        finally:
            self.tensor.data.copy_(current)

    def saved(self, value: Tensor) -> tuple[Tensor, int | None]:
        """See `as_autograd_reads`, of a tensor of the buffer's memory that a node saves within `restored`."""
        return as_autograd_reads(value, self._version, self._version_now)


def as_autograd_reads(value: Tensor, first: int | None, now: int | None) -> tuple[Tensor, int | None]:
    """A tensor that a node saves in a second run, as the backward pass shall read it, and the version that the tensor
    then has.

    Autograd reads the value of the backward pass, and a node may write to the tensor there, unless the tensor has had a
    new version since; this is an error in autograd, and here a copy has the value of the first run. Both runs write as
    often, so the version in the first run is known.

    Args:
        value: the tensor.
        first: the version before the first run; None for an inference tensor.
        now: the version before the second run, which returns afterwards.
    """
    version = None if value.is_inference() else value._version
    if version is None or first is None or now is None:
        return value, version
    writes = version - now
    if writes < 0:  # made by `.data`, with a version of its own
        return value, version
    if first + writes == now:
        return value, now
    copy = value.clone()
    return copy, copy._version


def _described(tensor: Tensor) -> str:
    kind = "" if type(tensor) is Tensor else f"{type(tensor).__name__}, "
    return f"{kind}{tensor.dtype} {tuple(tensor.shape)}"


def _has_own_elements(tensor: Tensor) -> bool:
    """Whether each element of a plain tensor has memory of its own, so that a copy can be written back."""
    is_dense = type(tensor) is Tensor and tensor.layout is torch.strided and not tensor.is_meta
    return is_dense and all(stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)


class _Copy:
    """A copy of a small buffer."""

    __slots__ = ("__weakref__", "source", "value", "version")

    def __init__(self, tensor: Tensor, version: int | None) -> None:
        self.source = weakref.ref(tensor)
        self.version = version
        self.value = tensor.detach().clone()

    def is_of(self, tensor: Tensor, version: int | None) -> bool:
        """Whether the copy has the present values. On a GPU a comparison would wait for the device."""
        is_known = self.source() is tensor and self.version == version and version is not None
        return is_known and not tensor.is_cuda and torch.equal(self.value, tensor)


# The last copy of each buffer, by the identity of the buffer.
_copies: "weakref.WeakValueDictionary[int, _Copy]" = weakref.WeakValueDictionary()


def _copy_of(tensor: Tensor, version: int | None, may_share: bool) -> _Copy:
    known = _copies.get(id(tensor)) if may_share else None
    if known is not None and known.is_of(tensor, version):
        return known
    copy = _Copy(tensor, version)
    if may_share:
        _copies[id(tensor)] = copy
    return copy

"""Copies of tensors to pinned host memory and back, on a stream of their own.

On a CPU it is simulated, by memory that torch's allocator does not count: what is measured there is what a device has.
"""

import torch
from torch import Tensor

_streams: dict[torch.device, "torch.cuda.Stream"] = {}


def _stream(device: torch.device) -> "torch.cuda.Stream":
    """The one for copies; both ways, so that what comes back has been written before."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


def to_host(found: Tensor) -> Tensor:
    """A copy of bytes in pinned memory, which is through when the stream of copies is."""
    if found.device.type == "cpu":
        return torch.frombuffer(bytearray(max(found.nbytes, 1)), dtype=torch.uint8)[: found.nbytes].copy_(found)
    host = torch.empty_like(found, device="cpu", pin_memory=True)
    stream = _stream(found.device)
    stream.wait_stream(torch.cuda.current_stream(found.device))
    with torch.cuda.stream(stream):
        host.copy_(found, non_blocking=True)
    found.record_stream(stream)
    return host


def from_host(host: Tensor, device: torch.device) -> "tuple[Tensor, torch.cuda.Event | None]":
    """A copy on the device, and the event after which it is whole; none on a CPU."""
    if device.type == "cpu":
        return host.clone(), None
    stream = _stream(device)
    with torch.cuda.stream(stream):
        found = torch.empty_like(host, device=device, pin_memory=False)
        found.copy_(host, non_blocking=True)
        return found, stream.record_event()

"""Copies tensors to pinned host memory and back, on a separate stream.

On a CPU this is simulated with memory that torch's allocator does not count, so that measurements there show the memory
of a device.
"""

import torch
from torch import Tensor

_streams: dict[torch.device, "torch.cuda.Stream"] = {}
_copied = 0
# Bytes of the copies that `seconds_per_byte` times.
_SAMPLE = 2**26


def bytes_copied() -> int:
    """The bytes that this process has copied to host memory so far."""
    return _copied


def _stream(device: torch.device) -> "torch.cuda.Stream":
    """The stream for copies in both directions, so that a copy to the device waits for the copy to the host."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


def to_host(data: Tensor) -> Tensor:
    """A copy of bytes in pinned memory, complete once the copy stream is."""
    global _copied
    _copied += data.nbytes
    if data.device.type == "cpu":
        return torch.frombuffer(bytearray(max(data.nbytes, 1)), dtype=torch.uint8)[: data.nbytes].copy_(data)
    host = torch.empty_like(data, device="cpu", pin_memory=True)
    stream = _stream(data.device)
    stream.wait_stream(torch.cuda.current_stream(data.device))
    with torch.cuda.stream(stream):
        host.copy_(data, non_blocking=True)
    data.record_stream(stream)
    return host


def from_host(host: Tensor, device: torch.device) -> "tuple[Tensor, torch.cuda.Event | None]":
    """A copy on the device, and the event after which the copy is complete; None on a CPU."""
    if device.type == "cpu":
        return host.clone(), None
    stream = _stream(device)
    with torch.cuda.stream(stream):
        data = torch.empty_like(host, device=device, pin_memory=False)
        data.copy_(host, non_blocking=True)
        return data, stream.record_event()


def seconds_per_byte(device: torch.device) -> float:
    """The seconds that a copy to host memory or back takes on the copy stream; 0.0 on a CPU, where there is none."""
    if device.type == "cpu":
        return 0.0
    data = torch.empty(_SAMPLE, dtype=torch.uint8, device=device)
    stream = _stream(device)
    seconds = []
    for _ in range(3):
        host = to_host(data)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record(stream)
        from_host(host, device)
        events[1].record(stream)
        events[1].synchronize()
        seconds.append(events[0].elapsed_time(events[1]) / 1e3)
    return min(seconds) / _SAMPLE

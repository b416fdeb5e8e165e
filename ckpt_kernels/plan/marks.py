"""Marks within a training step: the clock and the memory at each, and the most memory between two.

Layers are marked by what runs around their forward (`marking`), and in the backward pass by hooks on the gradients of
what comes out of them and goes into them.
"""

import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..convert.rules.rule import Forward
from ..nested_values import tensors_among
from ..runs import is_repeating

_PREFIX = "ckpt_kernels.plan/"


class Mark(NamedTuple):
    """A place in a step: "forward" begins, or "forward_end", or "backward" begins, or "backward_end", of a layer; the
    "start", the "loss" is there, the "end"."""

    what: str
    layer: int = -1


class Point(NamedTuple):
    """What was read at a mark: seconds, bytes, and the most bytes since the mark before."""

    mark: Mark
    seconds: float
    level: int
    peak: int


class NotAChain(Exception):
    """Why a model's layers cannot be planned for one by one; for people."""


class Recorder:
    """Follows one step of a model whose layers are `marked`."""

    def __init__(self, layers: dict[nn.Module, int], device: torch.device, memory: bool) -> None:
        self._layers = layers
        self._device = device
        self._memory = memory
        self._read: list[Any] = []
        self.marks: list[Mark] = []
        self.is_backward = False
        # By layer: bytes of its output, whether it took the output of the layer before as it was, shapes of arguments.
        self.outputs: dict[int, int] = {}
        self.follows: dict[int, bool] = {}
        self.shapes: dict[int, tuple] = {}
        self._last: tuple[Tensor, int] | None = None
        self._hooks: list[Any] = []

    def mark(self, what: str, layer: int = -1) -> None:
        self.marks.append(Mark(what, layer))
        if self._device.type == "cuda":
            self._read.append(_cuda_now(self._device, self._memory))
        elif self._memory:
            with torch.profiler.record_function(f"{_PREFIX}{len(self.marks) - 1}"):
                pass
        else:
            self._read.append(time.perf_counter())

    def forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        layer = self._layers[module]
        if self.is_backward:
            raise NotAChain("layers run again in the backward pass: turn the model's own checkpointing off for a plan")
        if layer in self.outputs:
            raise NotAChain("a layer is called more than once in a step")
        given = [tensor for tensor in tensors_among((args, kwargs)) if tensor.requires_grad]
        last = self._last
        follows = last is not None and any(t is last[0] and t._version == last[1] for t in given)
        self.follows[layer] = follows
        self.shapes[layer] = tuple((tuple(t.shape), str(t.dtype)) for t in tensors_among((args, kwargs)))
        # The gradient of a tensor that both have to do with is ready for both at once.
        if given and not follows:
            self._hooks.append(given[0].register_hook(self._hook("backward_end", layer)))
        self.outputs[layer] = 0
        self.mark("forward", layer)

    def forward_end(self, module: nn.Module, output: Any) -> None:
        layer = self._layers[module]
        self.mark("forward_end", layer)
        tensors = [tensor for tensor in tensors_among(output) if tensor.requires_grad]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        self.outputs[layer] = sum(storages.values())
        self._last = (tensors[0], tensors[0]._version) if tensors else None
        if tensors and tensors[0].grad_fn is not None:
            self._hooks.append(tensors[0].register_hook(self._hook("backward", layer)))

    def _hook(self, what: str, layer: int) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            self.mark(what, layer)

        return hook

    def run(self, step: Callable[["Recorder"], None]) -> list[Point]:
        """Makes the step, which marks where its loss is there."""
        global _recorder
        before, _recorder = _recorder, self
        try:
            if self._device.type == "cuda" or not self._memory:
                self._marked(step)
                return self._points()
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            ) as profile:
                self._marked(step)
            return self._points_of(profile)
        finally:
            _recorder = before
            self._last = None
            for hook in self._hooks:
                hook.remove()

    def _marked(self, step: Callable[["Recorder"], None]) -> None:
        if self._device.type == "cuda":
            # What was the most before is nothing of this step's.
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        self.mark("start")
        step(self)
        self.mark("end")

    def _points(self) -> list[Point]:
        if self._device.type != "cuda":
            return [Point(mark, seconds, 0, 0) for mark, seconds in zip(self.marks, self._read, strict=True)]
        torch.cuda.synchronize(self._device)
        first, level = self._read[0][0], self._read[0][1]
        return [
            Point(mark, first.elapsed_time(event) / 1e3, now - level, peak - level)
            for mark, (event, now, peak) in zip(self.marks, self._read, strict=True)
        ]

    def _points_of(self, profile: Any) -> list[Point]:
        events = sorted(
            (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]" or _PREFIX in e.name()),
            key=lambda event: event.start_ns(),
        )
        points: list[Point] = []
        level = peak = 0
        for event in events:
            if event.name() == "[memory]":
                level += event.nbytes()
                peak = max(peak, level)
            else:
                mark = self.marks[int(event.name().removeprefix(_PREFIX))]
                points.append(Point(mark, event.start_ns() / 1e9, level, peak))
                peak = level
        if points[0].level:
            raise RuntimeError("memory events before the start of a step; expected none")
        return points


_recorder: Recorder | None = None


def marking(forward: Forward, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A layer's forward, marked where a step is recorded."""
    recorder = _recorder
    if recorder is None or is_repeating() or not torch.is_grad_enabled():
        return forward(module, *args, **kwargs)
    recorder.forward(module, args, kwargs)
    output = forward(module, *args, **kwargs)
    recorder.forward_end(module, output)
    return output


def _cuda_now(device: torch.device, memory: bool) -> tuple[torch.cuda.Event, int, int]:
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    if not memory:
        return event, 0, 0
    level, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return event, level, peak


class Segment(NamedTuple):
    """What lies between two marks: seconds, the bytes that it left, and the most beyond those at its start."""

    seconds: float
    net: int
    peak: int


Where = tuple[str, int]


def segments(points: list[Point]) -> dict[Where, Segment]:
    """What lies between marks, by where it is: ("forward", i) and ("backward", i) of the i-th layer that is called,
    ("forward_gap", i) and ("backward_gap", i) of the code before it, and of the code after the last at the number of
    layers.

    Raises:
        NotAChain: the backward pass does not come to the layers in the reverse order.
    """
    at = {point.mark: index for index, point in enumerate(points)}
    order = [point.mark.layer for point in points if point.mark.what == "forward"]
    ends: list[tuple[Where, int]] = []
    for index, layer in enumerate(order):
        ends.append((("forward_gap", index), at[Mark("forward", layer)]))
        ends.append((("forward", index), at[Mark("forward_end", layer)]))
    ends.append((("forward_gap", len(order)), at[Mark("loss")]))
    for index, layer in reversed(list(enumerate(order))):
        begin = at.get(Mark("backward", layer))
        if begin is None:
            raise NotAChain("no gradient comes to a layer's output")
        next_begin = at.get(Mark("backward", order[index - 1])) if index else None
        next_begin = at[Mark("end")] if next_begin is None else next_begin
        # What goes into several layers has its gradient when the first of them is done.
        end = min(at.get(Mark("backward_end", layer), next_begin), next_begin)
        ends += [(("backward_gap", index + 1), begin), (("backward", index), end)]
    ends.append((("backward_gap", 0), at[Mark("end")]))
    if any(end < start for (_, start), (_, end) in itertools.pairwise(ends)):
        raise NotAChain("the backward pass does not come to the layers in the reverse order of the forward pass")
    found: dict[Where, Segment] = {}
    start = at[Mark("start")]
    for where, end in ends:
        first, last = points[start], points[end]
        peak = max((point.peak for point in points[start + 1 : end + 1]), default=first.level)
        found[where] = Segment(last.seconds - first.seconds, last.level - first.level, max(peak - first.level, 0))
        start = end
    return found


def peak_of(points: list[Point]) -> int:
    """The most bytes of a step, beyond those at its start."""
    return max((point.peak for point in points[1:]), default=0)

"""Records the clock, the allocated memory and its peak at marks within a training step.

In the forward pass `marking`, a wrapper around a layer's forward, marks where the layer begins and ends. In the
backward pass hooks on the gradients of the layer's output and input do.
"""

import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..convert.rules.rule import Forward
from ..host_memory import bytes_copied
from ..memory.peak import profile_of_memory
from ..nested_values import tensors_among
from ..runs import is_repeating
from ..runs.arguments import not_plain_among

_PREFIX = "ckpt_kernels.plan/"


class Mark(NamedTuple):
    """A place in a step.

    The event is "start", "loss" (the loss is computed) or "end"; or, of a layer, "forward" (the pass begins),
    "forward_end", "backward" or "backward_end".
    """

    event: str
    layer: int = -1


class Point(NamedTuple):
    """The readings at a mark: seconds, allocated bytes, and the peak in bytes since the mark before."""

    mark: Mark
    seconds: float
    allocated: int
    peak: int


class NotAChain(Exception):
    """Says, in a user's words, why the layers of a model cannot be planned one by one."""


class Recorder:
    """Follows one step of a model whose layers call `marking`.

    Args:
        layers: the numbers of the layers.
        device: the device of the model.
        memory: whether to record memory too. The times of such a step include the cost of recording.

    Attributes:
        marks: the marks so far.
        is_backward: whether the backward pass has begun.
        outputs: bytes of each layer's output, in the order of the calls.
        follows: whether each layer took the output of the layer before unchanged.
        shapes: shapes and dtypes of the tensors that each layer was called with.
        not_plain: the types of arguments with which a layer is not checkpointed.
        offloaded: the bytes that each layer moved to host memory.
    """

    def __init__(self, layers: dict[nn.Module, int], device: torch.device, memory: bool) -> None:
        self._layers = layers
        self._device = device
        self._memory = memory
        self._readings: list[Any] = []
        # Other work of the machine does not add to the processor time, which is the time of a step of one thread.
        self._clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        self.marks: list[Mark] = []
        self.is_backward = False
        self.outputs: dict[int, int] = {}
        self.follows: dict[int, bool] = {}
        self.shapes: dict[int, tuple] = {}
        self.not_plain: set[type] = set()
        self.offloaded: dict[int, int] = {}
        self._last: tuple[Tensor, int] | None = None
        self._hooks: list[Any] = []

    def mark(self, event: str, layer: int = -1) -> None:
        self.marks.append(Mark(event, layer))
        if self._device.type == "cuda":
            self._readings.append(_cuda_reading(self._device, self._memory))
        elif self._memory:
            with torch.profiler.record_function(f"{_PREFIX}{len(self.marks) - 1}"):
                pass
        else:
            self._readings.append(self._clock())

    def forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Record that a layer's forward pass begins.

        Raises:
            NotAChain: the layer runs in the backward pass, or for the second time.
        """
        layer = self._layers[module]
        if self.is_backward:
            raise NotAChain("layers run again in the backward pass: turn the model's own checkpointing off for a plan")
        if layer in self.outputs:
            raise NotAChain("a layer is called more than once in a step")
        inputs = [tensor for tensor in tensors_among((args, kwargs)) if tensor.requires_grad]
        last = self._last
        follows = last is not None and any(t is last[0] and t._version == last[1] for t in inputs)
        self.follows[layer] = follows
        self.shapes[layer] = tuple((tuple(t.shape), str(t.dtype)) for t in tensors_among((args, kwargs)))
        # If the input is the output of the layer before, the "backward" mark of that layer ends this one.
        if inputs and not follows:
            self._hooks.append(inputs[0].register_hook(self._hook("backward_end", layer)))
        self.not_plain.update(not_plain_among((*args, *kwargs.values())))
        self.outputs[layer] = 0
        self.offloaded[layer] = -bytes_copied()
        self.mark("forward", layer)

    def forward_end(self, module: nn.Module, output: Any) -> None:
        """Record that a layer's forward pass has ended."""
        layer = self._layers[module]
        self.mark("forward_end", layer)
        self.offloaded[layer] += bytes_copied()
        tensors = [tensor for tensor in tensors_among(output) if tensor.requires_grad]
        if not tensors:
            # A layer below which nothing is trained has no backward pass: its work belongs to the code around.
            self.marks[self.marks.index(Mark("forward", layer))] = Mark("forward without gradient", layer)
            del self.outputs[layer], self.follows[layer], self.shapes[layer]
            self._last = None
            return
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
        self.outputs[layer] = sum(storages.values())
        self._last = (tensors[0], tensors[0]._version)
        if tensors[0].grad_fn is not None:
            self._hooks.append(tensors[0].register_hook(self._hook("backward", layer)))

    def _hook(self, event: str, layer: int) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            self.mark(event, layer)

        return hook

    def run(self, step: Callable[["Recorder"], None]) -> list[Point]:
        """Run `step`, which marks "loss" itself, and return the readings."""
        global _recorder
        before, _recorder = _recorder, self
        try:
            if self._device.type == "cuda" or not self._memory:
                self._run_marked(step)
                return self._points()
            with profile_of_memory() as profile:
                self._run_marked(step)
            return self._profiled_points(profile)
        finally:
            _recorder = before
            self._last = None
            for hook in self._hooks:
                hook.remove()

    def _run_marked(self, step: Callable[["Recorder"], None]) -> None:
        if self._device.type == "cuda":
            # The peak so far belongs to earlier work.
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        self.mark("start")
        step(self)
        self.mark("end")

    def _points(self) -> list[Point]:
        if self._device.type != "cuda":
            return [Point(mark, seconds, 0, 0) for mark, seconds in zip(self.marks, self._readings, strict=True)]
        torch.cuda.synchronize(self._device)
        first, at_start = self._readings[0][0], self._readings[0][1]
        return [
            Point(mark, first.elapsed_time(event) / 1e3, allocated - at_start, peak - at_start)
            for mark, (event, allocated, peak) in zip(self.marks, self._readings, strict=True)
        ]

    def _profiled_points(self, profile: Any) -> list[Point]:
        """Return the readings from the memory events and the marks in a profile of torch's profiler."""
        events = sorted(
            (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]" or _PREFIX in e.name()),
            key=lambda event: event.start_ns(),
        )
        points: list[Point] = []
        allocated = peak = 0
        for event in events:
            if event.name() == "[memory]":
                allocated += event.nbytes()
                peak = max(peak, allocated)
            else:
                mark = self.marks[int(event.name().removeprefix(_PREFIX))]
                points.append(Point(mark, event.start_ns() / 1e9, allocated, peak))
                peak = allocated
        if points[0].allocated:
            raise RuntimeError("memory events before the start of a step; expected none")
        return points


_recorder: Recorder | None = None


def marking(forward: Forward, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run a layer's forward, with marks if a step is being recorded."""
    recorder = _recorder
    if recorder is None or is_repeating() or not torch.is_grad_enabled():
        return forward(module, *args, **kwargs)
    recorder.forward(module, args, kwargs)
    output = forward(module, *args, **kwargs)
    recorder.forward_end(module, output)
    return output


def _cuda_reading(device: torch.device, memory: bool) -> tuple[torch.cuda.Event, int, int]:
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    if not memory:
        return event, 0, 0
    allocated, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return event, allocated, peak


class Segment(NamedTuple):
    """The cost between two marks: seconds, the net change in bytes, and the peak above the bytes at the start."""

    seconds: float
    net: int
    peak: int


# A pass and the position of a layer in the order of the calls.
Position = tuple[str, int]


def segments(points: list[Point]) -> dict[Position, Segment]:
    """Split a step into segments.

    The keys are ("forward", i) and ("backward", i) for the i-th called layer, and ("forward_gap", i) and
    ("backward_gap", i) for the code before that layer. Gap n of n layers is the code after the last layer.

    Raises:
        NotAChain: the backward pass does not reach the layers in reverse order.
    """
    at = {point.mark: index for index, point in enumerate(points)}
    order = [point.mark.layer for point in points if point.mark.event == "forward"]
    ends: list[tuple[Position, int]] = []
    for index, layer in enumerate(order):
        ends.append((("forward_gap", index), at[Mark("forward", layer)]))
        ends.append((("forward", index), at[Mark("forward_end", layer)]))
    ends.append((("forward_gap", len(order)), at[Mark("loss")]))
    for index, layer in reversed(list(enumerate(order))):
        begin = at.get(Mark("backward", layer))
        if begin is None:
            raise NotAChain("no gradient comes to the output of a layer whose output requires one")
        next_begin = at.get(Mark("backward", order[index - 1])) if index else None
        next_begin = at[Mark("end")] if next_begin is None else next_begin
        # The gradient of a tensor that several layers read is complete only after the first of these layers.
        end = min(at.get(Mark("backward_end", layer), next_begin), next_begin)
        ends += [(("backward_gap", index + 1), begin), (("backward", index), end)]
    ends.append((("backward_gap", 0), at[Mark("end")]))
    if any(end < start for (_, start), (_, end) in itertools.pairwise(ends)):
        raise NotAChain("the backward pass does not come to the layers in the reverse order of the forward pass")
    result: dict[Position, Segment] = {}
    start = at[Mark("start")]
    for position, end in ends:
        first, last = points[start], points[end]
        base = first.allocated
        peak = max((point.peak for point in points[start + 1 : end + 1]), default=base)
        result[position] = Segment(last.seconds - first.seconds, last.allocated - base, max(peak - base, 0))
        start = end
    return result


def peak_of(points: list[Point]) -> int:
    """Return the peak of a step in bytes above the bytes at the start."""
    return max((point.peak for point in points[1:]), default=0)

"""A run: consecutive calls of layers under one checkpoint, and how the run is repeated."""

import contextlib
import copy
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..autocast import without_shared_casts
from ..bitwise_check import checksum_of, note_difference
from ..call_state import BufferSnapshot
from ..nested_values import tensors_among
from ..random_state import RandomState
from ..recompute import discarding
from ..recompute.cells import is_plain
from ..recompute.discarder import Discarder
from ..saved_tensor_hooks import as_is, steps_aside
from .arguments import Input, Link, Restored, Source, version_checked, version_of, with_sources
from .calls import Call, Place, Saved
from .held import Held
from .state import repeating, thread


class _AllSaved(BaseException):
    """Raised when the last needed tensor has been saved. A BaseException, so that no `except Exception` of a model
    catches it."""


class Run:
    """The calls under one checkpoint."""

    def __init__(self, key: int, depth: int = 0) -> None:
        self._key = key
        self._depth = depth
        self._calls: list[Call] = []
        # The last output of a call by the identity of the tensor, which may be gone.
        self._links: dict[int, tuple[weakref.ref[Tensor], int | None, Link]] = {}
        self._kept: list[tuple[weakref.ref[Tensor], Input]] = []
        self.shapes: dict[torch.Size, torch.Size] = {}
        self._lock = threading.RLock()
        self._has_all_saved = False

    def continues_with(self, place: Place, tensors: Sequence[Tensor]) -> bool:
        """Whether a call with these tensors is the next of the run: one that takes an output of the last call."""
        if not self._calls or place.key != self._key or place.number != self._calls[-1].places[0].number + 1:
            return False
        links = [self._link(tensor) for tensor in tensors if tensor.requires_grad]
        return any(link is not None and link.call == len(self._calls) - 1 for link in links)

    def _link(self, tensor: Tensor) -> Link | None:
        """The link to the output of an earlier call that is this tensor, if the tensor has had no in-place write."""
        output, version, link = self._links.get(id(tensor), (None, None, None))
        return link if output is not None and output() is tensor and version_of(tensor) == version else None

    def call(self, call: Call, held: Held, args: tuple, kwargs: dict[str, Any], tensors: Sequence[Tensor]) -> Any:
        """Runs a call in the first pass. `held` is what the layer holds, and `tensors` are those in the arguments."""
        discarder = discarding()
        call.args = tuple(self._recorded(a, discarder) for a in args)
        call.kwargs = {name: self._recorded(a, discarder) for name, a in kwargs.items()}
        # The layer may ask for gradients within its forward pass. So while it runs, all buffers and generators count as
        # changed.
        call.random = self._random_state(held, tensors)
        call.buffers = [BufferSnapshot(*buffer) for buffer in held.buffers]
        self._calls.append(call)
        if call.states is not None:
            call.states.note_arguments(tensors)

        # A layer that writes to a tensor of which there is no copy cannot run again, and has to keep what it saves.
        may_keep = any(not buffer.is_copied for buffer in call.buffers)

        @steps_aside
        def pack(tensor: Tensor) -> Saved:
            saved = Saved(self, tensor)
            if may_keep:
                saved.fill(tensor.detach(), version_of(tensor))
            call.saved.append(weakref.ref(saved))
            return saved

        is_running = True

        def unpack(saved: Saved) -> Tensor:
            call.reads_own_graph = call.reads_own_graph or is_running
            return saved.get()

        # A cast that an earlier layer made would be made anew in the second pass, and then have a recipe.
        with without_shared_casts(), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            output = call.function(*args, **kwargs)
        is_running = False
        call.end()
        if may_keep and any(buffer.is_written and not buffer.is_copied for buffer in call.buffers):
            self._calls.pop()
            return output
        if may_keep:
            call.forget_saved()
        for number, tensor in enumerate(tensors_among(output)):
            link = Link(len(self._calls) - 1, number)
            self._links[id(tensor)] = weakref.ref(tensor), version_of(tensor), link
        return output

    def _random_state(self, held: Held, tensors: Sequence[Tensor]) -> RandomState:
        """The state of the generators before a call.

        Reading all states takes as long as a small layer, so calls share a state while nothing is drawn.
        """
        before = thread.random
        is_current = before is not None and before.is_current()
        devices = {tensor.device.index for tensor in tensors if tensor.is_cuda}
        if before is not None and is_current and not devices and not held.generators:
            return before
        on_devices = [torch.cuda.default_generators[index] for index in sorted(devices)]
        thread.random = RandomState.now((torch.default_generator, *on_devices, *held.generators), before)
        return thread.random

    def _recorded(self, value: Any, discarder: Discarder | None) -> Any:
        """The recorded form of an argument: tensors are replaced by links and kept inputs."""
        if isinstance(value, tuple):
            return tuple(self._recorded(part, discarder) for part in value)
        if isinstance(value, dict):
            return {key: self._recorded(part, discarder) for key, part in value.items()}
        if not isinstance(value, Tensor):
            return value
        link = self._link(value)
        return self._keep(value, discarder) if link is None else link

    def _keep(self, tensor: Tensor, discarder: Discarder | None) -> Input:
        """The kept input for a tensor that comes from outside the run.

        After an in-place write the first reader's check of the version fails for all readers.
        """
        for known_tensor, known_input in self._kept:
            if known_tensor() is tensor:
                return known_input
        if discarder is not None and not tensor.is_leaf:
            get = discarder.pack(tensor).get
        else:
            get = version_checked(tensor)
        new_input = Input(tensor, get)
        self._kept.append((weakref.ref(tensor), new_input))
        return new_input

    def repeat(self, waiting: "Saved") -> None:
        """Repeats the calls, and fills the placeholders of all tensors that they saved."""
        with self._lock, repeating(), torch.enable_grad(), self._until_all_saved():
            # Another thread may have repeated the run already.
            if waiting.value is not None or waiting.run is not self:
                return
            with RandomState.kept({call.random for call in self._calls}):
                self._repeat_calls()

    @contextlib.contextmanager
    def _until_all_saved(self) -> Iterator[None]:
        """A context that ends with the last needed tensor."""
        self._has_all_saved = False
        try:
            yield
        except _AllSaved:
            pass
        except RuntimeError:
            # A scripted function raises an error of its own for an exception within, which tells nothing of the cause.
            if not self._has_all_saved:
                raise

    def _end(self) -> NoReturn:
        self._has_all_saved = True
        raise _AllSaved

    def _repeat_calls(self) -> None:
        restored = Restored([(*call.args, *call.kwargs.values()) for call in self._calls])
        groups = self._inner_runs()
        start = 0
        for group in groups:
            is_last = group is groups[-1]
            if group[0].places[self._depth + 1 :]:
                self._begin_inner_run(group, start, restored, is_last)
            else:
                for number, call in enumerate(group, start):
                    self._repeat_call(call, number, restored, is_last and call is group[-1])
            start += len(group)

    def _inner_runs(self) -> list[list[Call]]:
        """The calls, grouped by inner run; a call in no inner run forms a separate group."""
        groups: list[list[Call]] = []
        key = None
        for call in self._calls:
            inner = call.places[self._depth + 1 :]
            if inner and inner[0].key == key:
                groups[-1].append(call)
            else:
                groups.append([call])
            key = inner[0].key if inner else None
        return groups

    def _repeat_call(self, call: Call, number: int, restored: Restored, is_last: bool) -> None:
        """Repeats one call and fills the placeholders."""
        waiting = list(call.saved)
        count = 0

        @steps_aside
        def collect(tensor: Tensor) -> Tensor:
            nonlocal count
            if count >= len(waiting):
                raise RuntimeError("a checkpointed layer saves more tensors than it did at first: is it random?")
            saved = waiting[count]()
            count += 1
            value = tensor.detach()
            version = version_of(value)
            if call.restored and is_plain(value):
                buffer = call.restored.get(value.untyped_storage()._cdata)
                value, version = (value, version) if buffer is None else buffer.saved(value)
            if saved is not None:
                if (saved.shape, saved.dtype) != (tensor.shape, tensor.dtype):
                    raise RuntimeError(
                        f"a checkpointed layer saves {tensor.dtype} {tuple(tensor.shape)}; expected {saved.dtype} "
                        f"{tuple(saved.shape)}, as at first: does it decide at random?"
                    )
                saved.fill(value, version)
                if saved.checksum is not None and saved.checksum != checksum_of(tensor):
                    note_difference(call.module)
            if is_last and count == len(waiting):
                self._end()
            return value

        if is_last and not waiting:
            self._end()
        with torch.autograd.graph.saved_tensors_hooks(collect, as_is):
            self._run_again(call, number, restored)
        if count != len(waiting):
            raise RuntimeError(
                f"a checkpointed layer saves {count} tensors; expected {len(waiting)}, as at first: is it random?"
            )

    def _begin_inner_run(self, calls: list[Call], start: int, restored: Restored, is_last: bool) -> None:
        """Creates an inner run, which keeps only the inputs of the first call, and repeats the calls without saving."""
        inner = Run(calls[0].places[self._depth + 1].key, self._depth + 1)
        kept: dict[Source, Input] = {}

        def inner_source(source: Source) -> Source:
            """A link or input of this run, as one of the inner run. Outputs of earlier calls are kept."""
            if isinstance(source, Link) and source.call >= start:
                return Link(source.call - start, source.output)
            if source not in kept:
                # Outer hooks may unpack only once.
                tensor = restored.tensor(source)
                kept[source] = Input(tensor, version_checked(tensor))
            return kept[source]

        for call in calls:
            repeated = copy.copy(call)
            repeated.args = with_sources(call.args, inner_source)
            repeated.kwargs = with_sources(call.kwargs, inner_source)
            inner._calls.append(repeated)
            for reference in call.saved:
                if (saved := reference()) is not None:
                    saved.run = inner
        if is_last:
            self._end()
        for number, call in enumerate(calls, start):
            with _kept_within() if call.reads_own_graph else torch.autograd.graph.saved_tensors_hooks(_drop, as_is):
                self._run_again(call, number, restored)

    def _run_again(self, call: Call, number: int, restored: Restored) -> None:
        """Repeats a call for its outputs."""
        args, kwargs = restored.argument(call.args), restored.argument(call.kwargs)
        restored.end_call(number, call.repeat(args, kwargs, alone=len(self._calls) == 1))


@contextlib.contextmanager
def _kept_within() -> Iterator[None]:
    """A context that keeps all saved tensors, and drops them at its end."""
    kept: list[Tensor] = []

    @steps_aside
    def keep(tensor: Tensor) -> int:
        # Detached, because a node that keeps its own output would keep itself alive.
        kept.append(tensor.detach())
        return len(kept) - 1

    with torch.autograd.graph.saved_tensors_hooks(keep, kept.__getitem__):
        yield
    kept.clear()


@steps_aside
def _drop(tensor: Tensor) -> None:
    return None

"""A run: calls of layers in a row under one checkpoint, and how they are made again."""

import contextlib
import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from ..bitwise_check import checksum_of, note_difference
from ..call_state import Buffer, RandomState
from ..convert.loads import modules_of
from ..nested_values import tensors_among
from ..recompute import discarding
from ..recompute.discarder import Discarder
from ..saved_tensor_hooks import as_is
from .arguments import Input, Link, loaded, version_checked, version_of
from .calls import Call, Place, Saved
from .state import repeating


class _Done(BaseException):
    """The last tensor that is needed is there. No `except Exception` of a model's is to swallow it."""


class Run:
    """The calls under one checkpoint."""

    def __init__(self, key: int, depth: int = 0) -> None:
        self._key = key
        self._depth = depth
        self._calls: list[Call] = []
        # With the versions that they were kept at: one that was written to since is another argument.
        self._kept: list[tuple[weakref.ref[Tensor], int | None, Input]] = []
        self._lock = threading.RLock()

    def continues_with(self, place: Place, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether a call is the next of the run: one that takes what the last has given."""
        if place.key != self._key or place.number != self._calls[-1].places[0].number + 1:
            return False
        links = [self._link(tensor) for tensor in tensors_among((args, kwargs)) if tensor.requires_grad]
        return any(link is not None and link.call == len(self._calls) - 1 for link in links)

    def _link(self, tensor: Tensor) -> Link | None:
        for index in reversed(range(len(self._calls))):
            for number, (output, version) in enumerate(self._calls[index].outputs):
                if output() is tensor:
                    return Link(index, number) if version_of(tensor) == version else None
        return None

    def call(self, call: Call, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A call of the first pass."""
        discarder = discarding()
        call.args = tuple(self._noted(a, discarder) for a in args)
        call.kwargs = {name: self._noted(a, discarder) for name, a in kwargs.items()}
        self._calls.append(call)
        buffers = [Buffer(b, m) for m in modules_of(call.module) for b in m._buffers.values() if b is not None]
        # As long as it runs, for a layer that asks for gradients within its forward, all may have moved.
        call.random = RandomState.now(call.module, args, kwargs)
        call.written = buffers

        def pack(tensor: Tensor) -> Saved:
            saved = Saved(self, tensor)
            call.saved.append(weakref.ref(saved))
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, Saved.get):
            output = call.function(*args, **kwargs)
        if call.random.is_now():
            call.random = None
        call.written = [buffer for buffer in buffers if buffer.is_written()]
        call.outputs = [(weakref.ref(tensor), version_of(tensor)) for tensor in tensors_among(output)]
        return output

    def _noted(self, value: Any, discarder: Discarder | None) -> Any:
        if isinstance(value, tuple):
            return tuple(self._noted(part, discarder) for part in value)
        if isinstance(value, dict):
            return {key: self._noted(part, discarder) for key, part in value.items()}
        if not isinstance(value, Tensor):
            return value
        link = self._link(value)
        return self._keep(value, discarder) if link is None else link

    def _keep(self, tensor: Tensor, discarder: Discarder | None) -> Input:
        version = version_of(tensor)
        for known, at, noted in self._kept:
            if known() is tensor and at == version:
                return noted
        if discarder is not None and tensor.requires_grad and not tensor.is_leaf:
            get = discarder.pack(tensor).get
        else:
            get = version_checked(tensor)
        made = Input(get, tensor.requires_grad)
        self._kept.append((weakref.ref(tensor), version, made))
        return made

    def repeat(self, waiting: "Saved") -> None:
        """Makes the calls again, and gives all that wait what they saved."""
        with self._lock, repeating(), torch.enable_grad(), contextlib.suppress(_Done):
            # Another thread may have been first.
            if waiting.value is not None or waiting.run is not self:
                return
            inputs: dict[int, Tensor] = {}
            outputs: list[list[Tensor]] = []
            pieces = self._pieces()
            for number, piece in enumerate(pieces):
                is_last = number == len(pieces) - 1
                if piece[0].places[self._depth + 1 :]:
                    self._begin_within(piece, inputs, outputs, is_last)
                else:
                    for call in piece:
                        self._again(call, inputs, outputs, is_last and call is piece[-1])

    def _pieces(self) -> list[list[Call]]:
        """The calls by the runs within this one that they are in; each other one by itself."""
        pieces: list[list[Call]] = []
        for call in self._calls:
            within = call.places[self._depth + 1 :]
            if within and within[0].number and pieces and _key(pieces[-1][0], self._depth) == within[0].key:
                pieces[-1].append(call)
            else:
                pieces.append([call])
        return pieces

    def _again(self, call: Call, inputs: dict[int, Tensor], outputs: list[list[Tensor]], is_last: bool) -> None:
        waiting = list(call.saved)
        count = 0

        def collect(tensor: Tensor) -> Tensor:
            nonlocal count
            if count >= len(waiting):
                raise RuntimeError("a checkpointed layer saves more tensors than it did at first: is it random?")
            saved = waiting[count]()
            count += 1
            value = tensor.detach()
            if saved is not None:
                if (saved.shape, saved.dtype) != (tensor.shape, tensor.dtype):
                    raise RuntimeError(
                        f"a checkpointed layer saves {tensor.dtype} {tuple(tensor.shape)}; expected {saved.dtype} "
                        f"{tuple(saved.shape)}, as at first: does it decide at random?"
                    )
                saved.value = value
                if saved.bits is not None and saved.bits != checksum_of(tensor):
                    note_difference(call.module)
            if is_last and count == len(waiting):
                raise _Done
            return value

        if is_last and not waiting:
            raise _Done
        with torch.autograd.graph.saved_tensors_hooks(collect, as_is):
            outputs.append(self._made(call, inputs, outputs))
        if count != len(waiting):
            raise RuntimeError(
                f"a checkpointed layer saves {count} tensors; expected {len(waiting)}, as at first: is it random?"
            )

    def _begin_within(
        self, calls: list[Call], inputs: dict[int, Tensor], outputs: list[list[Tensor]], is_last: bool
    ) -> None:
        """A run within this one: nothing of its calls is kept now but what goes into the first."""
        within = Run(calls[0].places[self._depth + 1].key, self._depth + 1)
        start = len(outputs)
        for call in calls:
            again = Call(call.function, call.module, call.places)
            again.random, again.written, again.autocast = call.random, call.written, call.autocast
            again.backend, again.parameters = call.backend, call.parameters
            again.saved = call.saved
            again.args = tuple(within._moved(a, start, inputs, outputs) for a in call.args)
            again.kwargs = {name: within._moved(a, start, inputs, outputs) for name, a in call.kwargs.items()}
            within._calls.append(again)
            for reference in call.saved:
                if (saved := reference()) is not None:
                    saved.run = within
        if is_last:
            raise _Done
        for call in calls:
            with torch.autograd.graph.saved_tensors_hooks(_dropped, as_is):
                outputs.append(self._made(call, inputs, outputs))

    def _moved(self, noted: Any, start: int, inputs: dict[int, Tensor], outputs: list[list[Tensor]]) -> Any:
        """An argument of the outer run as one of this: what comes from calls before this run's first is kept."""
        if isinstance(noted, Link):
            if noted.call >= start:
                return Link(noted.call - start, noted.output)
            tensor = outputs[noted.call][noted.output]
            return Input(version_checked(tensor.detach()), tensor.requires_grad)
        if isinstance(noted, Input):
            # Hooks around may give it only once.
            return Input(version_checked(loaded(noted, inputs, outputs).detach()), noted.requires_grad)
        if isinstance(noted, tuple):
            return tuple(self._moved(part, start, inputs, outputs) for part in noted)
        if isinstance(noted, dict):
            return {key: self._moved(part, start, inputs, outputs) for key, part in noted.items()}
        return noted

    def _made(self, call: Call, inputs: dict[int, Tensor], outputs: list[list[Tensor]]) -> list[Tensor]:
        args = [loaded(a, inputs, outputs) for a in call.args]
        kwargs = {name: loaded(a, inputs, outputs) for name, a in call.kwargs.items()}
        return call.again(args, kwargs, alone=len(self._calls) == 1)


def _key(call: Call, depth: int) -> int | None:
    within = call.places[depth + 1 :]
    return within[0].key if within else None


def _dropped(tensor: Tensor) -> None:
    return None

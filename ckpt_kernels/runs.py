"""Checkpoints that span several calls: layers in a row keep the input of the first alone, and run again.

`torch.utils.checkpoint` needs one function for all that is to run again. A model calls its layers one by one, from a
loop of its own, and what the loop does between two calls is its own affair. So a `Run` follows the calls: while each
layer runs, its saved tensors are dropped, and its arguments are noted; those that are outputs of the run's own earlier
calls, the very tensors, unwritten, are noted as such and not kept. When the backward pass first asks for a tensor, all
calls of the run are made again from what is kept, up to the last tensor that was saved. A call whose arguments do not
come from the one before begins another run: a loop that does more than hand on costs memory, and never a wrong number.

As in torch's checkpoint, random numbers and autocast are as they were, and the number, shapes and dtypes of what is
saved are held against the first time. Beyond it, buffers that the first pass wrote to in place, such as running
statistics, are for the second what they were, and are not moved by it; a layer's arguments and parameters must not have
been written to since.
"""

import contextlib
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import backends
from .call_state import Buffer, RandomState, autocast_now
from .convert.loads import modules_of
from .discarder import Discarder
from .provenance import tensors_among
from .recompute import discarding
from .watching import bits_of, note_difference

# What may be handed to a layer that is to run again: nothing that a layer writes to and somebody else reads.
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


class Place(NamedTuple):
    """Where a layer is in a run: the run's key, how many layers are before this one, and whether it is the last."""

    key: int
    place: int
    is_last: bool


class _Saved:
    """What the graph holds in the place of a tensor that a layer saved."""

    __slots__ = ("__weakref__", "bits", "dtype", "run", "shape", "value")

    def __init__(self, run: "Run", tensor: Tensor) -> None:
        self.run = run
        self.shape = tensor.shape
        self.dtype = tensor.dtype
        self.bits = bits_of(tensor)
        self.value: Tensor | None = None

    def get(self) -> Tensor:
        repeated = None
        while self.value is None:
            # A run that is repeated may leave it to one within.
            if self.run is repeated:
                raise RuntimeError("a checkpointed layer did not save a tensor again that it saved at first")
            repeated = self.run
            repeated.repeat(self)
        return self.value


class _Link(NamedTuple):
    """An argument that is an output of an earlier call of the run."""

    call: int
    output: int


class _Input(NamedTuple):
    """An argument that is kept: the tensor, or what a context around keeps in its place."""

    get: Callable[[], Tensor]
    requires_grad: bool


class _Call:
    """A layer's call, and how to make it again."""

    def __init__(self, function: Callable[..., Any], module: nn.Module, places: Sequence[Place]) -> None:
        self.function = function
        self.module = module
        self.places = places
        self.args: tuple = ()
        self.kwargs: dict[str, Any] = {}
        self.saved: list[weakref.ref[_Saved]] = []
        self.outputs: list[tuple[weakref.ref[Tensor], int | None]] = []
        self.written: list[Buffer] = []
        self.random: RandomState | None = None
        self.autocast = autocast_now()
        self.backend = backends.chosen()
        self.parameters = _versions_of(module)


class _Done(BaseException):
    """The last tensor that is needed is there. No `except Exception` of a model's is to swallow it."""


class _Thread(threading.local):
    def __init__(self) -> None:
        # The run that the next layer may go on with; and whether a layer of one runs, or runs again.
        self.open: weakref.ref[Run] | None = None
        self.within = False
        self.repeating = False


_thread = _Thread()


def run_in(
    places: Sequence[Place],
    inside: Callable[..., Any],
    module: nn.Module,
    args: tuple,
    kwargs: dict[str, Any],
) -> Any:
    """Calls a layer, `inside(*args, **kwargs)`, as a part of a run.

    Args:
        places: where the layer is in the run, and in the runs within that one which are made when it runs again.
        inside: what computes the layer's result, without the runs.
        module: the layer.
        args, kwargs: of the call.
    """
    hooks: Any = torch._C._autograd  # of which not all is in torch's stubs
    # What is in a checkpoint already needs none of its own; under torch.func there are none.
    is_within = _thread.within or _thread.repeating
    if is_within or not torch.is_grad_enabled() or not hooks._saved_tensors_hooks_is_enabled():
        return inside(*args, **kwargs)
    if not _are_plain((*args, *kwargs.values())):
        return inside(*args, **kwargs)
    place = places[0]
    run = None if _thread.open is None else _thread.open()
    _thread.open = None
    if run is None or not run.goes_on(place, args, kwargs):
        run = Run(place.key)
    _thread.within = True
    try:
        output = run.call(_Call(inside, module, places), args, kwargs)
    finally:
        _thread.within = False
    if not place.is_last:
        _thread.open = weakref.ref(run)
    return output


def _are_plain(values: Sequence[Any]) -> bool:
    for value in values:
        if type(value) in (tuple, dict):
            if not _are_plain(tuple(value.values()) if isinstance(value, dict) else value):
                return False
        elif not (isinstance(value, _PLAIN) or (isinstance(value, Tensor) and value.layout is torch.strided)):
            return False
    return True


class Run:
    """The calls under one checkpoint."""

    def __init__(self, key: int, depth: int = 0) -> None:
        self._key = key
        self._depth = depth
        self._calls: list[_Call] = []
        # With the versions that they were kept at: one that was written to since is another argument.
        self._kept: list[tuple[weakref.ref[Tensor], int | None, _Input]] = []
        self._lock = threading.RLock()

    def goes_on(self, place: Place, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether a call is the next of the run: one that takes what the last has given."""
        if place.key != self._key or place.place != self._calls[-1].places[0].place + 1:
            return False
        links = [self._link(tensor) for tensor in tensors_among((args, kwargs)) if tensor.requires_grad]
        return any(link is not None and link.call == len(self._calls) - 1 for link in links)

    def _link(self, tensor: Tensor) -> _Link | None:
        for index in reversed(range(len(self._calls))):
            for number, (output, version) in enumerate(self._calls[index].outputs):
                if output() is tensor:
                    return _Link(index, number) if _version_of(tensor) == version else None
        return None

    def call(self, call: _Call, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A call of the first pass."""
        discarder = discarding()
        call.args = tuple(self._noted(a, discarder) for a in args)
        call.kwargs = {name: self._noted(a, discarder) for name, a in kwargs.items()}
        self._calls.append(call)
        buffers = [Buffer(b, m) for m in modules_of(call.module) for b in m._buffers.values() if b is not None]
        # As long as it runs, for a layer that asks for gradients within its forward, all may have moved.
        call.random = RandomState.now(call.module, args, kwargs)
        call.written = buffers

        def pack(tensor: Tensor) -> _Saved:
            saved = _Saved(self, tensor)
            call.saved.append(weakref.ref(saved))
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, _Saved.get):
            output = call.function(*args, **kwargs)
        if call.random.is_now():
            call.random = None
        call.written = [buffer for buffer in buffers if buffer.is_written()]
        call.outputs = [(weakref.ref(tensor), _version_of(tensor)) for tensor in tensors_among(output)]
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

    def _keep(self, tensor: Tensor, discarder: Discarder | None) -> _Input:
        version = _version_of(tensor)
        for known, at, noted in self._kept:
            if known() is tensor and at == version:
                return noted
        if discarder is not None and tensor.requires_grad and not tensor.is_leaf:
            get = discarder.pack(tensor).get
        else:
            get = _unwritten(tensor)
        made = _Input(get, tensor.requires_grad)
        self._kept.append((weakref.ref(tensor), version, made))
        return made

    def repeat(self, waiting: "_Saved") -> None:
        """Makes the calls again, and gives all that wait what they saved."""
        with self._lock, _repeating(), torch.enable_grad(), contextlib.suppress(_Done):
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

    def _pieces(self) -> list[list[_Call]]:
        """The calls by the runs within this one that they are in; each other one by itself."""
        pieces: list[list[_Call]] = []
        for call in self._calls:
            within = call.places[self._depth + 1 :]
            if within and within[0].place and pieces and _key(pieces[-1][0], self._depth) == within[0].key:
                pieces[-1].append(call)
            else:
                pieces.append([call])
        return pieces

    def _again(self, call: _Call, inputs: dict[int, Tensor], outputs: list[list[Tensor]], is_last: bool) -> None:
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
                if saved.bits is not None and saved.bits != bits_of(tensor):
                    note_difference(call.module)
            if is_last and count == len(waiting):
                raise _Done
            return value

        if is_last and not waiting:
            raise _Done
        with torch.autograd.graph.saved_tensors_hooks(collect, _same):
            outputs.append(self._made(call, inputs, outputs))
        if count != len(waiting):
            raise RuntimeError(
                f"a checkpointed layer saves {count} tensors; expected {len(waiting)}, as at first: is it random?"
            )

    def _begin_within(
        self, calls: list[_Call], inputs: dict[int, Tensor], outputs: list[list[Tensor]], is_last: bool
    ) -> None:
        """A run within this one: nothing of its calls is kept now but what goes into the first."""
        within = Run(calls[0].places[self._depth + 1].key, self._depth + 1)
        start = len(outputs)
        for call in calls:
            again = _Call(call.function, call.module, call.places)
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
            with torch.autograd.graph.saved_tensors_hooks(_dropped, _same):
                outputs.append(self._made(call, inputs, outputs))

    def _moved(self, noted: Any, start: int, inputs: dict[int, Tensor], outputs: list[list[Tensor]]) -> Any:
        """An argument of the outer run as one of this: what comes from calls before this run's first is kept."""
        if isinstance(noted, _Link):
            if noted.call >= start:
                return _Link(noted.call - start, noted.output)
            tensor = outputs[noted.call][noted.output]
            return _Input(_unwritten(tensor.detach()), tensor.requires_grad)
        if isinstance(noted, _Input):
            # Hooks around may give it only once.
            return _Input(_unwritten(_loaded(noted, inputs, outputs).detach()), noted.requires_grad)
        if isinstance(noted, tuple):
            return tuple(self._moved(part, start, inputs, outputs) for part in noted)
        if isinstance(noted, dict):
            return {key: self._moved(part, start, inputs, outputs) for key, part in noted.items()}
        return noted

    def _made(self, call: _Call, inputs: dict[int, Tensor], outputs: list[list[Tensor]]) -> list[Tensor]:
        args = [_loaded(a, inputs, outputs) for a in call.args]
        kwargs = {name: _loaded(a, inputs, outputs) for name, a in call.kwargs.items()}
        # A layer that is sharded gathers its weights in its hooks; of one layer the backward pass has gathered them.
        function = call.module if len(self._calls) > 1 and is_sharded(call.module) else call.function
        for parameter, version in call.parameters:
            if parameter._version != version:
                raise RuntimeError(
                    f"a parameter of a checkpointed layer, {parameter.dtype} {tuple(parameter.shape)}, was modified by "
                    f"an in-place operation since: it is at version {parameter._version}; expected version {version}"
                )
        with contextlib.ExitStack() as stack:
            stack.enter_context(backends.serving(call.backend))
            for buffer in call.written:
                stack.enter_context(buffer.as_before())
            if call.random is not None:
                stack.enter_context(call.random.again())
            for device, options in call.autocast:
                stack.enter_context(torch.autocast(device, **options))
            return list(tensors_among(function(*args, **kwargs)))


class _FromOutside(torch.autograd.Function):
    """The identity: inputs of the second pass have a node behind them, as at first, of which no recipe is known."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        return input.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0]


def is_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` has been called on a module."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def _key(call: _Call, depth: int) -> int | None:
    within = call.places[depth + 1 :]
    return within[0].key if within else None


def _loaded(noted: Any, inputs: dict[int, Tensor], outputs: list[list[Tensor]]) -> Any:
    if isinstance(noted, _Link):
        return outputs[noted.call][noted.output]
    if isinstance(noted, _Input):
        if id(noted) not in inputs:
            tensor = noted.get()
            inputs[id(noted)] = _FromOutside.apply(tensor.detach().requires_grad_()) if noted.requires_grad else tensor
        return inputs[id(noted)]
    if isinstance(noted, tuple):
        return tuple(_loaded(part, inputs, outputs) for part in noted)
    if isinstance(noted, dict):
        return {key: _loaded(part, inputs, outputs) for key, part in noted.items()}
    return noted


def _unwritten(tensor: Tensor) -> Callable[[], Tensor]:
    """The tensor, if nobody has written to it by then."""
    version = _version_of(tensor)
    held = tensor if tensor.is_leaf else tensor.detach()

    def get() -> Tensor:
        if version is not None and held._version != version:
            raise RuntimeError(
                f"an argument of a checkpointed layer, {held.dtype} {tuple(held.shape)}, was modified by an in-place "
                f"operation since: it is at version {held._version}; expected version {version}"
            )
        return held

    return get


def _versions_of(module: nn.Module) -> list[tuple[nn.Parameter, int]]:
    """Of a module's parameters, where these are not gathered and given back under them, as sharding does."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return []
    return [
        (parameter, parameter._version)
        for below in modules_of(module)
        for parameter in below._parameters.values()
        if parameter is not None and not parameter.is_inference()
    ]


def _version_of(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _dropped(tensor: Tensor) -> None:
    return None


@contextlib.contextmanager
def _repeating() -> Iterator[None]:
    before, _thread.repeating = _thread.repeating, True
    open_run, _thread.open = _thread.open, None
    try:
        yield
    finally:
        _thread.repeating, _thread.open = before, open_run


def is_repeating() -> bool:
    """Whether this thread runs layers again for a backward pass."""
    return _thread.repeating

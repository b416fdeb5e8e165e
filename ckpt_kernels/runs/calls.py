"""A layer's call, with everything that is needed to repeat the call exactly."""

import contextlib
import operator
import sys
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import backends
from ..autocast import without_shared_casts
from ..bitwise_check import checksum_of
from ..call_state import BufferSnapshot, autocast_state
from ..nested_values import tensors_among
from ..random_state import RandomState
from ..recompute.biases import address_of
from .arguments import version_of
from .held import Held

if TYPE_CHECKING:
    from .run import Run


_CAN_BE_DISTRIBUTED = torch.distributed.is_available()
_VERSION = operator.attrgetter("_version")


class Place(NamedTuple):
    """The place of a layer in a run: the key of the run, the number of layers before, and whether the layer is the
    last."""

    key: int
    number: int
    is_last: bool


class Saved:
    """The placeholder that the autograd graph holds for a tensor that a layer saved."""

    __slots__ = ("__weakref__", "_version", "checksum", "dtype", "run", "shape", "value")

    def __init__(self, run: "Run", tensor: Tensor) -> None:
        self.run = run
        shape = tensor.shape
        # Shared, because Python's garbage collector visits all shapes that live.
        self.shape = run.shapes.setdefault(shape, shape)
        self.dtype = tensor.dtype
        self.checksum = checksum_of(tensor)
        self.value: Tensor | None = None
        self._version: int | None = None

    def fill(self, value: Tensor, version: int | None) -> None:
        """Sets the value that the repeated run has saved, and the version of the value at the end of that run."""
        self.value, self._version = value, version

    def get(self) -> Tensor:
        """The value, which the rest of the repeated run must not have written to, as autograd demands of any run."""
        repeated = None
        while self.value is None:
            # A repeated run may leave the tensor to an inner run.
            if self.run is repeated:
                raise RuntimeError("a checkpointed layer did not save a tensor again that it saved at first")
            repeated = self.run
            repeated.repeat(self)
        if self._version is not None and self.value._version != self._version:
            raise RuntimeError(
                "a tensor that a checkpointed layer saved for the backward pass, "
                f"{self.dtype} {tuple(self.shape)}, was modified by an in-place operation: it is at version "
                f"{self.value._version}; expected version {self._version}"
            )
        return self.value


class Call:
    """A layer's call, and how to repeat it. The run sets `random`, the state of the generators before the call, and
    `reads_own_graph`, whether the layer asked for gradients within its forward pass."""

    random: RandomState
    reads_own_graph = False
    # The buffers that have earlier values while the call is repeated, by the address of their storages.
    restored: Mapping[int, BufferSnapshot] = types.MappingProxyType({})
    # Whether the forward pass has changed gradients of the layer's leaves.
    adds_gradients = False

    def __init__(self, function: Callable[..., Any], module: nn.Module, places: Sequence[Place], held: Held) -> None:
        self.function = function
        self.module = module
        self.places = places
        self.args: tuple = ()
        self.kwargs: dict[str, Any] = {}
        self.saved: list[weakref.ref[Saved]] = []
        self.buffers: list[BufferSnapshot] = []
        self.autocast = autocast_state()
        self.backend = backends.chosen()
        # In distributed runs sharding exchanges, gathers and frees parameters between the passes.
        is_distributed = _CAN_BE_DISTRIBUTED and torch.distributed.is_initialized()
        self.parameters = [] if is_distributed else held.parameters
        self.memory = _memory_of(self.parameters)
        attributes = [] if is_distributed else [buffer for buffer, _ in held.buffers]
        self.trained = [t for t in (*self.parameters, *attributes) if t.requires_grad and t.is_leaf]
        self.gradients = _gradients_of(self.trained)
        self.states = None if is_distributed else held.states

    def end(self) -> None:
        """Finds out, after the first pass, what the call has written to."""
        for buffer in self.buffers:
            buffer.end_call()
        if self.states is not None:
            self.states.forget_unread()
        self.adds_gradients = self.adds_gradients or _gradients_of(self.trained) != self.gradients

    def forget_saved(self) -> None:
        """Drops the values that the first pass has saved."""
        for reference in self.saved:
            if (saved := reference()) is not None:
                saved.value = None

    def repeat(self, args: tuple, kwargs: dict[str, Any], alone: bool) -> list[Tensor]:
        """Repeats the call with the random numbers, autocast, backend, buffers and modules' states of the first pass.
        Returns the result's tensors. The run restores the generators afterwards."""
        before, now = self.memory, _memory_of(self.parameters)
        for parameter, was, found in zip(self.parameters, before, now, strict=True) if now != before else ():
            if found != was:
                raise RuntimeError(
                    f"a parameter of a checkpointed layer, {parameter.dtype} {tuple(parameter.shape)}, was modified by "
                    f"an in-place operation since, or given other memory: it is at version {found[0]}; expected "
                    f"version {was[0]} and the same memory"
                )
        # A sharded layer gathers its weights in hooks of the module. For a single layer the backward pass has gathered
        # them.
        function = self.module if not alone and is_sharded(self.module) else self.function
        # The state is restored also if nothing was drawn: a layer may put a generator's state back itself.
        self.random.restore()
        with contextlib.ExitStack() as stack:
            if self.states is not None:
                stack.enter_context(self.states.restored(list(tensors_among((args, kwargs)))))
            restored = [buffer for buffer in self.buffers if buffer.is_needed()]
            for buffer in restored:
                stack.enter_context(buffer.restored())
            self.restored = {buffer.tensor.untyped_storage()._cdata: buffer for buffer in restored}
            if backends.chosen() != self.backend:
                stack.enter_context(backends.serving(self.backend))
            if autocast_state() != self.autocast:
                for device, options in self.autocast:
                    stack.enter_context(torch.autocast(device, **options))
            stack.enter_context(without_shared_casts())
            if self.reads_own_graph or self.adds_gradients:
                stack.enter_context(_apart_from_gradients(self.trained))
            return list(tensors_among(function(*args, **kwargs)))


@contextlib.contextmanager
def _apart_from_gradients(parameters: Sequence[Tensor]) -> Iterator[None]:
    """A context whose backward passes do not reach the gradients of the parameters: the first pass has added theirs."""
    gradients = [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient


def _gradients_of(leaves: Sequence[Tensor]) -> list[tuple[int, int | None] | None]:
    """The identity and the version of each leaf's gradient."""
    gradients = [leaf.grad for leaf in leaves]
    return [None if gradient is None else (id(gradient), version_of(gradient)) for gradient in gradients]


def _memory_of(parameters: Sequence[nn.Parameter]) -> list[tuple[int | None, int]]:
    """The version and the address of each parameter."""
    try:
        return list(zip(map(_VERSION, parameters), map(Tensor.data_ptr, parameters), strict=True))
    except RuntimeError:  # inference tensors have no version, and some subclasses no address
        return [(version_of(parameter), address_of(parameter)) for parameter in parameters]


def is_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` has been called on a module."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)

"""A layer's call, with everything that is needed to repeat the call exactly."""

import contextlib
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import backends
from ..bitwise_check import checksum_of
from ..call_state import BufferSnapshot, autocast_state
from ..nested_values import tensors_among
from ..random_state import RandomState
from ..recompute.biases import address_of
from .held import Held
from .module_state import restored

if TYPE_CHECKING:
    from .run import Run


class Place(NamedTuple):
    """The place of a layer in a run: the key of the run, the number of layers before, and whether the layer is the
    last."""

    key: int
    number: int
    is_last: bool


class Saved:
    """The placeholder that the autograd graph holds for a tensor that a layer saved."""

    __slots__ = ("__weakref__", "checksum", "dtype", "run", "shape", "value")

    def __init__(self, run: "Run", tensor: Tensor) -> None:
        self.run = run
        self.shape = tensor.shape
        self.dtype = tensor.dtype
        self.checksum = checksum_of(tensor)
        self.value: Tensor | None = None

    def get(self) -> Tensor:
        repeated = None
        while self.value is None:
            # A repeated run may leave the tensor to an inner run.
            if self.run is repeated:
                raise RuntimeError("a checkpointed layer did not save a tensor again that it saved at first")
            repeated = self.run
            repeated.repeat(self)
        return self.value


class Call:
    """A layer's call, and how to repeat it. The run sets `random`, the state of the generators before the call."""

    random: RandomState

    def __init__(self, function: Callable[..., Any], module: nn.Module, places: Sequence[Place], held: Held) -> None:
        self.function = function
        self.module = module
        self.places = places
        self.args: tuple = ()
        self.kwargs: dict[str, Any] = {}
        self.saved: list[weakref.ref[Saved]] = []
        self.written: list[BufferSnapshot] = []
        self.autocast = autocast_state()
        self.backend = backends.chosen()
        # In distributed runs sharding exchanges, gathers and frees parameters between the passes.
        is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.parameters = () if is_distributed else _versions_of(held.parameters)
        self.states = () if is_distributed else held.states

    def repeat(self, args: list[Any], kwargs: dict[str, Any], alone: bool) -> list[Tensor]:
        """Repeats the call with the random numbers, autocast, backend, buffers and modules' states of the first pass.
        Returns the result's tensors."""
        for parameter, version, address in self.parameters:
            if parameter._version != version or address_of(parameter) != address:
                raise RuntimeError(
                    f"a parameter of a checkpointed layer, {parameter.dtype} {tuple(parameter.shape)}, was modified by "
                    f"an in-place operation since, or given other memory: it is at version {parameter._version}; "
                    f"expected version {version} and the same memory"
                )
        # A sharded layer gathers its weights in hooks of the module. For a single layer the backward pass has gathered
        # them.
        function = self.module if not alone and is_sharded(self.module) else self.function
        with contextlib.ExitStack() as stack:
            # The state is restored also if nothing was drawn: a layer may put a generator's state back itself.
            stack.enter_context(self.random.restored())
            stack.enter_context(restored(self.states))
            for buffer in self.written:
                stack.enter_context(buffer.restored())
            if backends.chosen() != self.backend:
                stack.enter_context(backends.serving(self.backend))
            if autocast_state() != self.autocast:
                for device, options in self.autocast:
                    stack.enter_context(torch.autocast(device, **options))
            return list(tensors_among(function(*args, **kwargs)))


def _versions_of(parameters: Sequence[nn.Parameter]) -> list[tuple[nn.Parameter, int, int]]:
    """The versions and addresses of parameters."""
    return [(p, p._version, address_of(p)) for p in parameters if not p.is_inference()]


def is_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` has been called on a module."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)

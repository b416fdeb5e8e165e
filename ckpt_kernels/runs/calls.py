"""A call of a layer, with all that it takes to make it again as it was."""

import contextlib
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import backends
from ..bitwise_check import checksum_of
from ..call_state import Buffer, RandomState, autocast_state
from ..convert.loads import modules_of
from ..nested_values import tensors_among

if TYPE_CHECKING:
    from .run import Run


class Place(NamedTuple):
    """Where a layer is in a run: the run's key, how many layers are before this one, and whether it is the last."""

    key: int
    number: int
    is_last: bool


class Saved:
    """What the graph holds in the place of a tensor that a layer saved."""

    __slots__ = ("__weakref__", "bits", "dtype", "run", "shape", "value")

    def __init__(self, run: "Run", tensor: Tensor) -> None:
        self.run = run
        self.shape = tensor.shape
        self.dtype = tensor.dtype
        self.bits = checksum_of(tensor)
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


class Call:
    """A layer's call, and how to make it again."""

    def __init__(self, function: Callable[..., Any], module: nn.Module, places: Sequence[Place]) -> None:
        self.function = function
        self.module = module
        self.places = places
        self.args: tuple = ()
        self.kwargs: dict[str, Any] = {}
        self.saved: list[weakref.ref[Saved]] = []
        self.outputs: list[tuple[weakref.ref[Tensor], int | None]] = []
        self.written: list[Buffer] = []
        self.random: RandomState | None = None
        self.autocast = autocast_state()
        self.backend = backends.chosen()
        self.parameters = _versions_of(module)

    def again(self, args: list[Any], kwargs: dict[str, Any], alone: bool) -> list[Tensor]:
        """Makes the call again, with what is drawn, cast and written to as it was; the tensors of its result."""
        for parameter, version in self.parameters:
            if parameter._version != version:
                raise RuntimeError(
                    f"a parameter of a checkpointed layer, {parameter.dtype} {tuple(parameter.shape)}, was modified by "
                    f"an in-place operation since: it is at version {parameter._version}; expected version {version}"
                )
        # A layer that is sharded gathers its weights in its hooks; of one layer the backward pass has gathered them.
        function = self.module if not alone and is_sharded(self.module) else self.function
        with contextlib.ExitStack() as stack:
            stack.enter_context(backends.serving(self.backend))
            for buffer in self.written:
                stack.enter_context(buffer.as_before())
            if self.random is not None:
                stack.enter_context(self.random.again())
            for device, options in self.autocast:
                stack.enter_context(torch.autocast(device, **options))
            return list(tensors_among(function(*args, **kwargs)))


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


def is_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` has been called on a module."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)

"""What is kept in the place of a tensor, and how the tensor is had back from it."""

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from . import backends

_NOTHING = torch.empty(0)
_NUMBERS = (int, float)
# The size, the strides and the offset of a view.
Geometry = tuple[Sequence[int], Sequence[int], int]


class Operand(Protocol):
    """What a value is made from; `depth` is how many recipes in a row it takes to get it."""

    depth: int

    def get(self) -> Tensor: ...


class Cell:
    """What a node holds in the place of a tensor that it saves. The content may be exchanged for one that is smaller.

    `version` is that of the tensor when it was saved, and `watch` shares its version counter. `attached` lives as long
    as the node keeps the cell.
    """

    __slots__ = ("__weakref__", "attached", "content", "owner", "version", "watch")

    def __init__(self, content: Any, owner: Any, version: int, watch: Tensor | None) -> None:
        self.content = content
        self.owner = owner
        self.version = version
        self.watch = watch
        self.attached: Any = None

    def get(self) -> Tensor:
        return self.content.get()

    @property
    def depth(self) -> int:
        return self.content.depth

    def is_unwritten(self) -> bool:
        """Since it was saved."""
        return self.watch is not None and self.watch._version == self.version


class Kept(NamedTuple):
    """A tensor that is kept as it is, with the version by which a later write to it is noticed."""

    tensor: Tensor
    version: int

    @property
    def depth(self) -> int:
        return 0

    def get(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                "a tensor needed for the gradient computation was modified by an in-place operation: "
                f"{self.tensor.dtype} {tuple(self.tensor.shape)} is at version {self.tensor._version}; "
                f"expected version {self.version}"
            )
        if _is_freed(self.tensor):
            raise RuntimeError(
                f"a weight needed to compute again, {self.tensor.dtype} {tuple(self.tensor.shape)}, has been freed; "
                "expected it where its module's backward pass begins (is it sharded apart from what reads its product?)"
            )
        return self.tensor


class Foreign(NamedTuple):
    """What the hooks around this context made of a tensor."""

    packed: Any
    unpack: Callable[[Any], Tensor]

    @property
    def depth(self) -> int:
        return 0

    def get(self) -> Tensor:
        return self.unpack(self.packed)


class Recipe:
    """How to make a tensor again: `rebuild(*operands)`; `depth` is how many recipes in a row that takes, with this one.

    It is made once in a backward pass for all who ask, and let go of when the last of these has it, or when the pass
    ends. `claims` counts those who will ask.
    """

    def __init__(self, rebuild: Callable[..., Tensor], operands: Sequence[Cell | None], depth: int) -> None:
        self.depth = depth
        self.claims = 0
        self._rebuild = rebuild
        self._operands = operands
        self._backend = backends.chosen()
        # Backward passes may run on several threads. Recipes lock in the order of the graph, so they cannot deadlock.
        self._lock = threading.RLock()
        self._value: Tensor | None = None
        self._stream: Any = None
        self._served: set[int] = set()

    def claim(self) -> None:
        with self._lock:
            self.claims += 1

    def serve(self, claim: "Claim") -> Tensor:
        with self._lock:
            value = self._value
            if value is None or self._stream != _stream(value):
                value = self._make()
            self._served.add(id(claim))
            if len(self._served) >= self.claims:
                self._let_go()
            elif self._value is None and _at_end_of_backward(weakref.WeakMethod(self._let_go)):
                self._value, self._stream = value, _stream(value)
            return value

    def forget(self, claim: "Claim") -> None:
        """A claim is gone, served or not."""
        with self._lock:
            self.claims -= 1
            self._served.discard(id(claim))
            if len(self._served) >= self.claims:
                self._let_go()

    def _let_go(self) -> None:
        self._value = self._stream = None
        self._served.clear()

    def _make(self) -> Tensor:
        same_backend = backends.chosen() == self._backend
        with contextlib.nullcontext() if same_backend else backends.use_backend(self._backend), torch.no_grad():
            return self._rebuild(*(None if o is None else o.get() for o in self._operands))


class Claim:
    """One reader's share of a recipe: the tensor, or a view of it."""

    __slots__ = ("__weakref__", "geometry", "recipe")

    def __init__(self, recipe: Recipe, geometry: Geometry | None) -> None:
        self.recipe = recipe
        self.geometry = geometry
        recipe.claim()

    @property
    def depth(self) -> int:
        return self.recipe.depth

    def get(self) -> Tensor:
        whole = self.recipe.serve(self)
        return whole if self.geometry is None else whole.as_strided(*self.geometry)

    def __del__(self) -> None:
        self.recipe.forget(self)


class Step(NamedTuple):
    """An op to run again. Its operands are whatever gives tensors, and numbers."""

    function: Callable[..., Tensor]
    operands: Sequence[Operand | float]
    options: tuple

    def get(self) -> Tensor:
        return self.function(*[o if isinstance(o, _NUMBERS) else o.get() for o in self.operands], *self.options)

    @property
    def depth(self) -> int:
        return max([0 if isinstance(o, _NUMBERS) else o.depth for o in self.operands])


def recipe_of_step(step: Step, shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype) -> Recipe:
    """Runs a step, and lays its value in memory as the first one lay."""
    return Recipe(functools.partial(_remade, step, shape, strides, dtype), (), 1 + step.depth)


def _remade(step: Step, shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    with _without_autocast():
        value = step.get()
    if value.shape != shape or value.dtype != dtype:
        raise RuntimeError(f"made {value.dtype} {tuple(value.shape)} again; expected {dtype} {tuple(shape)}")
    if value.stride() == strides and value.storage_offset() == 0:
        return value
    return torch.empty_strided(shape, strides, dtype=dtype, device=value.device).copy_(value)


def _without_autocast() -> contextlib.AbstractContextManager:
    stack = contextlib.ExitStack()
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            stack.enter_context(torch.autocast(device, enabled=False))
    return stack


def geometry_of(tensor: Tensor) -> Geometry:
    return tensor.size(), tensor.stride(), tensor.storage_offset()


def watching(tensor: Tensor) -> Tensor | None:
    """A tensor without memory that shares the version counter."""
    if type(tensor) is not Tensor or tensor.layout is not torch.strided:
        return None
    watch = tensor.detach()
    if not tensor.is_meta:
        watch.data = _NOTHING
    return watch


def _is_freed(tensor: Tensor) -> bool:
    """Whether its memory has been given back under it, as sharding does with gathered weights."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    return plain and tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0


def _stream(value: Tensor) -> Any:
    """What another stream's reader must not share."""
    return torch.cuda.current_stream(value.device) if value.is_cuda else None


def _at_end_of_backward(method: weakref.WeakMethod) -> bool:
    """Calls the method when the running backward pass ends; False where none is running."""

    def call() -> None:
        bound = method()
        if bound is not None:
            bound()

    try:
        torch.autograd.Variable._execution_engine.queue_callback(call)
    except RuntimeError:
        return False
    return True

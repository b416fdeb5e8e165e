"""The contents of a saved tensor's place in the graph: the tensor itself, or a recipe that makes the tensor again."""

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .. import backends

_NUMBERS = (int, float)
_PLAIN = (Tensor, nn.Parameter)
# The size, the strides and the offset of a view.
Geometry = tuple[Sequence[int], Sequence[int], int | torch.SymInt]


class Operand(Protocol):
    """An operand of a recipe; `depth` counts the recipes that run one after the other to get the tensor."""

    @property
    def depth(self) -> int: ...

    def get(self) -> Tensor: ...


class Cell:
    """A node's place for a saved tensor. The content may be exchanged for a smaller one.

    `version` is the tensor's version at saving, `watch` shares the tensor's version counter, and `is_clone` says that
    the tensor was made by `clone`. `attached` lives as long as the node keeps the cell.
    """

    __slots__ = ("__weakref__", "attached", "content", "is_clone", "owner", "version", "watch")

    def __init__(self, content: Any, owner: Any, saved: Tensor, watch: Tensor | None) -> None:
        self.content = content
        self.owner = owner
        self.version = saved._version
        self.is_clone = saved.grad_fn is not None and saved.grad_fn.name() == "CloneBackward0"
        self.watch = watch
        self.attached: Any = None

    def get(self) -> Tensor:
        return self.content.get()

    @property
    def depth(self) -> int:
        return self.content.depth

    def is_unwritten(self) -> bool:
        """Whether nobody has written to the tensor since it was saved."""
        return self.watch is not None and self.watch._version == self.version


class Kept(NamedTuple):
    """A tensor that is kept, with the version by which a later write is noticed."""

    tensor: Tensor
    version: int

    @property
    def depth(self) -> int:
        return 0

    def get(self) -> Tensor:
        if self.tensor._version != self.version:
            what = f"{self.tensor.dtype} {tuple(self.tensor.shape)}"
            raise _written(what, self.tensor._version, self.version)
        if _is_freed(self.tensor):
            raise RuntimeError(
                f"a weight needed to compute again, {self.tensor.dtype} {tuple(self.tensor.shape)}, has been freed; "
                "expected it where its module's backward pass begins (is it sharded apart from what reads its product?)"
            )
        return self.tensor


class Foreign(NamedTuple):
    """A tensor as packed by the saved-tensor hooks around this context."""

    packed: Any
    unpack: Callable[[Any], Tensor]

    @property
    def depth(self) -> int:
        return 0

    def get(self) -> Tensor:
        return self.unpack(self.packed)


class Unwritten(NamedTuple):
    """An operand of a recipe that hooks around this context keep; the tensor must not have been written to since.

    The hooks may keep no memory of the tensor: a checkpoint makes the tensor again, with all later writes in it.
    """

    operand: Operand
    watch: Tensor
    version: int

    @property
    def depth(self) -> int:
        return self.operand.depth

    def get(self) -> Tensor:
        if self.watch._version != self.version:
            raise _written(f"{self.watch.dtype}", self.watch._version, self.version)
        return self.operand.get()


def _written(what: str, found: int, expected: int) -> RuntimeError:
    return RuntimeError(
        "a tensor needed for the gradient computation was modified by an in-place operation: "
        f"{what} is at version {found}; expected version {expected}"
    )


class Made:
    """A tensor that was made again, with the backward pass and the stream of the making.

    Only claims that have not been served hold this object. So the memory goes with the last of these claims, whether
    they ask or not, and no code has to run for that: an interrupt finds nothing half done.
    """

    __slots__ = ("__weakref__", "stream", "value", "version", "where")

    def __init__(self, value: Tensor, where: int) -> None:
        self.value = value
        self.version = value._version
        self.where = where
        self.stream = _stream(value)

    def serves(self, where: int) -> bool:
        """Whether a reader in this backward pass, on the current stream, may have the tensor: no reader has written."""
        return self.where == where and self.stream == _stream(self.value) and self.value._version == self.version


class Recipe:
    """How to make a tensor again: `rebuild(*operands)`; `depth` counts the recipes in a row, with this one.

    The tensor is made once in a backward pass for all readers, and let go of after the last reader, or at the end of
    the pass.
    """

    def __init__(self, rebuild: Callable[..., Tensor], operands: Sequence[Operand | None], depth: int) -> None:
        self.depth = depth
        self._rebuild = rebuild
        self.operands = operands
        self._backend = backends.chosen()
        # Backward passes may run on several threads. Recipes lock in the order of the graph, so they cannot deadlock.
        self._lock = threading.RLock()
        self._made: weakref.ref[Made] | None = None
        # All who may ask. A claim that dies takes itself off by a built-in function: Python code could be interrupted.
        self._claims: set[weakref.ref[Claim]] = set()

    def claim(self, claim: "Claim") -> None:
        self._claims.add(weakref.ref(claim, self._claims.discard))

    def serve(self, claim: "Claim") -> Tensor:
        where = torch._C._current_graph_task_id()
        with self._lock:
            made = None if self._made is None else self._made()
            if made is None or not made.serves(where):
                made = Made(self._make(), where)
                self._made = weakref.ref(made)
                waiting = [c for c in self._live() if c is not claim and c.served != where]
                if waiting and _at_end_of_backward(weakref.WeakMethod(self._let_go)):
                    for other in waiting:
                        other.made = made
            claim.served, claim.made = where, None
            return made.value

    def _live(self) -> list["Claim"]:
        return [claim for reference in list(self._claims) if (claim := reference()) is not None]

    def _let_go(self) -> None:
        for claim in self._live():
            claim.made = None

    def _make(self) -> Tensor:
        # The contexts below mostly change nothing, and cost as much as a small kernel.
        same_backend = backends.chosen() == self._backend
        is_inference = torch.is_inference_mode_enabled()
        if same_backend and not is_inference and not torch.is_grad_enabled():
            return self._rebuild(*[None if o is None else o.get() for o in self.operands])
        # A tensor made in inference mode has no version, by which a reader's write would be noticed.
        with (
            contextlib.nullcontext() if same_backend else backends.serving(self._backend),
            torch.inference_mode(False) if is_inference else contextlib.nullcontext(),
            torch.no_grad(),
        ):
            return self._rebuild(*[None if o is None else o.get() for o in self.operands])


class Claim:
    """One reader's share of a recipe: the tensor, or a view of it."""

    __slots__ = ("__weakref__", "geometry", "made", "recipe", "served")

    def __init__(self, recipe: Recipe, geometry: Geometry | None) -> None:
        self.recipe = recipe
        self.geometry = geometry
        # The tensor made for another claim, until this one asks; and the backward pass in which this one was served.
        self.made: Made | None = None
        self.served = -1
        recipe.claim(self)

    @property
    def depth(self) -> int:
        return self.recipe.depth

    def get(self) -> Tensor:
        whole = self.recipe.serve(self)
        if self.geometry is None or self.geometry == geometry_of(whole):
            return whole
        return whole.as_strided(*self.geometry)


class Step(NamedTuple):
    """An op to run again, of operands that give tensors, and of numbers."""

    function: Callable[..., Tensor]
    operands: Sequence[Operand | float]
    options: tuple

    def get(self) -> Tensor:
        return self.function(*[o if isinstance(o, _NUMBERS) else o.get() for o in self.operands], *self.options)

    @property
    def depth(self) -> int:
        return max([0 if isinstance(o, _NUMBERS) else o.depth for o in self.operands])


def recipe_of_step(step: Step, shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype) -> Recipe:
    """Runs a step, and gives the value the strides of the first one."""
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


def watching(tensor: Tensor | None) -> Tensor | None:
    """A tensor without memory that shares the version counter of `tensor`."""
    if tensor is None or type(tensor) not in _PLAIN or tensor.layout is not torch.strided:
        return None
    watch = tensor.detach()
    if not tensor.is_meta:
        watch.data = _nothing(tensor.dtype)
    return watch


@functools.cache
def _nothing(dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype, device="cpu")


def _is_freed(tensor: Tensor) -> bool:
    """Whether somebody has freed the tensor's memory, as sharding does with gathered weights."""
    if type(tensor) not in _PLAIN or tensor.layout is not torch.strided or tensor.is_meta or tensor.data_ptr():
        return False
    return tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0


def _stream(value: Tensor) -> Any:
    """The stream of the value: readers on other streams must not share the value."""
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

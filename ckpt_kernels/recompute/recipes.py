"""Recipes, which make a tensor again, and the claims of those who read it."""

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from .cells import Operand

_graph_task_id = torch._C._current_graph_task_id
_NUMBERS = (int, float)
# A recipe may need an output that was let go of too, and so on. Past this many the output is kept, so that rebuilding a
# chain takes little memory, and little is computed more than once.
LONGEST_CHAIN = 8
# The size, the strides and the offset of a view.
Geometry = tuple[Sequence[int], Sequence[int], int | torch.SymInt]


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

    __slots__ = ("__weakref__", "backend", "claims", "depth", "lock", "made", "operands", "rebuild")

    def __init__(self, rebuild: Callable[..., Tensor], operands: Sequence[Operand | None], depth: int) -> None:
        self.depth = depth
        self.rebuild = rebuild
        self.operands = operands
        self.backend = backends.chosen()
        # Backward passes may run on several threads. Recipes lock in the order of the graph, so they cannot deadlock.
        self.lock = threading.RLock()
        self.made: weakref.ref[Made] | None = None
        # All who may ask. A claim that dies takes itself off by a built-in function: Python code could be interrupted.
        self.claims: set[weakref.ref[Claim]] = set()

    def claim(self, claim: "Claim") -> None:
        self.claims.add(weakref.ref(claim, self.claims.discard))

    def serve(self, claim: "Claim") -> Tensor:
        where = _graph_task_id()
        with self.lock:
            made = None if self.made is None else self.made()
            if made is None or not made.serves(where):
                value = self._make()
                if len(self.claims) > 1:
                    self._hand_on(value, where, claim)
            else:
                value = made.value
            claim.served, claim.made = where, None
            return value

    def _hand_on(self, value: Tensor, where: int, claim: "Claim") -> None:
        """Holds the tensor for all others who may ask in this backward pass."""
        made = Made(value, where)
        self.made = weakref.ref(made)
        waiting = [c for c in self._live() if c is not claim and c.served != where]
        if waiting and _at_end_of_backward(weakref.WeakMethod(self._let_go)):
            for other in waiting:
                other.made = made

    def _live(self) -> list["Claim"]:
        return [claim for reference in list(self.claims) if (claim := reference()) is not None]

    def _let_go(self) -> None:
        for claim in self._live():
            claim.made = None

    def _make(self) -> Tensor:
        # The contexts below mostly change nothing, and cost as much as a small kernel.
        same_backend = backends.chosen() == self.backend
        is_inference = torch.is_inference_mode_enabled()
        if same_backend and not is_inference and not torch.is_grad_enabled():
            return self.rebuild(*[None if o is None else o.get() for o in self.operands])
        # A tensor made in inference mode has no version, by which a reader's write would be noticed.
        with (
            contextlib.nullcontext() if same_backend else backends.serving(self.backend),
            torch.inference_mode(False) if is_inference else contextlib.nullcontext(),
            torch.no_grad(),
        ):
            return self.rebuild(*[None if o is None else o.get() for o in self.operands])


class Claim:
    """One reader's share of a recipe: the tensor, or a view of it."""

    __slots__ = ("__weakref__", "depth", "geometry", "made", "recipe", "served")

    def __init__(self, recipe: Recipe, geometry: Geometry | None) -> None:
        self.recipe = recipe
        self.depth = recipe.depth
        self.geometry = geometry
        # The tensor made for another claim, until this one asks; and the backward pass in which this one was served.
        self.made: Made | None = None
        self.served = -1
        recipe.claim(self)

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

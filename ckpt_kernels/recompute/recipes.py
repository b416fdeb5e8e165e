"""Recipes, which recompute a discarded tensor, and the claims of the readers that need the tensor."""

import contextlib
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from .cells import Operand
from .untracked import untracked

_graph_task_id = torch._C._current_graph_task_id
_NUMBERS = (int, float)
# A recipe may need another discarded output, and so on. A tensor whose chain of recipes would be longer than this is
# kept, so that recomputing takes little memory and few tensors are computed twice.
LONGEST_CHAIN = 8
# The shape, strides and storage offset of a view.
Geometry = tuple[Sequence[int], Sequence[int], int | torch.SymInt]
# The shape, strides and dtype of a whole tensor, at the start of its storage.
Layout = tuple[Sequence[int], Sequence[int], torch.dtype]


class Remade:
    """A recomputed tensor, with the backward pass and the stream in which it was computed.

    Only claims that have not been served hold this object. So the memory is freed with the last of these claims,
    whether or not they ask for the tensor, and no code has to run for that: an interrupt leaves no half-done state.
    """

    __slots__ = ("__weakref__", "graph_task", "stream", "value", "version")

    def __init__(self, value: Tensor, graph_task: int) -> None:
        self.value = value
        self.version = value._version
        self.graph_task = graph_task
        self.stream = _stream(value)

    def serves(self, graph_task: int) -> bool:
        """Whether a reader in this backward pass and on the current stream may get the tensor, still unwritten."""
        is_same_place = self.graph_task == graph_task and self.stream == _stream(self.value)
        return is_same_place and self.value._version == self.version


class Recipe:
    """How to recompute a tensor: `rebuild(*operands)`. `depth` is the number of recipes in the chain, this one
    included.

    The recomputed tensor gets the strides in `layout`, those of the original: claims are views by strides, and operands
    may come back in other strides, for example from the hooks of torch's `save_on_cpu`. Without a layout no claim is a
    view.

    The tensor is computed once in a backward pass for all readers, and freed after the last reader or at the end of the
    pass.
    """

    __slots__ = ("__weakref__", "backend", "claims", "depth", "layout", "lock", "made", "operands", "rebuild")

    def __init__(
        self,
        rebuild: Callable[..., Tensor],
        operands: Sequence[Operand | None],
        depth: int,
        layout: Layout | None,
    ) -> None:
        self.depth = depth
        self.rebuild = rebuild
        self.operands = operands
        self.layout = layout
        self.backend = backends.chosen()
        # Backward passes may run on several threads. Recipes are locked in the order of the graph, so there is no
        # deadlock.
        self.lock = threading.RLock()
        self.made: weakref.ref[Remade] | None = None
        # The claims that may still ask. A dying claim is removed by a built-in function: Python code could be
        # interrupted.
        self.claims: set[weakref.ref[Claim]] = set()

    def claim(self, claim: "Claim") -> None:
        """Registers a claim."""
        self.claims.add(weakref.ref(claim, self.claims.discard))

    def serve(self, claim: "Claim") -> Tensor:
        """The tensor for a claim, recomputed unless another claim of this backward pass has had it recomputed."""
        graph_task = _graph_task_id()
        with self.lock:
            remade = None if self.made is None else self.made()
            if remade is None or not remade.serves(graph_task):
                value = self._make()
                if len(self.claims) > 1:
                    self._share(value, graph_task, claim)
            else:
                value = remade.value
            claim.served, claim.made = graph_task, None
            return value

    def _share(self, value: Tensor, graph_task: int, claim: "Claim") -> None:
        """Keeps the tensor for the other claims that may ask for it in this backward pass."""
        remade = Remade(value, graph_task)
        self.made = weakref.ref(remade)
        waiting = [c for c in self._live_claims() if c is not claim and c.served != graph_task]
        if waiting and _released_after_backward(weakref.ref(self)):
            for other in waiting:
                other.made = remade

    def _live_claims(self) -> list["Claim"]:
        return [claim for reference in list(self.claims) if (claim := reference()) is not None]

    def release(self) -> None:
        """Drops the tensor that is kept for claims which did not ask for it."""
        for claim in self._live_claims():
            claim.made = None

    def _make(self) -> Tensor:
        # The contexts below usually change nothing, and cost as much as a small kernel.
        same_backend = backends.chosen() == self.backend
        is_inference = torch.is_inference_mode_enabled()
        if same_backend and not is_inference and not torch.is_grad_enabled():
            return self._laid_out(self.rebuild(*[None if o is None else o.get() for o in self.operands]))
        # A tensor made in inference mode has no version counter, which would reveal an in-place write of a reader.
        with (
            contextlib.nullcontext() if same_backend else backends.serving(self.backend),
            torch.inference_mode(False) if is_inference else contextlib.nullcontext(),
            torch.no_grad(),
        ):
            return self._laid_out(self.rebuild(*[None if o is None else o.get() for o in self.operands]))

    def _laid_out(self, value: Tensor) -> Tensor:
        """The recomputed tensor, copied if its strides are not those of the original."""
        if self.layout is None:
            return value
        shape, strides, dtype = self.layout
        if value.shape != shape or value.dtype != dtype:
            raise RuntimeError(f"made {value.dtype} {tuple(value.shape)} again; expected {dtype} {tuple(shape)}")
        if value.stride() == strides and value.storage_offset() == 0:
            return value
        return torch.empty_strided(shape, strides, dtype=dtype, device=value.device).copy_(value)


@untracked
class Claim:
    """One reader's share of a recipe: the tensor, or a view of it."""

    __slots__ = ("__weakref__", "depth", "geometry", "made", "recipe", "served")

    def __init__(self, recipe: Recipe, geometry: Geometry | None) -> None:
        self.recipe = recipe
        self.depth = recipe.depth
        self.geometry = geometry
        # The tensor recomputed for another claim, until this claim asks; and the backward pass that last served this
        # claim.
        self.made: Remade | None = None
        self.served = -1
        recipe.claim(self)

    def get(self) -> Tensor:
        whole = self.recipe.serve(self)
        if self.geometry is None or self.geometry == geometry_of(whole):
            return whole
        return whole.as_strided(*self.geometry)


class Step(NamedTuple):
    """An op to run again. The operands give tensors or are numbers."""

    function: Callable[..., Tensor]
    operands: Sequence[Operand | float]
    options: tuple

    def get(self) -> Tensor:
        return self.function(*[o if isinstance(o, _NUMBERS) else o.get() for o in self.operands], *self.options)

    @property
    def depth(self) -> int:
        return max([0 if isinstance(o, _NUMBERS) else o.depth for o in self.operands])


class FromGraph:
    """The function of a recipe that the autograd graph shows, bound to its first arguments. By the class
    `cheap_recipes` tells such recipes from those of blocks."""

    __slots__ = ("bound", "function")

    def __init__(self, function: Callable[..., Tensor], *bound: Any) -> None:
        self.function, self.bound = function, bound

    def __call__(self, *operands: Any) -> Tensor:
        return self.function(*self.bound, *operands)


def recipe_of_step(step: Step, layout: Layout) -> Recipe:
    """A recipe that runs a step."""
    return Recipe(FromGraph(_run_step, step), (), 1 + step.depth, layout)


def _run_step(step: Step) -> Tensor:
    autocast = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
    if not autocast:
        return step.get()
    with contextlib.ExitStack() as stack:
        for device in autocast:
            stack.enter_context(torch.autocast(device, enabled=False))
        return step.get()


def geometry_of(tensor: Tensor) -> Geometry:
    """The shape, strides and storage offset of a tensor."""
    return tensor.size(), tensor.stride(), tensor.storage_offset()


def layout_of(tensor: Tensor) -> Layout:
    """The shape, strides and dtype of a tensor."""
    return tensor.size(), tensor.stride(), tensor.dtype


def _stream(value: Tensor) -> Any:
    """The CUDA stream of the value. Readers on other streams must not share the value."""
    return torch.cuda.current_stream(value.device) if value.is_cuda else None


def _released_after_backward(reference: "weakref.ref[Recipe]") -> bool:
    """Releases the recipe's tensor when the running backward pass ends. Returns False if none is running, or if a
    compiler traces it (compiled autograd)."""
    if torch.compiler.is_compiling():
        return False

    def release() -> None:
        recipe = reference()
        if recipe is not None:
            recipe.release()

    try:
        torch.autograd.Variable._execution_engine.queue_callback(release)
    except RuntimeError:
        return False
    return True

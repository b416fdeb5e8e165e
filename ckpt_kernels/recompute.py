"""Letting go of blocks' outputs: what reads one keeps a recipe for it, and gets it back in the backward pass.

A block keeps its input and computes the rest again in its backward kernel. Its output would still be kept, by whatever
reads it for a gradient of its own: a Linear, a convolution, attention, any autograd.Function. Within `discard_outputs`
that reader's graph keeps a `Recipe` in the place of the output: the tensors that the block keeps anyway, and its
forward kernel to run on them again, which costs memory traffic and no matrix product. Gradients are the same to the
last bit, because the kernel and what it reads are the same.

It works by torch's saved-tensor hooks, on the thread and for the time of the context. Only the innermost pair of hooks
runs in torch; hooks that were there before are called from here for all that is not discarded.
"""

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from . import backends

# A recipe may need an output that was let go too, and so on. Past this many the output is kept, so that what stands in
# memory while a chain is rebuilt, and what is computed more than once, stay small.
LONGEST_CHAIN = 8

_thread = threading.local()

# A function, and the tensors that it makes the output of.
Announcement = tuple[Callable[..., Tensor], tuple[Tensor | None, ...]]


class Kept(NamedTuple):
    """A tensor that is kept as it is, with the version by which a later write to it is noticed."""

    tensor: Tensor
    version: int

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

    def get(self) -> Tensor:
        return self.unpack(self.packed)


class Recipe:
    """How to make a block's output again: `rebuild(*operands)`.

    It is made once in a backward pass for all who ask, and let go of when the last of these has it, or when the pass
    ends. `claims` counts those who will ask.
    """

    def __init__(self, rebuild: Callable[..., Tensor], operands: Sequence["Kept | Foreign | Claim | None"]) -> None:
        self.depth = 1 + max((o.recipe.depth for o in operands if isinstance(o, Claim)), default=0)
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
    """One reader's share of a recipe: the output, or a view of it."""

    __slots__ = ("__weakref__", "_geometry", "recipe")

    def __init__(self, recipe: Recipe, view: Tensor) -> None:
        self.recipe = recipe
        self._geometry = view.size(), view.stride(), view.storage_offset()
        recipe.claim()

    def get(self) -> Tensor:
        return self.recipe.serve(self).as_strided(*self._geometry)

    def __del__(self) -> None:
        self.recipe.forget(self)


class Entry(NamedTuple):
    """An output of a block that may be discarded, as long as its memory is there and unchanged.

    The tensor that the block returned may be gone while a view of it lives, so that it is by its memory that it is
    known. `output` is that tensor, as long as Python has it.
    """

    storage: StorageWeakRef
    output: "weakref.ref[Tensor]"
    dtype: torch.dtype
    version: int
    recipe: Recipe


class Discarder:
    """The state of one active context."""

    def __init__(self) -> None:
        self._entries: dict[int, Entry] = {}
        self._outer = _top_hooks()
        self.announced: Announcement | None = None

    def register(self, output: Tensor, rebuild: Callable[..., Tensor], tensors: Sequence[Tensor | None]) -> Recipe:
        recipe = Recipe(rebuild, [None if t is None else self.pack(_outlasting(t)) for t in tensors])
        entries = self._entries
        # Those whose memory was still in use, by a view, when the tensor itself went.
        for key in [key for key, entry in entries.items() if entry.storage.expired()]:
            del entries[key]
        storage = StorageWeakRef(output.untyped_storage())

        def gone(reference: weakref.ref) -> None:
            entry = entries.get(storage.cdata)
            if entry is not None and entry.output is reference and torch._C._storage_Use_Count(storage.cdata) <= 1:
                del entries[storage.cdata]

        entries[storage.cdata] = Entry(storage, weakref.ref(output, gone), output.dtype, output._version, recipe)
        return recipe

    def close(self) -> None:
        """From now on recipes live by their claims alone."""
        self._entries.clear()

    def pack(self, tensor: Tensor) -> Kept | Foreign | Claim:
        recipe = self._recipe_for(tensor)
        if recipe is not None and recipe.depth <= LONGEST_CHAIN:
            return Claim(recipe, tensor)
        if self._outer is not None:
            packed, unpack = self._outer
            return Foreign(packed(tensor), unpack)
        # Without its graph: a node that keeps its own output would otherwise keep itself alive.
        return Kept(tensor.detach(), tensor._version)

    def _recipe_for(self, tensor: Tensor) -> Recipe | None:
        if not self._entries or type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.is_neg():
            return None
        entry = self._entries.get(tensor.untyped_storage()._cdata)
        if entry is None:
            return self._recipe_of_cast(tensor)
        unchanged = tensor.dtype == entry.dtype and tensor._version == entry.version
        return entry.recipe if unchanged and not entry.storage.expired() else None

    def _recipe_of_cast(self, tensor: Tensor) -> Recipe | None:
        """For the copy of an output that autocast makes for its reader: the output's recipe, and the cast."""
        copy = tensor if tensor._base is None else tensor._base
        node = copy.grad_fn
        if node is None or node.name() != "ToCopyBackward0" or copy._version:
            return None
        for entry in self._entries.values():
            output = entry.output()
            if output is not None and node.next_functions[0] == (output.grad_fn, output.output_nr):
                if output._version == entry.version and output.shape == copy.shape:
                    cast = functools.partial(_cast, dtype=copy.dtype, strides=copy.stride())
                    return self.register(copy, cast, (output,))
        return None


class discard_outputs(contextlib.ContextDecorator):
    """While active, what reads a block's output for its own gradient keeps a recipe for it in its place::

        with recompute.discard_outputs():
            loss = model(batch)
        loss.backward()

    Also a decorator: `@discard_outputs()` over a function or a `forward`. It holds for the calling thread. An output
    can be let go of if its block keeps what it takes to make it again: all do but `bias_act` with the identity, relu
    or leaky_relu, whose reader keeps no more than the block would. Views of an output count as the output, and so do
    the copies that autocast makes of it. Where an output has been written to in place, what read it before gets what
    it read, and what reads it afterwards keeps it.

    Where saved-tensor hooks are disabled (torch.func) it does nothing, and within torch.compile it does nothing either:
    see `selective_contexts` for that.
    """

    def __init__(self) -> None:
        self._entered: list[torch.autograd.graph.saved_tensors_hooks | None] = []

    def _recreate_cm(self) -> "discard_outputs":
        return discard_outputs()

    def __enter__(self) -> "discard_outputs":
        if torch.compiler.is_compiling() or not torch._C._autograd._saved_tensors_hooks_is_enabled():
            self._entered.append(None)
            return self
        # Within another that sees what is saved, that one goes on: outputs may cross from one to the other.
        if discarding() is not None:
            self._entered.append(None)
            return self
        discarder = Discarder()
        hooks = torch.autograd.graph.saved_tensors_hooks(discarder.pack, _unpack)
        hooks.__enter__()
        self._entered.append(hooks)
        _active().append(discarder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        hooks = self._entered.pop()
        if hooks is not None:
            _active().pop().close()
            hooks.__exit__(kind, error, trace)


class DiscardOutputs(nn.Module):
    """`module`, whose forward pass runs within `discard_outputs`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with discard_outputs():
            return self.module(*args, **kwargs)


def selective_contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """For torch.compile, which does not use hooks: tells its partitioner to compute blocks again and keep the rest::

        checkpoint = functools.partial(
            torch.utils.checkpoint.checkpoint, use_reentrant=False, context_fn=recompute.selective_contexts
        )
        compiled = torch.compile(lambda x: checkpoint(model, x))

    The compiled model keeps what it would keep within `discard_outputs`. By itself the partitioner takes a block for an
    op that is too dear to run again, and keeps its input and its output.
    """
    return create_selective_checkpoint_contexts(_keep_all_but_blocks)


def _keep_all_but_blocks(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    ours = getattr(op, "namespace", None) == "ckpt_kernels"
    return CheckpointPolicy.PREFER_RECOMPUTE if ours else CheckpointPolicy.MUST_SAVE


def discarding() -> Discarder | None:
    """The context that sees what is saved now: the innermost, unless somebody else's hooks are within it."""
    active = _active()
    if not active:
        return None
    top = _top_hooks()
    return active[-1] if top is not None and getattr(top[0], "__self__", None) is active[-1] else None


def announce(announcement: Announcement | None) -> None:
    """From within a block's forward: how its output can be had again, from what it keeps anyway; None if it cannot."""
    _active()[-1].announced = announcement if discarding() is not None else None


def offer(output: Tensor) -> None:
    """After a block's forward: the output that was announced, which now has its place in the graph."""
    discarder = _active()[-1]
    announced, discarder.announced = discarder.announced, None
    if announced is not None and output.requires_grad:
        discarder.register(output, *announced)


def is_active() -> bool:
    """Whether a context is active on this thread."""
    return bool(_active())


def _active() -> list[Discarder]:
    try:
        return _thread.active
    except AttributeError:
        _thread.active = []
        return _thread.active


def _top_hooks() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None:
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def _is_freed(tensor: Tensor) -> bool:
    """Whether its memory has been given back under it, as sharding does with gathered weights."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    return plain and tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0


def _outlasting(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of a norm's weight that may be gone when the recipe is asked for: a sharded one is gathered
    when its own module's backward pass begins, and what reads the module's output comes before."""
    sharded = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not sharded or tensor.dim() != 1 or not (tensor.requires_grad or isinstance(tensor, nn.Parameter)):
        return tensor
    return tensor.detach().clone()


def _unpack(packed: Kept | Foreign | Claim) -> Tensor:
    return packed.get()


def _cast(output: Tensor, dtype: torch.dtype, strides: tuple[int, ...]) -> Tensor:
    return torch.empty_strided(output.shape, strides, dtype=dtype, device=output.device).copy_(output)


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

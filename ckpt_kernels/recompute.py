"""Letting go of blocks' outputs: what reads one keeps a recipe for it, and gets it back in the backward pass.

A block keeps its input and computes the rest again in its backward kernel. Its output would still be kept, by whatever
reads it for a gradient of its own: a Linear, a convolution, attention, any autograd.Function. Within `discard_outputs`
that reader's graph keeps a `Recipe` in the place of the output: the tensors that the block keeps anyway, and its
forward kernel to run on them again, which costs memory traffic and no matrix product. Gradients are the same to the
last bit, because the kernel and what it reads are the same. The same goes for what torch's own cheap ops make, where
the graph says how (see `provenance`).

It works by torch's saved-tensor hooks, on the thread and for the time of the context. Only the innermost pair of hooks
runs in torch; hooks that were there before are called from here for all that is not discarded.
"""

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parameter import is_lazy
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from . import provenance
from .provenance import Block, Trace
from .recipes import Cell, Claim, Foreign, Geometry, Kept, Operand, Recipe, Step, geometry_of, recipe_of_step, watching

# A recipe may need an output that was let go too, and so on. Past this many the output is kept, so that what stands in
# memory while a chain is rebuilt, and what is computed more than once, stay small.
LONGEST_CHAIN = 8


class _Thread(threading.local):
    """What is active on a thread: its open contexts, the innermost last, closed ones among them."""

    def __init__(self) -> None:
        self.active: list[Discarder] = []


thread = _Thread()

# A function, and the tensors that it makes the output of.
Announcement = tuple[Callable[..., Tensor], tuple[Tensor | None, ...]]


class Entry(NamedTuple):
    """A tensor that may be discarded, as long as its memory is there and unchanged.

    The tensor that was returned may be gone while a view of it lives, so that it is by its memory that it is known.
    `output` is that tensor, as long as Python has it.
    """

    storage: StorageWeakRef
    output: "weakref.ref[Tensor]"
    dtype: torch.dtype
    version: int
    recipe: Callable[[], Recipe | None]


class Packed(NamedTuple):
    """A tensor that the op which was announced saves, and what its node holds in the place of it."""

    tensor: Tensor
    cell: Cell
    # Whether the cell may come to hold something smaller, which then all who keep the tensor do.
    is_exchanged: bool


class Held(NamedTuple):
    """What comes into a layer or goes out of it: it is kept as it is if somebody saves it, and nothing behind it is
    looked for."""

    storage: StorageWeakRef
    tensor: "weakref.ref[Tensor]"
    version: int


class Total(NamedTuple):
    """Another result of an op than its output, which the op itself saves, such as the sum that is normalised."""

    storage: int
    recipe: Announcement


class Result(NamedTuple):
    """Who keeps the result of a node that saves its result, first of all the node itself."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    keepers: list[tuple["weakref.ref[Cell]", Geometry]]


class Discarder:
    """The state of one active context."""

    def __init__(self, products: bool, temporaries: bool) -> None:
        self._products = products
        self._temporaries = temporaries
        self._entries: dict[int, Entry] = {}
        self._most_entries = 64
        # The versions of biases when a module's forward began, by identity; None where any parameter's word is taken.
        self._biases: dict[int, tuple[nn.Parameter, int]] | None = None
        self._outer = _top_hooks()
        self.is_closed = False
        # Of the op whose forward is over and whose output is not there yet.
        self.announced: Announcement | None = None
        self.saved: list[Packed] | None = None
        self.is_elementwise = False
        self.total: Total | None = None
        # How many layers are open, in which products run again whoever reads them; and what goes in and out of them.
        self.layers = 0
        self._held: list[Held] = []

    def hold(self, tensor: Tensor) -> None:
        """At a layer's edge."""
        if isinstance(tensor, Tensor) and tensor.layout is torch.strided and tensor.requires_grad:
            self._held = [held for held in self._held if not held.storage.expired()]
            self._held.append(Held(StorageWeakRef(tensor.untyped_storage()), weakref.ref(tensor), tensor._version))

    def _is_held(self, tensor: Tensor) -> bool:
        key = tensor.untyped_storage()._cdata if self._held else None
        held = [h for h in self._held if h.storage.cdata == key and not h.storage.expired()]
        return any(h.version == tensor._version for h in held)

    def held_at(self, node: Any, output: int) -> Operand | None:
        """What is held of a node's results, as it was then."""
        for held in self._held:
            tensor = held.tensor()
            if tensor is not None and tensor.grad_fn is node and tensor.output_nr == output:
                return self.pack(tensor) if tensor._version == held.version else None
        return None

    def record(self, output: Tensor, recipe: Announcement | None = None) -> None:
        """The output of the op that was announced; or another one, whose recipe is given and lasts as long as it."""
        if recipe is not None:
            made = self._recipe(*recipe, ())
            self._enter(output, lambda: made)
            return
        announced, saved = self.announced, self.saved or ()
        self.announced = self.saved = self.total = None
        self.is_elementwise = False
        if announced is None or not output.requires_grad:
            return
        made = self._recipe(*announced, saved)
        if self._keeps(made, announced[1], saved) >= output.nbytes:
            return
        # It lasts as long as what the op's node saves, where it keeps no more than that. So it is there for what the
        # graph says of another tensor, which may lead to this node when the output is gone.
        if saved and _are_among(announced[1], saved):
            saved[0].cell.attached = made
            entry = self._enter(output, weakref.ref(made))
        else:
            entry = self._enter(output, lambda: made)
        node: Any = output.grad_fn
        node.recomputed_block = Block(
            self, weakref.ref(made), entry.output, entry.storage, entry.version, watching(output)
        )

    def _recipe(
        self, rebuild: Callable[..., Tensor], tensors: Sequence[Tensor | None], saved: Sequence[Packed]
    ) -> Recipe:
        operands = [None if t is None else self._operand(t, saved) for t in tensors]
        return Recipe(rebuild, operands, 1 + max((o.depth for o in operands if o is not None), default=0))

    def _keeps(self, recipe: Recipe, tensors: Sequence[Tensor | None], saved: Sequence[Packed]) -> int:
        """Bytes that a recipe alone keeps: nothing is gained by one that keeps as much as it makes again."""
        kept = [
            t for t, o in zip(tensors, recipe.operands, strict=True) if t is not None and not (t.is_leaf or o.depth)
        ]
        return sum(t.nbytes for t in kept if not (_are_among((t,), saved) or self._is_held(t)))

    def _operand(self, tensor: Tensor, saved: Sequence[Packed]) -> Operand:
        """What the op's node holds of a tensor, if it holds that to the end; else the tensor is packed for the recipe.

        The content alone: a cell that holds the recipe would be held by it.
        """
        lasting = _outlasting(tensor)
        for packed in saved:
            if packed.tensor is lasting and not packed.is_exchanged and isinstance(packed.cell.content, Kept):
                return packed.cell.content
        return self.pack(lasting)

    def _enter(self, output: Tensor, recipe: Callable[[], Recipe | None]) -> Entry:
        entries = self._entries
        if len(entries) >= self._most_entries:
            for key in [key for key, entry in entries.items() if entry.storage.expired()]:
                del entries[key]
            # So a sweep is paid for by as many entries as it looks at.
            self._most_entries = max(64, 2 * len(entries))
        storage = StorageWeakRef(output.untyped_storage())
        entry = Entry(storage, weakref.ref(output), output.dtype, output._version, recipe)
        entries[storage.cdata] = entry
        return entry

    def begin(self, module: nn.Module) -> None:
        """The module's forward begins. From the first such call on, only biases that were there then are copied."""
        biases = {} if self._biases is None else self._biases
        biases.update((id(bias), (bias, bias._version)) for bias in _biases_in(module) if id(bias) not in biases)
        self._biases = biases

    def close(self) -> None:
        """From now on recipes live by their claims alone, and whatever is saved from now on is kept as it is."""
        self.is_closed = True
        self._entries.clear()
        self._biases = {}
        self.announced = self.saved = None

    def pack(self, tensor: Tensor) -> Cell:
        # Closed where these hooks could not be taken off, in another thread: this is the first chance to.
        if self.is_closed and _sees_what_is_saved(self):
            torch._C._autograd._pop_saved_tensors_default_hooks()
        found = None if self.is_closed else self._recipe_for(tensor)
        if found is None and self.total is not None and self.layers:
            found = self._recipe_of_total(self.total, tensor)
        if isinstance(found, Recipe) and found.depth <= LONGEST_CHAIN:
            cell = Cell(Claim(found, geometry_of(tensor)), self, tensor, watching(tensor))
        elif self._outer is not None:
            packed, unpack = self._outer
            cell = Cell(Foreign(packed(tensor), unpack), self, tensor, watching(tensor))
        else:
            # Without its graph: a node that keeps its own output would otherwise keep itself alive.
            kept = tensor.detach()
            cell = Cell(Kept(kept, kept._version), self, tensor, kept)
        if self.saved is not None and tensor.layout is torch.strided:
            self.saved.append(Packed(tensor, cell, isinstance(found, Tensor)))
        if isinstance(found, Tensor):
            self._note_keeper(found, tensor, cell)
        return cell

    def _note_keeper(self, root: Tensor, tensor: Tensor, cell: Cell) -> None:
        keeper = weakref.ref(cell), geometry_of(tensor)
        own = provenance.result_cell(root.grad_fn)
        if own is None:
            cell.attached = Result(root.shape, root.stride(), root.dtype, [keeper])
        elif isinstance(own.attached, Result):
            own.attached.keepers.append(keeper)

    def _recipe_for(self, tensor: Tensor) -> Recipe | Tensor | None:
        if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.is_neg() or tensor.is_nested:
            return None
        # What has no graph, by way of `detach()`, may be read when the weights that its recipe needs have been stepped.
        root = tensor if tensor._base is None else tensor._base
        if root.grad_fn is None or self._is_held(tensor):
            return None
        entry = self._entries.get(tensor.untyped_storage()._cdata) if self._entries else None
        if entry is not None and not entry.storage.expired():
            if tensor.dtype != entry.dtype:
                return None
            if tensor._version == entry.version and (recipe := entry.recipe()) is not None:
                return recipe
        return self._traced(tensor)

    def _recipe_of_total(self, total: Total, tensor: Tensor) -> Recipe | None:
        """Within a layer, of a sum whose parts are to be had."""
        if tensor.untyped_storage()._cdata != total.storage:
            return None
        # It is asked for its parts only once: they are packed too.
        self.total, saved, self.saved = None, self.saved, None
        recipe = self._recipe(*total.recipe, ())
        worth = self._keeps(recipe, total.recipe[1], ()) < tensor.nbytes
        self.saved = saved
        if worth and recipe.depth <= LONGEST_CHAIN:
            self._enter(tensor, lambda: recipe)
            return recipe
        return None

    def _traced(self, tensor: Tensor) -> Recipe | Tensor | None:
        """A recipe from the graph behind a tensor, or behind what it is a view of.

        Where there is none for the result of a node that saves its result, this result: there may be one later.
        """
        root = tensor._base
        if root is None:
            root = tensor
        node = root.grad_fn
        if node is None:
            return None
        name = node.name()
        products = self.layers > 0 or (self._products and self.is_elementwise)
        if not provenance.is_made_cheaply(name, products):
            return None
        # A copy made to be read would lose its tangent.
        if tensor.dtype != root.dtype or torch.autograd.forward_ad._current_level >= 0:
            return None
        trace = Trace(self, self._temporaries, products)
        version = root._version
        if not version:
            trace.learn(node)
        elif not trace.is_written_by_graph(node, root.untyped_storage()._cdata, version):
            return None
        step = trace.value(node, root.output_nr)
        if step is None or not trace.is_grounded or step.depth >= LONGEST_CHAIN or not provenance.fills_memory(root):
            return root if provenance.saves_result(name) else None
        recipe = recipe_of_step(step, root.shape, root.stride(), root.dtype)
        self._enter(root, weakref.ref(recipe))
        return recipe

    # For `Trace`

    def is_as_used(self, bias: nn.Parameter) -> bool:
        """Whether nobody has written to a bias since what reads it ran: since the forward began."""
        if self._biases is None:
            return True
        known, version = self._biases.get(id(bias), (None, 0))
        return known is bias and bias._version == version

    def share(self, known: Cell | Block) -> Cell | Claim | None:
        """What is known, as one more recipe's operand."""
        if isinstance(known, Block):
            recipe = known.recipe()
            return None if recipe is None else Claim(recipe, None)
        if isinstance(known.content, Foreign):
            # What others packed they may give back only once, as torch's checkpoint does.
            known.content = Claim(Recipe(known.content.get, (), 0), None)
        claim = known.content
        return Claim(claim.recipe, claim.geometry) if isinstance(claim, Claim) else known

    def exchange(self, own: Cell, step: Step) -> None:
        """A node's result can be made again: all who keep it let go of it, if none keeps another state of it."""
        result = own.attached
        if own.owner is not self or not isinstance(result, Result) or step.depth >= LONGEST_CHAIN:
            return
        if not result.dtype.is_floating_point:
            return
        keepers = [(cell, geometry) for reference, geometry in result.keepers if (cell := reference()) is not None]
        if any(cell.depth or cell.version != own.version for cell, _ in keepers):
            return
        recipe = recipe_of_step(step, result.shape, result.strides, result.dtype)
        for cell, geometry in keepers:
            cell.content, cell.watch = Claim(recipe, geometry), watching(cell.watch)


class discard_outputs(contextlib.ContextDecorator):
    """While active, what reads a block's output for its own gradient keeps a recipe for it in its place.

    Also a decorator: `@discard_outputs()` over a function or a `forward`. It holds for the calling thread, and within
    another the outer one goes on, with its options. An output can be let go of if its block keeps what it takes to make
    it again: all do but `bias_act` with the identity, relu or leaky_relu, whose reader keeps no more than the block
    would. Views of an output count as the output, and so do the copies that autocast makes of it. Where an output has
    been written to in place, what read it before gets what it read, and what reads it afterwards keeps it, or a recipe
    with these writes in it if the graph knows them all.

    What torch's own cheap ops make is let go of likewise, such as the product in `linear(silu(gate) * value)`: if the
    autograd graph says how it was made, from tensors that the graph keeps anyway, and if these and it have not been
    written to where autograd does not see it. Writes through `.data` and by others' kernels are seen by nobody, and
    those to a bias, of which a copy is made for what it was added to, only if the module is given that it belongs to.

    What is kept is kept as it was: a parameter that is given other data by the time of the backward pass (`p.data =
    other`) has the gradient of what ran, and a function of one's own that saves a parameter gets its values back, not
    the object with its attributes. The first is so of torch's matrix products, the second of all saved-tensor hooks.

    Where saved-tensor hooks are disabled (torch.func) it does nothing, and within torch.compile it does nothing either:
    see `selective_contexts` for that.

    Args:
        module: the one whose forward pass runs within.
        products: matrix products too, where it is `bias_act`, `dyt`, `glu` or `packed_glu` that reads them. They run
            again in the backward pass. Of biases copies are kept.
        temporaries: also what is made of a tensor that nothing keeps, such as the sum in `relu(norm(x) + y)`. That is
            right if no such tensor is written to where autograd does not see it, under `no_grad` or by way of
            `detach()`: it cannot be told from the graph.

    Kept for backward:
        In the place of an output a recipe, which holds the tensors that the block keeps anyway.

    Raises:
        RuntimeError: in the backward pass, where a tensor that a recipe needs has been written to in place since.

    Example:
        >>> model = torch.nn.Sequential(ckpt_kernels.nn.LayerNorm(64, activation="gelu"), torch.nn.Linear(64, 8))
        >>> x = torch.randn(8, 64, requires_grad=True)
        >>> with ckpt_kernels.recompute.discard_outputs():
        ...     loss = model(x).square().mean()
        >>> loss.backward()
        >>> saved_bytes(model, x) - saved_bytes(ckpt_kernels.recompute.discard_outputs()(model), x) == x.nbytes
        True

    Source:
        The grain: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016; the way:
        `torch.autograd.graph.saved_tensors_hooks`.
    """

    def __init__(self, module: nn.Module | None = None, *, products: bool = False, temporaries: bool = False) -> None:
        self._module = module
        self._products = products
        self._temporaries = temporaries
        self._entered: list[AbstractContextManager[None] | None] = []

    def _recreate_cm(self) -> "discard_outputs":
        return discard_outputs(self._module, products=self._products, temporaries=self._temporaries)

    def __enter__(self) -> "discard_outputs":
        hooks: Any = torch._C._autograd  # of which not all is in torch's stubs
        if torch.compiler.is_compiling() or not hooks._saved_tensors_hooks_is_enabled():
            self._entered.append(None)
            return self
        # Within another that sees what is saved, that one goes on: outputs may cross from one to the other.
        hooked = None if discarding() is not None else _hooked(self._products, self._temporaries)
        self._entered.append(hooked)
        if hooked is not None:
            hooked.__enter__()
            if self._module is not None:
                thread.active[-1].begin(self._module)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        hooked = self._entered.pop()
        if hooked is not None:
            hooked.__exit__(kind, error, trace)


@contextlib.contextmanager
def _hooked(products: bool, temporaries: bool) -> Iterator[None]:
    """A discarder at work.

    The end is a mark on the discarder itself, so that it holds wherever this generator is closed: by an interrupt
    between any two steps, when the last reference to it goes; in another thread, whose own hooks are not touched.
    """
    discarder = Discarder(products, temporaries)
    hooks = torch.autograd.graph.saved_tensors_hooks(discarder.pack, _unpack)
    try:
        hooks.__enter__()
        thread.active.append(discarder)
        yield
    finally:
        discarder.is_closed = True
        discarder.close()
        if _sees_what_is_saved(discarder):
            hooks.__exit__(None, None, None)


class layer:
    """A function, or a module, of which the backward pass runs all products again but the last: a layer of a network.

    What goes into it is kept, and what its attention saves of its own result. Queries, keys and values, the product of
    attention's output, what the MLP begins with, norms, gates and rotations are made again, once, when the
    backward pass comes to the layer. Neither attention runs again nor the last product: a checkpoint of the layer runs
    both for nothing.

    A product runs again if torch's graph says how (`nn.Linear`, `F.linear`, two-dimensional `@`); where attention is
    written out, its products of three dimensions are kept.

    Args:
        function: anything that is called with tensors, and returns tensors, by themselves or in a tuple, list or dict.

    Kept for backward:
        Tensors that are given to it and that come out of it, if somebody's gradient needs them, and what no recipe can
        make again.

    Example:
        >>> block = torch.nn.Sequential(ckpt_kernels.nn.LayerNorm(64), ckpt_kernels.nn.MLP(64, 256))
        >>> x = torch.randn(32, 64, requires_grad=True)
        >>> layer = ckpt_kernels.recompute.layer(block)
        >>> saved_bytes(layer, x, parameters_of=block) < saved_bytes(block, x) / 3
        True
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self._function if isinstance(self._function, nn.Module) else None
        return run_as_layer(self._function, module, args, kwargs)


def run_as_layer(function: Callable[..., Any], module: nn.Module | None, args: tuple, kwargs: dict[str, Any]) -> Any:
    """See `layer`; the module is that whose forward runs."""
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    with discard_outputs(module, products=True):
        discarder = None if torch.compiler.is_compiling() else discarding()
        if discarder is None:
            return function(*args, **kwargs)
        for tensor in provenance.tensors_among((args, kwargs)):
            discarder.hold(tensor)
        discarder.layers += 1
        try:
            output = function(*args, **kwargs)
        finally:
            discarder.layers -= 1
        for tensor in provenance.tensors_among(output):
            discarder.hold(tensor)
        return output


class DiscardOutputs(nn.Module):
    """`module`, whose forward pass runs within `discard_outputs`.

    Args:
        module: any module.

    Example:
        >>> model = torch.nn.Sequential(ckpt_kernels.nn.RMSNorm(64), torch.nn.Linear(64, 8))
        >>> model = ckpt_kernels.recompute.DiscardOutputs(model)
        >>> model(torch.randn(8, 64)).shape
        torch.Size([8, 8])
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with discard_outputs(self.module):
            return self.module(*args, **kwargs)


def selective_contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """For torch.compile, which does not use hooks: tells its partitioner to compute blocks again and keep the rest.

    The compiled model keeps what it would keep within `discard_outputs`. By itself the partitioner takes a block for an
    op that is too dear to run again, and keeps its input and its output.

    Returns:
        The two contexts that the `context_fn` of `torch.utils.checkpoint.checkpoint` returns.

    Example:
        >>> import functools
        >>> checkpoint = functools.partial(
        ...     torch.utils.checkpoint.checkpoint,
        ...     use_reentrant=False,
        ...     context_fn=ckpt_kernels.recompute.selective_contexts,
        ... )
        >>> model = torch.nn.Sequential(ckpt_kernels.nn.RMSNorm(64), torch.nn.Linear(64, 8))
        >>> compiled = torch.compile(lambda x: checkpoint(model, x))
    """
    return create_selective_checkpoint_contexts(_keep_all_but_blocks)


def _keep_all_but_blocks(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    ours = getattr(op, "namespace", None) == "ckpt_kernels"
    return CheckpointPolicy.PREFER_RECOMPUTE if ours else CheckpointPolicy.MUST_SAVE


def discarding() -> Discarder | None:
    """The context that sees what is saved now: the innermost, unless somebody else's hooks are within it."""
    innermost = _innermost()
    return innermost if innermost is not None and _sees_what_is_saved(innermost) else None


def announce(
    announcement: Announcement | None, elementwise: bool = False, total: tuple[Tensor, Announcement] | None = None
) -> None:
    """From within an op's forward: how its output can be had again, from what it keeps anyway; None if it cannot.

    What an `elementwise` op saves may be a product that runs again, where that was asked for. `total` is another
    result, which the op saves, and how that can be had.
    """
    discarder = _innermost()
    if discarder is None:
        return
    seen = _sees_what_is_saved(discarder)
    discarder.announced = announcement if seen else None
    discarder.saved = [] if seen else None
    discarder.is_elementwise = elementwise and seen
    discarder.total = Total(total[0].untyped_storage()._cdata, total[1]) if seen and total is not None else None


def record(output: Tensor, recipe: Announcement | None = None) -> None:
    """From now on what reads `output` for a gradient, and is discarding, keeps a recipe in the place of it.

    After an op's forward: the recipe is the one that was announced. Of another output it is given, and is kept as long
    as the output is.
    """
    discarder = _innermost() if recipe is None else discarding()
    if discarder is not None and (recipe is None or output.requires_grad):
        discarder.record(output, recipe)


def is_active() -> bool:
    """Whether a context is active on this thread."""
    return _innermost() is not None


def _innermost() -> Discarder | None:
    active = thread.active
    while active and active[-1].is_closed:
        active.pop()
    return active[-1] if active else None


def _top_hooks() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None:
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def _sees_what_is_saved(discarder: Discarder) -> bool:
    """Whether its hooks are the innermost on this thread."""
    top = _top_hooks()
    return top is not None and getattr(top[0], "__self__", None) is discarder


def _biases_in(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of at most one dimension in a module and all that it contains; some of them more than once."""
    waiting, seen = [module], set()
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        for parameter in module.__dict__["_parameters"].values():
            if parameter is None or is_lazy(parameter):
                continue
            if parameter.dim() < 2 and not parameter.is_inference():
                yield parameter
        waiting.extend(child for child in module.__dict__["_modules"].values() if child is not None)


def _are_among(tensors: Sequence[Tensor | None], saved: Sequence[Packed]) -> bool:
    """Whether the memory of each is that of one that is saved."""
    there = {id(packed.tensor) for packed in saved}
    others = [t for t in tensors if t is not None and id(t) not in there]
    if not others:
        return True
    storages = {packed.tensor.untyped_storage()._cdata for packed in saved}
    return all(t.untyped_storage()._cdata in storages for t in others)


def _outlasting(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of a norm's weight that may be gone when the recipe is asked for: a sharded one is gathered
    when its own module's backward pass begins, and what reads the module's output comes before."""
    sharded = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not sharded or tensor.dim() != 1 or not (tensor.requires_grad or isinstance(tensor, nn.Parameter)):
        return tensor
    return tensor.detach().clone()


def _unpack(packed: Cell) -> Tensor:
    # Compiled autograd traces through hooks. Versions, locks and what is shared by readers are for no tracer.
    return _unpack_untraced(packed) if torch.compiler.is_compiling() else packed.content.get()


@torch._disable_dynamo
def _unpack_untraced(packed: Cell) -> Tensor:
    return packed.get()

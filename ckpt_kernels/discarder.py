"""What is kept in the place of each tensor that is saved, while outputs are let go of: the state of the contexts.

A `Discarder` is asked for every tensor that a node of the autograd graph saves, and answers with a `Cell`: the tensor
itself, or a recipe, which comes from the block that made the tensor, or from the graph behind it (see `provenance`).
"""

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parameter import is_lazy

from . import provenance
from .provenance import Block, Trace
from .recipes import (
    Cell,
    Claim,
    Foreign,
    Geometry,
    Kept,
    Operand,
    Recipe,
    Step,
    Unwritten,
    geometry_of,
    recipe_of_step,
    watching,
)

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


class Held:
    """What comes into a layer or goes out of it: it is kept as it is if somebody saves it, and nothing behind it is
    looked for.

    Recipes read it only if a node saves it too (`is_saved`): then torch would refuse a write to it as well.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.tensor = weakref.ref(tensor)
        self.version = tensor._version
        self.is_saved = False


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
        self._outer = top_hooks()
        self.is_closed = False
        # Of the op whose forward is over and whose output is not there yet.
        self.announced: Announcement | None = None
        self.saved: list[Packed] | None = None
        self.is_elementwise = False
        self.total: Total | None = None
        # How many layers are open, in which products run again whoever reads them; and what goes in and out of them.
        self.layers = 0
        # Whether nothing is let go of but what was recorded before.
        self.is_paused = False
        self._held: dict[int, Held] = {}

    def hold(self, tensor: Tensor) -> None:
        """Marks a tensor at a layer's edge as kept as it is, unless one step makes it again from what is kept anyway.
        So no recipe reaches from layer to layer."""
        if isinstance(tensor, Tensor) and tensor.layout is torch.strided and tensor.requires_grad:
            entry = self._entries.get(tensor.untyped_storage()._cdata)
            recipe = None if entry is None or entry.storage.expired() else entry.recipe()
            if recipe is not None and recipe.depth == 1:
                return
            for key in [key for key, held in self._held.items() if held.storage.expired()]:
                del self._held[key]
            held = Held(tensor)
            self._held[held.storage.cdata] = held

    def _held_as(self, tensor: Tensor) -> Held | None:
        held = self._held.get(tensor.untyped_storage()._cdata) if self._held else None
        if held is None or held.storage.expired() or held.version != tensor._version:
            return None
        return held

    def held_at(self, node: Any, output: int) -> Operand | None:
        """What is held of a node's results, as it was then."""
        for held in self._held.values():
            tensor = held.tensor()
            if tensor is None or tensor.output_nr != output:
                continue
            maker = tensor.grad_fn
            if maker is node if maker is not None else getattr(node, "variable", None) is tensor:
                return self._packed(tensor) if held.is_saved and tensor._version == held.version else None
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
        pairs = zip(tensors, recipe.operands, strict=True)
        kept = [t for t, o in pairs if t is not None and o is not None and not (t.is_leaf or o.depth)]
        return sum(t.nbytes for t in kept if not (_are_among((t,), saved) or self._held_as(t) is not None))

    def _operand(self, tensor: Tensor, saved: Sequence[Packed]) -> Operand:
        """What the op's node holds of a tensor, if it holds that to the end; else the tensor is packed for the recipe.

        The content alone: a cell that holds the recipe would be held by it.
        """
        lasting = _outlasting(tensor)
        for packed in saved:
            if packed.tensor is lasting and not packed.is_exchanged:
                if isinstance(packed.cell.content, Kept):
                    return packed.cell.content
                # What others packed is unpacked once for both.
                if isinstance(packed.cell.content, Foreign) and (shared := self.share(packed.cell)) is not None:
                    return shared
        return self._operand_of(self._packed(lasting))

    def _operand_of(self, cell: Cell) -> Operand:
        if isinstance(cell.content, Foreign) and cell.watch is not None:
            return Unwritten(cell.content, cell.watch, cell.version)
        return cell

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

    @contextlib.contextmanager
    def at(self, level: str) -> Iterator[None]:
        """Within, outputs are let go of as at a level of `convert`, whatever is around: at "block" none are that are
        made within."""
        before = self.is_paused, self._products, self.layers
        self.is_paused, self._products = level == "block", level in ("all", "layer")
        self.layers = 1 if level == "layer" else 0
        try:
            yield
        finally:
            self.is_paused, self._products, self.layers = before

    @property
    def level(self) -> str:
        """The level of `convert` as at which outputs are let go of now."""
        if self.is_paused:
            return "block"
        return "layer" if self.layers > 0 else "all" if self._products else "output"

    def begin(self, module: nn.Module) -> None:
        """The module's forward begins. From the first such call on, only biases that were there then are copied."""
        biases = {} if self._biases is None else self._biases
        biases.update((id(bias), (bias, bias._version)) for bias in _biases_in(module) if id(bias) not in biases)
        self._biases = biases

    def close(self) -> None:
        """From now on recipes live by their claims alone, and whatever is saved from now on is kept as it is."""
        self.is_closed = True
        # Nodes of the graph know this context longer than they keep tensors, and hooks around may hold some.
        self._outer = None
        self._entries.clear()
        self._held.clear()
        self._biases = {}
        self.announced = self.saved = self.total = None

    def pack(self, tensor: Tensor) -> Cell:
        # Closed where these hooks could not be taken off, in another thread: this is the first chance to.
        if self.is_closed and sees_what_is_saved(self):
            torch._C._autograd._pop_saved_tensors_default_hooks()
        if self._held and type(tensor) is Tensor and tensor.layout is torch.strided:
            held = self._held_as(tensor)
            if held is not None:
                held.is_saved = True
        return self._packed(tensor)

    def _packed(self, tensor: Tensor) -> Cell:
        # What is packed for a recipe is nothing that the op saves.
        saved, self.saved = self.saved, None
        found = None if self.is_closed else self._recipe_for(tensor)
        if found is None and self.total is not None and self.layers:
            found = self._recipe_of_total(self.total, tensor)
        self.saved = saved
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
        if root.grad_fn is None or self._held_as(tensor) is not None:
            return None
        entry = self._entries.get(tensor.untyped_storage()._cdata) if self._entries else None
        if entry is not None and not entry.storage.expired():
            if tensor.dtype != entry.dtype:
                return None
            if tensor._version == entry.version and (recipe := entry.recipe()) is not None:
                return recipe
        return None if self.is_paused else self._traced(tensor)

    def _recipe_of_total(self, total: Total, tensor: Tensor) -> Recipe | None:
        """Within a layer, of a sum whose parts are to be had."""
        if tensor.untyped_storage()._cdata != total.storage:
            return None
        # It is asked for its parts only once: they are packed too.
        self.total = None
        if any(t is not None and (held := self._held_as(t)) is not None and not held.is_saved for t in total.recipe[1]):
            return None
        recipe = self._recipe(*total.recipe, ())
        if self._keeps(recipe, total.recipe[1], ()) < tensor.nbytes and recipe.depth <= LONGEST_CHAIN:
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

    def share(self, known: Cell | Block) -> Operand | None:
        """What is known, as one more recipe's operand."""
        if isinstance(known, Block):
            recipe = known.recipe()
            return None if recipe is None else Claim(recipe, None)
        if isinstance(known.content, Foreign):
            # What others packed they may give back only once, as torch's checkpoint does.
            known.content = Claim(Recipe(known.content.get, (), 0), None)
        claim = known.content
        if not isinstance(claim, Claim):
            return known
        shared = Claim(claim.recipe, claim.geometry)
        is_foreign = claim.depth == 0
        return Unwritten(shared, known.watch, known.version) if is_foreign and known.watch is not None else shared

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


def top_hooks() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None:
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def sees_what_is_saved(discarder: Discarder) -> bool:
    """Whether its hooks are the innermost on this thread."""
    top = top_hooks()
    return top is not None and getattr(top[0], "__self__", None) is discarder


def _biases_in(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of at most one dimension in a module and all that it contains; some of them more than once."""
    waiting, seen = [module], set()
    for module in waiting:
        own = module.__dict__
        for parameter in own["_parameters"].values():
            if parameter is None or is_lazy(parameter):
                continue
            if parameter.dim() < 2 and not parameter.is_inference():
                yield parameter
        if own["_modules"] and module not in seen:
            seen.add(module)
            waiting += [child for child in own["_modules"].values() if child is not None]


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

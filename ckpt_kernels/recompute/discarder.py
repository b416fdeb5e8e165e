"""The state of one context: for each saved tensor the decision whether the tensor or a recipe is kept.

A `Discarder` is asked for every tensor that a node of the autograd graph saves, and answers with a `Cell`: the tensor
itself, or a recipe, which comes from the block that made the tensor, or from the graph behind it (see `provenance`).
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .active import sees_what_is_saved, top_hooks
from .announcements import Announced, Announcement, Packed, Total, are_among, may_be_sharded, outlasting
from .biases import Biases
from .cells import Cell, Foreign, Kept, Operand, Unwritten, is_plain, watching
from .entries import Block, Entries, Entry, watch_of
from .layer_boundaries import Edges
from .provenance import Trace
from .recipes import LONGEST_CHAIN, Claim, Recipe, Step, geometry_of, recipe_of_step
from .rules import BY_RESULT, RULES, RULES_AND_PRODUCTS, RULES_IN_LAYERS
from .shared_results import exchange, note_keeper
from .small_operands import COPIED, SmallOperands, fills_memory
from .stacked_weights import Stacked


class Discarder:
    """The state of one active context."""

    def __init__(self, module: nn.Module | None, products: bool, temporaries: bool) -> None:
        self._products = products
        self._temporaries = temporaries
        self.all_entries = Entries()
        self.biases, self.stacked = Biases(module), Stacked(module)
        self.may_be_sharded = may_be_sharded()
        self.outer = top_hooks()
        self.is_closed = False
        # Of the op whose forward has run, and whose output `record` has not been given yet.
        self.announced: Announced | None = None
        # Whether a tensor is packed for a recipe, and so does not count as saved by that op.
        self.is_apart = False
        # Within a layer products run again, whoever reads them.
        self.is_in_layer = False
        # Whether only outputs that were recorded before are let go of.
        self.is_paused = False
        self._edges = Edges()
        self.small_operands = SmallOperands()
        # csrc/thin (cells.cpp, records.cpp) reads the public attributes. Edges and entries by the addresses of storages
        # stay the same two dicts.
        self.held, self.entries = self._edges.held, self.all_entries.by_storage
        self.rules = RULES_AND_PRODUCTS if products else RULES

    def hold(self, tensor: Tensor) -> None:
        """Keeps a tensor at a layer's edge, so that no recipe reaches on, unless one step makes it of kept tensors."""
        if isinstance(tensor, Tensor) and tensor.layout is torch.strided and tensor.requires_grad:
            entry = self.all_entries.of(tensor)
            recipe = None if entry is None else entry.recipe()
            if recipe is None or recipe.depth != 1:
                self._edges.add(tensor)

    def held_at(self, node: Any, output: int) -> Operand | None:
        """The held result of a node, as an operand."""
        tensor = self._edges.made_by(node, output)
        return None if tensor is None else self._packed(tensor)

    def record(self, output: Tensor, recipe: Announcement | None = None) -> None:
        """Takes the output of the announced op, or another output with a recipe, which lasts as long as that output."""
        if recipe is not None:
            made = self._recipe(*recipe, {})
            self.all_entries.add(Entry(output, lambda: made))
            return
        announced, self.announced = self.announced, None
        if announced is None or announced.announcement is None or not output.requires_grad:
            return
        rebuild, tensors = announced.announcement
        saved, kept = announced.saved, announced.kept
        try:
            operands = list(map(kept.__getitem__, map(id, tensors)))
            made, is_of_saved, more = Recipe(rebuild, operands, 1), True, 0
        except KeyError:
            made, is_of_saved = self._recipe(rebuild, tensors, saved), are_among(tensors, saved)
            more = self._keeps(made, tensors, saved)
        if more >= output.nbytes:
            return
        entry = Entry(output, weakref.ref(made))
        node: Any = output.grad_fn
        node.recomputed_block = Block(self, entry, watching(output))
        # A recipe of saved tensors alone lasts as long as the node that saves them. So the recipe is there when a look
        # at the graph behind another tensor comes to this node and the output is gone.
        if saved and is_of_saved:
            _, first, _ = next(iter(saved.values()))
            first.attached = made
            self.all_entries.add(entry)
        else:
            self.all_entries.add(Entry(output, lambda: made))

    def _recipe(
        self, rebuild: Callable[..., Tensor], tensors: Sequence[Tensor | None], saved: Mapping[int, Packed]
    ) -> Recipe:
        operands = [None if t is None else self._operand(t, saved) for t in tensors]
        return Recipe(rebuild, operands, 1 + max((o.depth for o in operands if o is not None), default=0))

    def _keeps(self, recipe: Recipe, tensors: Sequence[Tensor | None], saved: Mapping[int, Packed]) -> int:
        """Bytes that only the recipe keeps: a recipe that keeps as much as the output gains nothing."""
        pairs = zip(tensors, recipe.operands, strict=True)
        kept = [t for t, o in pairs if t is not None and o is not None and not (t.is_leaf or o.depth)]
        return sum(t.nbytes for t in kept if not (are_among((t,), saved) or self._edges.of(t) is not None))

    def _operand(self, tensor: Tensor, saved: Mapping[int, Packed]) -> Operand:
        """The content of the node's cell, if the node keeps it to the end; else the tensor is packed for the recipe.

        The content alone: a cell that holds the recipe would be held by it.
        """
        lasting = outlasting(tensor) if self.may_be_sharded else tensor
        _, cell, is_exchanged = saved.get(id(lasting), (None, None, False))
        if cell is not None and not is_exchanged:
            if isinstance(cell.content, Kept):
                return cell.content
            # A tensor that outer hooks packed is unpacked once for both.
            if isinstance(cell.content, Foreign) and (shared := self.share(cell)) is not None:
                return shared
        return self._operand_of(self._packed(lasting))

    def _operand_of(self, cell: Cell) -> Operand:
        if isinstance(cell.content, Foreign) and cell.watch is not None:
            return Unwritten(cell.content, cell.watch, cell.version)
        return cell

    @contextlib.contextmanager
    def at(self, level: str) -> Iterator[None]:
        """A context in which outputs are let go of as at a level of `convert`, whatever the level around.

        At "block" none are let go of that are made within.
        """
        before = self.is_paused, self._products, self.is_in_layer, self.rules
        self.is_paused, self._products = level == "block", level in ("all", "layer")
        self.is_in_layer = level == "layer"
        self.rules = RULES_IN_LAYERS if self.is_in_layer else RULES_AND_PRODUCTS if self._products else RULES
        try:
            yield
        finally:
            self.is_paused, self._products, self.is_in_layer, self.rules = before

    @property
    def level(self) -> str:
        """The level of `convert` that holds now."""
        if self.is_paused:
            return "block"
        return "layer" if self.is_in_layer else "all" if self._products else "output"

    def close(self) -> None:
        """From now on recipes live by their claims alone, and tensors saved from now on are kept."""
        self.is_closed = True
        # Nodes refer to this context longer than they keep tensors, and the hooks around may hold tensors.
        self.outer = None
        self.all_entries.clear()
        self._edges.clear()
        self.small_operands.clear()
        self.announced = None

    def pack(self, tensor: Tensor) -> Cell:
        # The context was closed in another thread, where these hooks could not be taken off: this is the first chance.
        if self.is_closed and sees_what_is_saved(self):
            torch._C._autograd._pop_saved_tensors_default_hooks()
        if self.held and is_plain(tensor):
            held = self._edges.of(tensor)
            if held is not None:
                held.is_saved = True
        return self._packed(tensor)

    def _packed(self, tensor: Tensor) -> Cell:
        node, announced = tensor.grad_fn, self.announced
        if node is None and tensor._base is None and (announced is None or announced.total is None):
            # A weight, an input or a statistic, which has no past to be made from.
            content, watch = self._kept(tensor)
            cell, is_exchanged = Cell(content, self, tensor._version, watch), False
        else:
            cell, is_exchanged = self._made_or_kept(tensor, node)
        if announced is not None and not self.is_apart and tensor.layout is torch.strided:
            announced.saved[id(tensor)] = tensor, cell, is_exchanged
            if type(cell.content) is Kept and not is_exchanged and not self.may_be_sharded:
                announced.kept[id(tensor)] = cell.content
        return cell

    def _made_or_kept(self, tensor: Tensor, node: Any) -> tuple[Cell, bool]:
        """The cell, with a recipe if there is one; and whether there may be one later, for all who keep the tensor."""
        before, self.is_apart = self.is_apart, True
        found = None if self.is_closed else self._recipe_for(tensor)
        if found is None and self.announced is not None and self.announced.total is not None:
            found = self._recipe_of_total(self.announced, self.announced.total, tensor)
        self.is_apart = before
        if isinstance(found, Recipe) and found.depth <= LONGEST_CHAIN:
            content: Operand = Claim(found, geometry_of(tensor))
            watch = watch_of(tensor, self.all_entries.of(tensor))
        else:
            content, watch = self._kept(tensor)
        cell = Cell(content, self, tensor._version, watch)
        cell.is_clone = node is not None and node.name() == "CloneBackward0"
        if isinstance(found, Tensor):
            note_keeper(found, tensor, cell)
        return cell, isinstance(found, Tensor)

    def _kept(self, tensor: Tensor) -> tuple[Operand, Tensor | None]:
        """A tensor's content where the tensor is kept, by the hooks around if there are any; and the watch."""
        if self.outer is not None:
            packed, unpack = self.outer
            return Foreign(packed(tensor), unpack), watching(tensor)
        # Detached: a node that keeps its own output would otherwise keep itself alive.
        kept = tensor.detach()
        return Kept(kept, is_plain(tensor)), kept

    def _recipe_for(self, tensor: Tensor) -> Recipe | Tensor | None:
        if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.is_neg() or tensor.is_nested:
            return None
        # A detached tensor may be read after a step of the optimizer, which changes the weights that a recipe needs.
        root = tensor if tensor._base is None else tensor._base
        if root.grad_fn is None or self._edges.of(tensor) is not None:
            return None
        entry = self.all_entries.of(tensor)
        if entry is not None:
            if tensor.dtype is not entry.dtype:
                return None
            if tensor._version == entry.version and (recipe := entry.recipe()) is not None:
                return recipe
        return None if self.is_paused else self._traced(tensor)

    def _recipe_of_total(self, announced: Announced, total: Total, tensor: Tensor) -> Recipe | None:
        """Within a layer, the recipe of a sum from recipes of the parts."""
        if tensor.untyped_storage()._cdata != total.storage:
            return None
        # Only once: packing the parts comes back here.
        announced.total = None
        helds = [self._edges.of(t) for t in total.recipe[1] if t is not None]
        if any(held is not None and not held.is_saved for held in helds):
            return None
        recipe = self._recipe(*total.recipe, {})
        if self._keeps(recipe, total.recipe[1], {}) < tensor.nbytes and recipe.depth <= LONGEST_CHAIN:
            self.all_entries.add(Entry(tensor, lambda: recipe))
            return recipe
        return None

    def _traced(self, tensor: Tensor) -> Recipe | Tensor | None:
        """A recipe from the graph behind a tensor, or behind the tensor's base.

        Where there is none for the result of a node that saves its result, this result: there may be one later.
        """
        root = tensor._base
        if root is None:
            root = tensor
        node = root.grad_fn
        if node is None:
            return None
        name = node.name()
        rules = self.rules
        if rules is RULES_AND_PRODUCTS and (self.announced is None or not self.announced.is_elementwise):
            rules = RULES
        if name not in rules:
            return None
        # A rebuilt copy would lose the tangent.
        if tensor.dtype != root.dtype or torch.autograd.forward_ad._current_level >= 0:
            return None
        trace = Trace(self, rules, self._temporaries, root.nbytes // COPIED)
        version = root._version
        if not version:
            trace.learn(node)
        elif not trace.is_written_by_graph(node, root.untyped_storage()._cdata, version):
            return None
        step = trace.value(node, root.output_nr)
        if step is None or not trace.is_grounded or step.depth >= LONGEST_CHAIN or not fills_memory(root):
            return root if name in BY_RESULT else None
        recipe = recipe_of_step(step, root.shape, root.stride(), root.dtype)
        self.all_entries.add(Entry(root, weakref.ref(recipe)))
        return recipe

    # For `Trace`

    def share(self, known: Cell | Block) -> Operand | None:
        """A cell or a block's output, as an operand of one more recipe."""
        if isinstance(known, Block):
            recipe = known.entry.recipe()
            return None if recipe is None else Claim(recipe, None)
        if isinstance(known.content, Foreign):
            # Outer hooks may unpack only once, as torch's checkpoint does.
            known.content = Claim(Recipe(known.content.get, (), 0), None)
        claim = known.content
        if not isinstance(claim, Claim):
            return known
        shared = Claim(claim.recipe, claim.geometry)
        is_foreign = claim.depth == 0
        return Unwritten(shared, known.watch, known.version) if is_foreign and known.watch is not None else shared

    def exchange(self, own: Cell, step: Step) -> None:
        if own.owner is self and step.depth < LONGEST_CHAIN:
            exchange(own, step)

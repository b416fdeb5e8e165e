"""The state of one context, which decides for each saved tensor whether the tensor or a recipe is kept.

The saved-tensor hooks call a `Discarder` for every tensor that an autograd node saves, and get a `Cell` that holds the
tensor or a recipe. The recipe comes from the block that made the tensor, or from the autograd graph behind the tensor
(see `provenance`).
"""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import fast_path
from .announcements import Announced, Announcement, Packed, Total, copied_if_sharded, share_memory_with
from .cells import Cell, Kept, Operand, OuterPacked, Unwritten, is_plain, version_watch
from .cheap_recipes import has_cheap_recipe
from .copies import copied_view, note_copy, recipe_of_copy
from .entries import Block, Entry, watch_of
from .hooks import STACK, has_innermost_hooks
from .nodes import name_of
from .provenance import Trace
from .recipes import LONGEST_CHAIN, Claim, Layout, Recipe, Step, geometry_of, layout_of, recipe_of_step
from .rules import BY_RESULT, RULES_AND_EXPERTS, RULES_AND_PRODUCTS
from .shared_results import register_keeper, replace_result
from .small_operands import COPIED, fills_memory
from .state import State
from .widened import narrow_copy, widened


class Discarder(State):
    """One active context."""

    __slots__ = ()

    def hold(self, tensor: Tensor) -> None:
        """Keeps a tensor at a layer's boundary, where recipes end, unless the tensor has a cheap recipe."""
        if isinstance(tensor, Tensor) and tensor.layout is torch.strided and tensor.requires_grad:
            if not has_cheap_recipe(tensor, self):
                self.boundaries.add(tensor)

    def held_at(self, node: Any, output: int) -> Operand | None:
        """The boundary tensor that a node made as this output, as an operand."""
        held = self.boundaries.made_by(node, output)
        return self.share(held) if isinstance(held, Cell) else None if held is None else self._packed(held)

    def record_copy(self, tensor: Tensor, copy: Tensor) -> None:
        """Gives readers that save a copy of a tensor the tensor's recipe, if there is one.

        The copy of a tensor at a layer's boundary is kept, and recipes read the copy in place of the tensor.
        """
        held = self.boundaries.of(tensor)
        if held is not None:
            if held.tensor() is tensor:
                self.boundaries.add(copy, held)
        elif tensor._base is None and layout_of(copy) == layout_of(tensor):
            recipe = self.source_of(tensor)
            if isinstance(recipe, Recipe) and recipe.depth <= LONGEST_CHAIN:
                self.all_entries.add(Entry(copy, lambda: recipe))

    def record(self, output: Tensor, recipe: Announcement | None = None) -> None:
        """Records the output of the announced op; with `recipe`, another output, as long as that output lives."""
        # A recomputed tensor begins at the start of its storage.
        layout, fits = layout_of(output), output.requires_grad and not output.storage_offset()
        if recipe is not None:
            if fits:
                new_recipe = self._recipe(recipe, {}, layout)
                self.all_entries.add(Entry(output, lambda: new_recipe))
            return
        announced, self.announced = self.announced, None
        if announced is None or announced.announcement is None or not fits:
            return
        (_, tensors), saved = announced.announcement, announced.saved
        new_recipe = self._recipe(announced.announcement, saved, layout)
        reads_saved_only = share_memory_with(tensors, saved)
        extra_bytes = self._extra_bytes(new_recipe, tensors, saved)
        node: Any = output.grad_fn
        if extra_bytes >= output.nbytes:
            if not share_memory_with((output,), saved):
                # A mark for csrc/thin/graph.cpp: there is neither a recipe nor a cell of the output.
                node.recomputed_block = None
            return
        entry = Entry(output, weakref.ref(new_recipe))
        node.recomputed_block = Block(self, entry, version_watch(output))
        # A recipe that reads only saved tensors lives as long as the node that saves them. So the recipe still exists
        # when a trace of another tensor's graph reaches this node after the output is gone.
        if saved and reads_saved_only:
            _, first, _ = next(iter(saved.values()))
            first.attached = new_recipe
            self.all_entries.add(entry)
        else:
            self.all_entries.add(Entry(output, lambda: new_recipe))

    def _recipe(self, announcement: Announcement, saved: Mapping[int, Packed], layout: Layout) -> Recipe:
        """A recipe that runs the announced function on the announced tensors."""
        rebuild, tensors = announcement
        operands = [None if t is None else self._operand(t, saved) for t in tensors]
        return Recipe(rebuild, operands, 1 + max((o.depth for o in operands if o is not None), default=0), layout)

    def _extra_bytes(self, recipe: Recipe, tensors: Sequence[Tensor | None], saved: Mapping[int, Packed]) -> int:
        """The bytes that only the recipe keeps. A recipe that keeps as much as the output saves no memory."""
        pairs = zip(tensors, recipe.operands, strict=True)
        kept = [t for t, o in pairs if t is not None and o is not None and not (t.is_leaf or o.depth)]
        return sum(t.nbytes for t in kept if not (share_memory_with((t,), saved) or self.boundaries.of(t) is not None))

    def _operand(self, tensor: Tensor, saved: Mapping[int, Packed]) -> Operand:
        """The content of the node's cell, if the node keeps the content; else the tensor, packed for the recipe.

        The operand is the content and not the cell: a cell that holds the recipe would be held by the recipe.
        """
        lasting = copied_if_sharded(tensor) if self.may_be_sharded else tensor
        _, cell, is_replaceable = saved.get(id(lasting), (None, None, False))
        if cell is not None and not is_replaceable:
            if isinstance(cell.content, Kept):
                return cell.content
            # A tensor that outer hooks packed is unpacked once for both readers.
            if isinstance(cell.content, OuterPacked) and (shared := self.share(cell)) is not None:
                return shared
        cell = self._packed(lasting)
        if isinstance(cell.content, OuterPacked) and cell.watch is not None:
            return Unwritten(cell.content, cell.watch, cell.version)
        return cell

    def pack(self, tensor: Tensor) -> Cell:
        """The hook that packs a saved tensor."""
        # If another thread closed the context, this call is the first that can remove these hooks.
        if self.is_closed and has_innermost_hooks(self):
            STACK._pop_saved_tensors_default_hooks()
        held = self.boundaries.of(tensor) if self.boundaries and is_plain(tensor) else None
        cell = self._packed(tensor, is_saved=held is None)
        # A view of a copy does not have all of the values.
        if held is not None and (held.original is None or held.tensor() is tensor):
            held.saved(cell)
        return cell

    def _packed(self, tensor: Tensor, is_saved: bool = False) -> Cell:
        node, announced = tensor.grad_fn, self.announced
        if node is None and tensor._base is None and (announced is None or announced.total is None):
            # A weight, an input or a statistic has no autograd node to be recomputed from.
            content, watch = self._kept(tensor)
            cell, is_replaceable = Cell(content, self, tensor._version, watch), False
        else:
            cell, is_replaceable = self._traced_or_kept(tensor, node, is_saved)
        if announced is not None and not self.is_apart and tensor.layout is torch.strided:
            announced.saved[id(tensor)] = tensor, cell, is_replaceable
        return cell

    def _traced_or_kept(self, tensor: Tensor, node: Any, is_saved: bool) -> tuple[Cell, bool]:
        """The cell of a tensor; and whether a later recipe may replace the tensor in all cells."""
        source = self.source_of(tensor)
        if source is None and is_saved:
            source = self._narrowed(tensor)
        if isinstance(source, Recipe) and source.depth <= LONGEST_CHAIN:
            content: Operand = Claim(source, geometry_of(tensor))
            watch = watch_of(tensor, self.all_entries.of(tensor))
        else:
            content, watch = self._kept(tensor)
        cell = Cell(content, self, tensor._version, watch)
        cell.is_clone = node is not None and name_of(node) == "CloneBackward0"
        if isinstance(source, Tensor):
            register_keeper(source, tensor, cell)
        return cell, isinstance(source, Tensor)

    def _narrowed(self, tensor: Tensor) -> Recipe | None:
        """The recipe of a float32 copy of a 16-bit tensor, which keeps 16 bits for all readers of the copy."""
        root = tensor if tensor._base is None else tensor._base
        narrow = None if self.is_closed or tensor.dtype is not root.dtype else narrow_copy(root)
        if narrow is None:
            return None
        recipe = Recipe(widened, (self._kept(narrow)[0],), 1, layout_of(root))
        self.all_entries.add(Entry(root, weakref.ref(recipe)))
        return recipe

    def source_of(self, tensor: Tensor) -> Recipe | Tensor | None:
        """The result of `_recipe_for`, or the recipe of a total.

        Tensors that are packed for recipes do not count as saved by the announced op.
        """
        was_apart, self.is_apart = self.is_apart, True
        try:
            source = None if self.is_closed else self._recipe_for(tensor)
            if source is None and self.announced is not None and self.announced.total is not None:
                source = self._recipe_of_total(self.announced, self.announced.total, tensor)
            return source
        finally:
            self.is_apart = was_apart

    def _kept(self, tensor: Tensor) -> tuple[Operand, Tensor | None]:
        """The content of a kept tensor, packed by the outer hooks if there are any; and the version watch."""
        if self.outer is not None:
            packed, unpack = self.outer
            return OuterPacked(packed(tensor), unpack), version_watch(tensor)
        # Detached, because a node that keeps its own output would keep itself alive.
        kept = tensor.detach()
        return Kept(kept, is_plain(tensor)), kept

    def _recipe_for(self, tensor: Tensor) -> Recipe | Tensor | None:
        """The recipe of a tensor; the tensor itself if a later recipe may replace it; None if it is just kept."""
        if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.is_neg() or tensor.is_nested:
            return None
        # A detached tensor, or a view taken under no_grad, may be read after an optimizer step, which changes the
        # weights that a recipe needs.
        root = tensor if tensor._base is None else tensor._base
        if root.grad_fn is None or tensor.grad_fn is None or self.boundaries.of(tensor) is not None:
            return None
        entry = self.all_entries.of(tensor)
        if entry is not None:
            if tensor.dtype is not entry.dtype:
                return None
            if tensor._version == entry.version and (recipe := entry.recipe()) is not None:
                return recipe
        return None if self.is_paused else self._traced_recipe(tensor, root)

    def _recipe_of_total(self, announced: Announced, total: Total, tensor: Tensor) -> Recipe | None:
        """Within a layer, the recipe of a sum from the recipes of its operands."""
        if tensor.untyped_storage()._cdata != total.storage:
            return None
        # Only once, because packing the operands calls this method again.
        announced.total = None
        tensors = [t for t in total.recipe[1] if t is not None]
        if any((held := self.boundaries.of(t)) is not None and not held.is_saved for t in tensors):
            return None
        recipe = self._recipe(total.recipe, {}, total.layout)
        # A tensor that needs no gradient, and is no weight, is kept by nobody else.
        made = sum(t.nbytes for t in tensors if not (t.requires_grad or isinstance(t, nn.Parameter)))
        extra_bytes = made + self._extra_bytes(recipe, total.recipe[1], {})
        if extra_bytes < tensor.nbytes and recipe.depth <= LONGEST_CHAIN:
            self.all_entries.add(Entry(tensor, lambda: recipe))
            return recipe
        return None

    def _traced_recipe(self, tensor: Tensor, root: Tensor) -> Recipe | Tensor | None:
        """A recipe from the autograd graph behind `root`, which is the tensor or the tensor's base.

        If there is none and the node saves its own result, that result is returned: a later recipe may replace it.
        """
        node: Any = root.grad_fn
        name = name_of(node)
        rules = self.rules
        if rules is RULES_AND_PRODUCTS and (self.announced is None or not self.announced.is_elementwise):
            rules = RULES_AND_EXPERTS
        if name not in rules:
            return None
        # A recomputed copy would lose the tangent.
        if tensor.dtype != root.dtype or torch.autograd.forward_ad._current_level >= 0:
            return None
        is_usual = name in BY_RESULT and not root._version and not self.boundaries
        if is_usual and fast_path.keeps_result(self, node, name, rules):
            return root
        version = root._version
        view = None if version or self.boundaries else copied_view(node)
        recipe = None if view is None else recipe_of_copy(view, layout_of(root), self)
        if recipe is not None and fills_memory(root):
            self.all_entries.add(Entry(root, weakref.ref(recipe)))
            return recipe
        trace = Trace(self, rules, self.temporaries, root.nbytes // COPIED)
        if not version:
            trace.learn_operands(node)
        elif not trace.is_written_by_graph(node, root.untyped_storage()._cdata, version):
            return None
        step = trace.step_for(node, root.output_nr)
        if step is None or not trace.is_grounded or step.depth >= LONGEST_CHAIN or not fills_memory(root):
            return root if name in BY_RESULT else None
        recipe = recipe_of_step(step, layout_of(root))
        if view is not None:
            note_copy(view, layout_of(root), recipe)
        self.all_entries.add(Entry(root, weakref.ref(recipe)))
        return recipe

    # Used by `Trace`

    def share(self, source: Cell | Block) -> Operand | None:
        """The content of a cell, or a block's output, as an operand of another recipe."""
        if isinstance(source, Block):
            return None if (recipe := source.entry.recipe()) is None else Claim(recipe, None)
        if isinstance(source.content, OuterPacked):
            # Outer hooks may unpack only once, as the hooks of torch's checkpoint do.
            source.content = Claim(Recipe(source.content.get, (), 0, None), None)
        claim = source.content
        if not isinstance(claim, Claim):
            return source
        shared = Claim(claim.recipe, claim.geometry)
        is_foreign = claim.depth == 0
        return Unwritten(shared, source.watch, source.version) if is_foreign and source.watch is not None else shared

    def replace_result(self, own: Cell, step: Step) -> None:
        """Replaces a result in all cells that keep the result, if the node's cell belongs to this context."""
        if own.owner is self and step.depth < LONGEST_CHAIN:
            replace_result(own, step)

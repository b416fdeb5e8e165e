"""Trees of a rewritten method in which operators, casts and calls are noted with their operands, for recipes."""

import ast
import functools
import operator
import types
from collections.abc import Callable
from typing import Any

from ...levels import discards_outputs, runs_products_again
from ...recompute import watch
from ..code.frames import PREFIX
from ..code.scope import Scope
from ..code.straight_line import OPAQUE
from ..code.syntax_trees import at, with_changed_children
from . import noted_operations as noted
from .activated_sums import activates_sums
from .note_reasons import activates_permuted_norm, adds_casts
from .roles import Roles

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


class NotedTrees:
    """Notes the operations in one function, and collects the closure variables that the new body needs."""

    def __init__(self, function: types.FunctionType, scope: Scope, roles: Roles, recompute: str) -> None:
        self.function = function
        self.scope = scope
        self.recompute = recompute
        self.cells: dict[str, Any] = {}
        # Where outputs are discarded, recipes need notes of sums and products.
        self.makes_notes = discards_outputs(recompute)
        self.watches_sums = self.makes_notes and activates_sums(function, roles)
        self.follows_writes = self.makes_notes and activates_permuted_norm(function, roles)
        # Where products run again, so do the casts of products.
        self.notes_casts = self.makes_notes and (runs_products_again(recompute) or adds_casts(function))
        self.has_notes = False
        # Whether a product is noted, perhaps of the output of a norm, which can be recomputed together with the norm.
        self.multiplies = False

    def _watched(self, location: ast.AST, tree: ast.expr) -> ast.expr:
        self.has_notes = True
        return at(location, ast.Call(self._cell(watch), [tree], []))

    def _noted(self, tree: Any) -> Any:
        """An operator, a method for one, or a cast with a note of its operands; any other tree unchanged."""
        if isinstance(tree, ast.AugAssign) and self.watches_sums and isinstance(tree.op, ast.Add):
            return self._noted_assignment(tree)
        callee = tree.func if self.makes_notes and isinstance(tree, ast.Call) else None
        if self.notes_casts and isinstance(callee, ast.Attribute) and callee.attr in noted.NOTED_CASTS:
            self.has_notes = True
            return at(
                tree,
                ast.Call(self._cell(noted.noted_cast(callee.attr)), [callee.value, *tree.args], tree.keywords),
            )
        if isinstance(callee, ast.Attribute) and callee.attr in noted.NOTED_METHODS:
            self.has_notes = True
            self.multiplies = self.multiplies or callee.attr == "mul"
            watches = self.watches_sums and callee.attr == "add"
            noted_method = functools.partial(noted.noted_method, watches=watches)
            return at(tree, ast.Call(self._mapped(callee, noted_method), tree.args, tree.keywords))
        compute = noted.NOTED_OPERATORS.get(type(tree.op)) if isinstance(tree, ast.BinOp) and self.makes_notes else None
        if compute is None:
            return tree
        self.has_notes = True
        self.multiplies = self.multiplies or isinstance(tree.op, ast.Mult)
        watches = self.watches_sums and isinstance(tree.op, ast.Add)
        return at(tree, ast.Call(self._cell(noted.noted_operator(compute, watches)), [tree.left, tree.right], []))

    def _noted_assignment(self, tree: ast.AugAssign) -> ast.stmt:
        """`name = iadd(name, value)` with a note for `name += value`, which makes a new tensor of a number."""
        name = tree.target
        if not isinstance(name, ast.Name) or name.id not in self.scope.private_locals:
            return tree
        self.has_notes = True
        add = self._cell(noted.noted_operator(operator.iadd, True))
        value = at(tree, ast.Call(add, [ast.Name(name.id, ast.Load()), tree.value], []))
        return ast.copy_location(ast.Assign([name], value), tree)

    def _with_notes(self, tree: Any) -> Any:
        """A copy with noted operators, but without fused calls, whose results would replace the captured operands."""
        if isinstance(tree, list):
            return [self._with_notes(child) for child in tree]
        if not isinstance(tree, ast.AST) or isinstance(tree, (*OPAQUE, *DEFINITIONS)):
            return tree
        return self._noted(with_changed_children(tree, self._with_notes))

    def _mapped(self, callee: ast.expr, mapping: Callable[[Any], Any]) -> ast.expr:
        """The expression `mapping(callee)`."""
        return at(callee, ast.Call(self._cell(mapping), [callee], []))

    def _cell(self, value: Any) -> ast.expr:
        """A closure variable with this value."""
        name = next((name for name, known in self.cells.items() if known is value), f"{PREFIX}{len(self.cells)}")
        self.cells[name] = value
        return ast.Name(name, ast.Load())

"""Trees of a rewritten method in which operators, casts and calls are noted with their operands, for recipes."""

import ast
import functools
import operator
import types
from collections.abc import Callable
from typing import Any

import torch

from ...levels import discards_outputs, runs_products_again
from ...recompute import watch
from ..code.scope import Scope
from ..code.straight_line import OPAQUE
from ..code.syntax_trees import at, with_changed_children
from . import noted_operations as operations
from .activated_sums import activates_sums
from .closure import Closure
from .note_reasons import activates_permuted_norm, adds_casts
from .roles import Roles

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


class Notes:
    """Notes the operations in one function."""

    def __init__(
        self, function: types.FunctionType, scope: Scope, roles: Roles, recompute: str, closure: Closure
    ) -> None:
        self._private_locals = scope.private_locals
        self._closure = closure
        # Where outputs are discarded, recipes need notes of sums and products.
        self._makes_notes = discards_outputs(recompute)
        self._watches_sums = self._makes_notes and activates_sums(function, roles)
        # Where products run again, so do the casts of products.
        self._notes_casts = self._makes_notes and (runs_products_again(recompute) or adds_casts(function))
        self.follows_writes = self._makes_notes and activates_permuted_norm(function, roles)
        self.has_any = False
        # Whether a product is noted, perhaps of the output of a norm, which can be recomputed together with the norm.
        self.has_products = False

    def watched(self, location: ast.AST, tree: ast.expr) -> ast.expr:
        """The expression, whose result shows later in-place writes."""
        self.has_any = True
        return at(location, ast.Call(self._closure.variable(watch), [tree], []))

    def noted(self, tree: Any) -> Any:
        """An operator, a method for one, or a cast with a note of its operands; any other tree unchanged."""
        if not self._makes_notes:
            return tree
        if isinstance(tree, ast.AugAssign) and self._watches_sums and isinstance(tree.op, ast.Add):
            return self._noted_assignment(tree)
        if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Attribute):
            return self._noted_method(tree, tree.func)
        compute = operations.NOTED_OPERATORS.get(type(tree.op)) if isinstance(tree, ast.BinOp) else None
        if compute is None:
            return tree
        self._note(is_product=isinstance(tree.op, ast.Mult))
        watches = self._watches_sums and isinstance(tree.op, ast.Add)
        call = self._closure.variable(operations.noted_operator(compute, watches))
        return at(tree, ast.Call(call, [tree.left, tree.right], []))

    def noted_function(self, known: Any) -> Callable[..., Any] | None:
        """The function of torch, with notes of the tensors that it reads; None for any other function."""
        if not self._makes_notes or known not in operations.NOTED_FUNCTIONS:
            return None
        self._note(is_product=known is torch.mul)
        return operations.noted_function(known, self._watches_sums and known is torch.add)

    def with_notes(self, tree: Any) -> Any:
        """A copy with noted operators, but without fused calls, whose results would replace the captured operands."""
        if isinstance(tree, list):
            return [self.with_notes(child) for child in tree]
        if not isinstance(tree, ast.AST) or isinstance(tree, (*OPAQUE, *DEFINITIONS)):
            return tree
        return self.noted(with_changed_children(tree, self.with_notes))

    def _note(self, is_product: bool = False) -> None:
        self.has_any = True
        self.has_products = self.has_products or is_product

    def _noted_method(self, tree: ast.Call, callee: ast.Attribute) -> ast.expr:
        """A call of a method for a cast or an operator with a note; any other call unchanged."""
        if self._notes_casts and callee.attr in operations.NOTED_CASTS:
            self._note()
            cast = self._closure.variable(operations.noted_cast(callee.attr))
            return at(tree, ast.Call(cast, [callee.value, *tree.args], tree.keywords))
        if callee.attr not in operations.NOTED_METHODS:
            return tree
        self._note(is_product=callee.attr == "mul")
        watches = self._watches_sums and callee.attr == "add"
        noted_method = functools.partial(operations.noted_method, watches=watches)
        return at(tree, ast.Call(self._closure.mapped(callee, noted_method), tree.args, tree.keywords))

    def _noted_assignment(self, tree: ast.AugAssign) -> ast.stmt:
        """`name = iadd(name, value)` with a note for `name += value`, which makes a new tensor of a number."""
        name = tree.target
        if not isinstance(name, ast.Name) or name.id not in self._private_locals:
            return tree
        self._note()
        add = self._closure.variable(operations.noted_operator(operator.iadd, True))
        value = at(tree, ast.Call(add, [ast.Name(name.id, ast.Load()), tree.value], []))
        return ast.copy_location(ast.Assign([name], value), tree)

"""Reading of expressions: the roles of loads, and which loads are plain."""

import ast
from typing import NamedTuple

from ..code.scope import Scope
from .aliases import view_names
from .roles import Role, Roles


class Operand(NamedTuple):
    """An operand of a fused call: a name of the pattern, and the expression for the operand."""

    name: str
    tree: ast.expr


class Reader:
    """Reads the expressions of one function."""

    def __init__(self, roles: Roles, scope: Scope, tree: ast.FunctionDef) -> None:
        self.roles = roles
        self.scope = scope
        self._views = view_names(tree)

    def role(self, tree: ast.AST) -> Role:
        """The role of an expression; all but loads have the empty role."""
        is_load = isinstance(tree, ast.Name | ast.Attribute | ast.Subscript)
        return self.roles.get(ast.unparse(tree), Role()) if is_load else Role()

    def may_be_views(self, tree: ast.expr, other: ast.expr) -> bool:
        """Whether both are local names that may stand for views of one tensor."""
        names = [
            node.id for node in (tree, other) if isinstance(node, ast.Name) and node.id in self.scope.private_locals
        ]
        bases = {self._views.get(name) for name in names}
        return len(names) == 2 and len(bases) == 1 and None not in bases

    def is_plain(self, tree: ast.AST) -> bool:
        """Whether an expression is a plain load or constant, whose evaluation has no side effects."""
        if isinstance(tree, ast.Name):
            return tree.id in self.scope.private_locals or (tree.id not in self.scope.locals and tree.id in self.roles)
        if isinstance(tree, ast.Constant):
            return True
        return isinstance(tree, ast.Attribute | ast.Subscript) and ast.unparse(tree) in self.roles

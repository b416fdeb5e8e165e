"""Uses of the classes of objects in a function: whether they tell a converted class, which is a subclass, from the
original.

Allowed uses are to call the class, to format the class, to read inherited attributes, and to compare the class with
classes that are no modules.
"""

import ast
import types
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from torch import nn

from .call_graph import items_of
from .code_objects import has_type
from .scope import Scope
from .syntax_trees import is_name

# Attributes of a class that a subclass does not inherit unchanged.
_NOT_INHERITED = frozenset("__annotations__ __base__ __bases__ __dict__ __mro__ __subclasses__ mro".split())


def tells_subclasses(
    function: types.FunctionType,
    tree: ast.FunctionDef,
    is_object: Callable[[ast.AST], bool],
    classes: Iterable[str] = (),
) -> bool:
    """Whether a function uses a class in another way than the allowed ones.

    The classes are those of the expressions for which `is_object` is true, and the names `classes`.
    """
    uses = _ClassUses(function, tree, is_object, classes)
    return any(not uses.is_allowed(parent, child) for parent, child in uses.found())


def aliased(tree: ast.FunctionDef, names: Collection[str]) -> Callable[[ast.AST], bool]:
    """Tells names, and names that are assigned from such a name, from all other expressions."""
    known = set(names)
    _add_assigned(known, tree, lambda node: is_name(node, known))
    return lambda node: is_name(node, known)


def _add_assigned(names: set[str], tree: ast.FunctionDef, is_known: Callable[[ast.AST], bool]) -> None:
    """Adds the names that are assigned from a known expression, among which the names are."""
    assignments = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    # A name may be assigned from a name that a later line assigns, in a loop.
    for _ in assignments:
        for node in assignments:
            if is_known(node.value):
                names.update(target.id for target in node.targets if isinstance(target, ast.Name))


class _ClassUses:
    """The expressions in a function that stand for the class of an object."""

    def __init__(
        self,
        function: types.FunctionType,
        tree: ast.FunctionDef,
        is_object: Callable[[ast.AST], bool],
        classes: Iterable[str],
    ) -> None:
        self._tree = tree
        self._scope = Scope(function, tree)
        self._is_object = is_object
        self._classes = set(classes)
        _add_assigned(self._classes, tree, self._is_class)

    def found(self) -> Iterator[tuple[ast.AST, ast.AST]]:
        """The expressions, each after the node around."""
        for parent in ast.walk(self._tree):
            for child in ast.iter_child_nodes(parent):
                if self._is_class(child):
                    yield parent, child

    def is_allowed(self, parent: ast.AST, child: ast.AST) -> bool:
        """Whether a use gives the same for a subclass that overrides methods."""
        if isinstance(parent, ast.Attribute):
            return isinstance(parent.ctx, ast.Load) and parent.attr not in _NOT_INHERITED
        if isinstance(parent, ast.Assign):
            return all(isinstance(target, ast.Name) for target in parent.targets)
        if isinstance(parent, ast.Compare):
            operands = [parent.left, *parent.comparators]
            return all(o is child or self._is_no_module(self._scope.value(o), o) for o in operands)
        if not isinstance(parent, ast.Call):
            return isinstance(parent, ast.FormattedValue)
        if parent.func is child or is_name(parent.func, ("str", "repr", "print")):
            return True
        is_first = bool(parent.args) and parent.args[0] is child
        if is_first and is_name(parent.func, ("getattr", "hasattr")):
            return not _NOT_INHERITED.intersection(self._texts(parent.args[1]))
        return is_first and is_name(parent.func, ("issubclass",))

    def _is_no_module(self, value: Any, tree: ast.AST | None = None) -> bool:
        """Whether a value is a class that no module is an instance of, or a container of such classes."""
        if isinstance(tree, ast.Tuple | ast.List | ast.Set):
            return all(self._is_no_module(self._scope.value(item), item) for item in tree.elts)
        if has_type(value, type):
            return not issubclass(value, nn.Module)
        items = items_of(value) if has_type(value, (tuple, frozenset)) else []
        return bool(items) and all(map(self._is_no_module, items))

    def _texts(self, tree: ast.expr) -> set[str]:
        """The values that an expression may have: a constant, or an item of a global dict; else all names."""
        if isinstance(tree, ast.Constant):
            return {str(tree.value)}
        table = self._scope.value(tree.value) if isinstance(tree, ast.Subscript) else None
        values = items_of(table)
        return set(values) if values and all(has_type(value, str) for value in values) else set(_NOT_INHERITED)

    def _is_class(self, node: ast.AST) -> bool:
        """Whether a node is `type(name)` or `name.__class__` for an object, or the name of a class."""
        if isinstance(node, ast.Name):
            return node.id in self._classes and isinstance(node.ctx, ast.Load)
        if isinstance(node, ast.Attribute):
            return node.attr == "__class__" and self._is_object(node.value)
        if not isinstance(node, ast.Call) or not is_name(node.func, ("type",)) or len(node.args) != 1:
            return False
        return self._is_object(node.args[0])

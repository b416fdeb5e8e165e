"""Uses of the classes of objects in a function: for which classes of modules they tell a converted class, which is a
subclass, from the original.

Uses that tell none are to call the class, to format the class, and to read inherited attributes. A comparison with
classes tells these classes. Other uses tell every class.
"""

import ast
import types
from collections.abc import Callable, Collection, Container, Iterable, Iterator
from typing import Any

from torch import nn

from .call_graph import items_of
from .code_objects import has_type
from .scope import Scope
from .syntax_trees import is_name

# Attributes of a class that a subclass does not inherit unchanged.
_NOT_INHERITED = frozenset("__annotations__ __base__ __bases__ __dict__ __mro__ __subclasses__ forward mro".split())


class _EveryClass:
    """A container of all classes."""

    def __contains__(self, kind: object) -> bool:
        return True


# Either a frozenset or every class.
Classes = Container[type]
EVERY_CLASS: Classes = _EveryClass()


def union(several: Iterable[Classes]) -> Classes:
    """The union of several sets of classes."""
    found: set[type] = set()
    for classes in several:
        if not isinstance(classes, frozenset):
            return EVERY_CLASS
        found |= classes
    return frozenset(found)


def told_classes(
    function: types.FunctionType,
    tree: ast.FunctionDef,
    is_object: Callable[[ast.AST], bool],
    classes: Iterable[str] = (),
) -> Classes:
    """The classes that a function tells from subclasses, where the class in use may be a class of a module.

    Classes in use are those of the expressions for which `is_object` is true, and the names `classes`.
    """
    uses = _ClassUses(function, tree, is_object, classes)
    return union(uses.told(parent, child) for parent, child in uses.found())


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

    def told(self, parent: ast.AST, child: ast.AST) -> Classes:
        """The classes for which a use may give something else for a subclass that overrides methods."""
        if isinstance(parent, ast.Compare):
            operands = [o for o in (parent.left, *parent.comparators) if o is not child]
            return union(self._modules_among(self._scope.value(operand), operand) for operand in operands)
        return frozenset() if self._is_allowed(parent, child) else EVERY_CLASS

    def _is_allowed(self, parent: ast.AST, child: ast.AST) -> bool:
        if isinstance(parent, ast.Attribute):
            return isinstance(parent.ctx, ast.Load) and parent.attr not in _NOT_INHERITED
        if isinstance(parent, ast.Assign):
            return all(isinstance(target, ast.Name) for target in parent.targets)
        if not isinstance(parent, ast.Call):
            return isinstance(parent, ast.FormattedValue)
        if parent.func is child or is_name(parent.func, ("str", "repr", "print")):
            return True
        is_first = bool(parent.args) and parent.args[0] is child
        if is_first and is_name(parent.func, ("getattr", "hasattr")):
            return not _NOT_INHERITED.intersection(self._texts(parent.args[1]))
        return is_first and is_name(parent.func, ("issubclass",))

    def _modules_among(self, value: Any, tree: ast.AST | None = None) -> Classes:
        """The classes of modules that a value is or contains; every class for anything but a class, or a container of
        classes that nobody changes."""
        if isinstance(tree, ast.Tuple | ast.List | ast.Set):
            return union(self._modules_among(self._scope.value(item), item) for item in tree.elts)
        if has_type(value, type):
            return frozenset((value,) if issubclass(value, nn.Module) else ())
        items = items_of(value) if has_type(value, (tuple, frozenset)) else []
        return union(map(self._modules_among, items)) if items else EVERY_CLASS

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

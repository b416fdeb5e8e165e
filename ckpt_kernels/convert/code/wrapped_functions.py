"""Decorators: whether a wrapper would notice that the function in its closure has been exchanged for a copy.

A wrapper that only calls the function does not. A wrapper that uses the function as a key, or sets attributes, does.
"""

import ast
import functools
import inspect
import types
from collections.abc import Collection, Sequence

from .code_objects import cell_value, has_type
from .frames import why_not_rewritten
from .scope import Scope
from .source import NoSource, definition_of
from .syntax_trees import is_name

# Attributes that a copy of a function has in common with the function. Arguments come first in `co_varnames`.
_IN_COMMON = frozenset(
    """__name__ __qualname__ __module__ __doc__ __defaults__ __kwdefaults__ __annotations__ __code__.co_varnames
    __code__.co_argcount""".split()
)
# Callees that may be given the function: a partial object is another one at each call, and is no key either.
_CALLEES = (functools.partial, inspect.signature)


def check_wrapper(wrapper: types.FunctionType, wrapped: types.FunctionType) -> None:
    """Raises `NoSource` unless all that a wrapper does with the wrapped function is to call it, or to read attributes
    that a copy has too."""
    cells = zip(wrapper.__code__.co_freevars, wrapper.__closure__ or (), strict=True)
    names = {name for name, cell in cells if cell_value(cell) is wrapped}
    tree = definition_of(wrapper).tree
    # Without the decorators and the defaults of the wrapper itself, which ran before.
    nodes = [node for statement in tree.body for node in ast.walk(statement)]
    scope = Scope(wrapper, tree)
    handed_back = {id(node) for node in nodes if isinstance(node, ast.Call) and _returns_argument(node, names, scope)}
    aliases = {
        node.targets[0].id
        for node in nodes
        if isinstance(node, ast.Assign) and id(node.value) in handed_back and isinstance(node.targets[0], ast.Name)
    }
    allowed: set[int] = set()
    for node in nodes:
        if isinstance(node, ast.Call):
            allowed.add(id(node.func))
            if any(scope.value(node.func) is callee for callee in _CALLEES):
                allowed.update(map(id, node.args[:1]))
            if id(node) in handed_back:
                allowed.update(map(id, node.args))
        elif isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            allowed.update((id(node.value), id(node.targets[0])) if id(node.value) in handed_back else ())
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value.value if isinstance(node.value, ast.Attribute) else node.value
            if ast.unparse(node).removeprefix(f"{ast.unparse(owner)}.") in _IN_COMMON:
                allowed.add(id(owner))
    uses = [id(node) for node in nodes if is_name(node, names | aliases)]
    if why_not_rewritten(wrapper) or not allowed.issuperset((*uses, *handed_back)):
        raise NoSource(f"a decorator of {wrapped.__name__} uses the function for more than calling it")


def _returns_argument(call: ast.Call, names: Collection[str], scope: Scope) -> bool:
    """Whether a call does nothing with an argument of one of these names but to return it, perhaps.

    Such a call is `table.get(key, name)`, or calls a method that returns such a call.
    """
    if call.keywords or not isinstance(call.func, ast.Attribute):
        return False
    places = [place for place, argument in enumerate(call.args) if is_name(argument, names)]
    if len(places) != 1 or any(isinstance(argument, ast.Starred) for argument in call.args):
        return False
    if _is_default_of_get(call, names):
        return True
    owner = scope.value(call.func.value)
    method = inspect.getattr_static(type(owner), call.func.attr, None)
    return has_type(method, types.FunctionType) and _returns_parameter(method, places[0] + 1)


def _is_default_of_get(tree: ast.AST | None, names: Collection[str]) -> bool:
    if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Attribute) or tree.func.attr != "get":
        return False
    return len(tree.args) == 2 and is_name(tree.args[1], names)


def _returns_parameter(method: types.FunctionType, place: int) -> bool:
    """Whether a method uses a parameter only in `return table.get(key, parameter)`."""
    names: Sequence[str] = method.__code__.co_varnames[: method.__code__.co_argcount][place : place + 1]
    body = definition_of(method).tree.body
    nodes = [node for statement in body for node in ast.walk(statement)]
    returned = [n.value for n in nodes if isinstance(n, ast.Return) and _is_default_of_get(n.value, names)]
    uses = [node for node in nodes if is_name(node, names)]
    return bool(names) and len(uses) == len(returned) > 0 and not why_not_rewritten(method)

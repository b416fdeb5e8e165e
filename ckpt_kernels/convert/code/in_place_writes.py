"""Whether a model's own code may write in place to a tensor that it has handed to a norm.

A norm that computes 16-bit inputs in float32 keeps, in eager torch, a copy of its input; ours keeps the input itself. A
later write to it would be an error in the backward pass where eager torch trains. So a model is searched, as far as
code is reached from the forward methods of its modules and from what they hold, for whatever can write: items that are
set, augmented assignments, mentions of methods in place, and arguments that ask for it. Two are allowed: writes to a
tensor that the function itself has made, and items of a list or dict that it has made.
"""

import ast
import functools
import inspect
import types
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..loads import is_set, modules_of
from .call_graph import belongs_to_torch, functions_reachable_from, has_type, reachable_functions
from .memoization import memoized
from .scope import UNKNOWN, Scope
from .source import NoSource, definition_of

# Functions and methods whose results are new, never views of what they were given.
_MAKERS = frozenset(
    """abs amax arange argsort baddbmm bmm cat clone cos cross_entropy cumsum embedding empty empty_like exp floor full
    full_like gather index_select interpolate isin len linspace log log_softmax masked_fill matmul mean mm new_empty
    new_full new_ones new_zeros norm one_hot ones ones_like pad pow rand rand_like randint randn randn_like range relu
    repeat repeat_interleave roll round rsqrt scatter sigmoid sin softmax sqrt stack sum tanh tensor tolist topk tril
    triu where zeros zeros_like""".split()
)
# Of torch's functions and methods these too; Python's give one of their arguments.
_MAKERS_OF_TORCH = frozenset(("max", "min"))
_ON_FLOATS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.MatMult)
_DISPLAYS = (ast.List, ast.Dict, ast.Tuple, ast.ListComp, ast.DictComp)

# Of Python's operators, as functions and as methods.
_IN_PLACE = frozenset("iadd ifloordiv imatmul imod imul ipow isub itruediv setitem".split())
# Functions by whose arguments attributes are named.
_BY_NAME = frozenset(("getattr", "attrgetter", "methodcaller"))
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)
_DATA = (bool, int, float, str, type(None), type, Tensor, nn.Module)


def in_place_writer(model: nn.Module) -> str:
    """The first method of the model that may write to a tensor of somebody else's; "" if there is none."""
    for module in modules_of(model):
        if is_set(module, "inplace"):
            return f"{type(module).__name__} (inplace=True)"
        if found := _writer_of(type(module)) or _writer_held(vars(module)):
            return found
    return ""


@memoized
def _writer_of(kind: type[nn.Module]) -> str:
    return "" if kind.__module__.startswith("torch.nn.modules.") else _writer_among(reachable_functions(kind))


def _writer_held(value: Any, depth: int = 4) -> str:
    """The same of functions and of objects that are called, and of containers of these within so many others."""
    if has_type(value, _DATA) or not depth:
        return ""
    if has_type(value, (dict, list, tuple, set, frozenset)):
        values = list(value.values() if has_type(value, dict) else value)
        return next(filter(None, (_writer_held(each, depth - 1) for each in values)), "")
    if has_type(value, functools.partial):
        return _writer_held((value.func, *value.args, *value.keywords.values()), depth)
    if has_type(value, types.MethodType):
        return _writer_held(value.__self__, depth) or _writer_held(value.__func__, depth)
    if has_type(value, types.FunctionType):
        return "" if belongs_to_torch(value) else _writer_among(functions_reachable_from(value, object))
    return _writer_called(type(value))


@memoized
def _writer_called(kind: type) -> str:
    called = inspect.getattr_static(kind, "__call__", None)
    is_known = not has_type(called, types.FunctionType) or belongs_to_torch(called)
    return "" if is_known else _writer_among(functions_reachable_from(called, kind))


def _writer_among(functions: tuple[types.FunctionType, ...]) -> str:
    for function in functions:
        try:
            tree = definition_of(function).tree
            if _writes(tree, Scope(function, tree)):
                return function.__qualname__
        except NoSource:
            return function.__qualname__
    return ""


def _writes(function: ast.FunctionDef, scope: Scope) -> bool:
    made = _made_here(function, scope) - _handed_on(function)
    return any(name not in made for name in written_names(function, scope))


def _handed_on(function: ast.FunctionDef) -> set[str]:
    """Names of what is given to calls, of a module perhaps: a norm may be among them."""
    handed: set[str] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and _root(node.func) not in ("torch", "F", "nn"):
            arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
            handed.update(n.id for a in arguments for n in ast.walk(a) if isinstance(n, ast.Name))
    return handed


def written_names(function: ast.FunctionDef, scope: Scope) -> Iterator[str]:
    """The names of tensors that are written to; "" for what has none."""
    containers = _containers(function)
    for node in ast.walk(function):
        if isinstance(node, ast.AugAssign):
            # Where a list grows.
            grows = isinstance(node.value, ast.Tuple | ast.List | ast.JoinedStr) or _name(node.target) in containers
            if isinstance(node.op, _ON_FLOATS) and not grows:
                yield _root(node.target)
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            # The item that an augmented assignment writes to is no container's, and was told of.
            is_key = isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str)
            if not is_key and _name(node.value) not in containers:
                yield _root(node)
        elif isinstance(node, ast.Attribute) and _is_in_place(node.attr):
            yield _root(node)
        elif isinstance(node, ast.Call):
            yield from _written_by_call(node, scope)


def _written_by_call(call: ast.Call, scope: Scope) -> Iterator[str]:
    called = getattr(call.func, "attr", getattr(call.func, "id", ""))
    first = _root(call.args[0]) if call.args else ""
    if called in _BY_NAME:
        names = call.args[called == "getattr" :]
        # The names of a module's own attributes may be put together.
        known = all(isinstance(n, ast.Constant) for n in names[:1]) or first == "self"
        if not known or any(isinstance(n, ast.Constant) and _is_in_place(str(n.value)) for n in names):
            yield first if called == "getattr" else ""
        return
    value = scope.value(call.func)
    # What is called may have been imported by another name.
    if any(map(_is_in_place, (called, getattr(value, "__name__", "") if has_type(value, _FUNCTIONS) else ""))):
        yield first
    # A flag such as that of F.relu(x, True), which is never first.
    if any(isinstance(a, ast.Constant) and a.value is True for a in call.args[1:]) or _may_ask_for_it(call, value):
        yield first
    for keyword in call.keywords:
        if keyword.arg == "out" or (keyword.arg == "inplace" and getattr(keyword.value, "value", True)):
            yield first


def _may_ask_for_it(call: ast.Call, function: Any) -> bool:
    """Whether arguments by position, or those in a dict, may be the flag or the output of a function of torch's."""
    in_a_dict = any(keyword.arg is None for keyword in call.keywords)
    if has_type(function, types.BuiltinFunctionType):
        return in_a_dict
    if not has_type(function, types.FunctionType) or not belongs_to_torch(function):
        return False
    parameters = list(inspect.signature(function).parameters)
    if "inplace" not in parameters:
        return False
    place = parameters.index("inplace")
    flags = [a for a in call.args[place : place + 1] if not (isinstance(a, ast.Constant) and a.value is False)]
    return in_a_dict or bool(flags) or any(isinstance(a, ast.Starred) for a in call.args)


def _is_in_place(name: str) -> bool:
    """Whether a method or a function of this name writes to its tensor."""
    plain = name.removeprefix("__").removesuffix("__")
    return (name.endswith("_") and not name.endswith("__")) or plain in _IN_PLACE


def _name(tree: ast.expr) -> str:
    return tree.id if isinstance(tree, ast.Name) else ""


def _root(tree: ast.AST) -> str:
    while isinstance(tree, ast.Attribute | ast.Subscript | ast.Call):
        tree = tree.func if isinstance(tree, ast.Call) else tree.value
    return tree.id if isinstance(tree, ast.Name) else ""


def _values(function: ast.FunctionDef) -> dict[str, list[ast.expr | None]]:
    """For each local name what is assigned to it; None for what is not known, as of arguments and in loops."""
    values: dict[str, list[ast.expr | None]] = {}
    known: dict[int, ast.expr] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            known.update((id(target), node.value) for target in node.targets)
        elif isinstance(node, ast.AnnAssign | ast.AugAssign) and node.value is not None:
            known[id(node.target)] = node.value
        elif isinstance(node, ast.arg):
            values.setdefault(node.arg, []).append(None)
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            values.setdefault(node.id, []).append(known.get(id(node)))
    return values


def _containers(function: ast.FunctionDef) -> set[str]:
    """Names that stand for nothing but lists, tuples and dicts that the function has made. What these hold may be
    anything, but who sets an item writes to no tensor."""
    return {name for name, values in _values(function).items() if all(isinstance(v, _DISPLAYS) for v in values)}


def _made_here(function: ast.FunctionDef, scope: Scope) -> set[str]:
    """Names that stand for nothing but numbers, and tensors that the function itself has made."""
    containers = _containers(function)
    found = _values(function).items()
    return {name for name, values in found if all(v is not None and _makes(v, scope, containers) for v in values)}


def _makes(tree: ast.expr, scope: Scope, containers: set[str]) -> bool:
    if isinstance(tree, ast.Call):
        called = getattr(tree.func, "attr", getattr(tree.func, "id", ""))
        named = called in _MAKERS or (called in _MAKERS_OF_TORCH and isinstance(tree.func, ast.Attribute))
        return named and _is_torchs_or_a_method(scope.value(tree.func), tree.func)
    if isinstance(tree, ast.IfExp):
        return _makes(tree.body, scope, containers) and _makes(tree.orelse, scope, containers)
    if isinstance(tree, ast.BinOp):
        # A sum or a multiple of lists holds what they hold.
        return not any(isinstance(n, _DISPLAYS) or _name(n) in containers for n in (tree.left, tree.right))
    return isinstance(tree, ast.Constant | ast.Compare)


def _is_torchs_or_a_method(called: Any, tree: ast.expr) -> bool:
    """Whether what has the name of a function of torch's is that, or one of Python's; or a method, of a tensor, and not
    one of the module's, or a module in it."""
    if called is UNKNOWN:
        return isinstance(tree, ast.Attribute) and _name(tree.value) != "self"
    return isinstance(called, types.BuiltinFunctionType | type) or (
        isinstance(called, types.FunctionType) and belongs_to_torch(called)
    )

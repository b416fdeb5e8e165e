"""Analysis of in-place writes: whether a model's own code may write to a tensor that was passed to a norm.

A norm that computes 16-bit inputs in float32 saves a float32 copy of the input in eager torch; ours saves the input
itself. A later in-place write to the input would be an error in the backward pass where eager torch trains. The
analysis covers the code that the forwards of the model's modules, and the functions and objects in these modules, may
call. Item assignments, augmented assignments, in-place methods, and arguments such as `out=` and `inplace=True` count
as writes. Two kinds are allowed: writes to a tensor that the same function has made, and items of a list or dict that
it has made.
"""

import ast
import functools
import inspect
import types
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..attribute_loads import is_set
from ..module_tree import modules_of
from .call_graph import belongs_to_torch, functions_reachable_from, items_of, reachable_functions
from .code_objects import has_type
from .memoization import memoized
from .scope import UNKNOWN, Scope
from .source import NoSource, definition_of

# Functions and methods whose results are new tensors, never views of an argument.
_MAKERS = frozenset(
    """abs amax arange argsort baddbmm bmm cat clone cos cross_entropy cumsum embedding empty empty_like exp floor full
    full_like gather index_select interpolate isin len linspace log log_softmax masked_fill matmul mean mm new_empty
    new_full new_ones new_zeros norm one_hot ones ones_like pad pow rand rand_like randint randn randn_like range relu
    repeat repeat_interleave roll round rsqrt scatter sigmoid sin softmax sqrt stack sum tanh tensor tolist topk tril
    triu where zeros zeros_like""".split()
)
# Makers too, if they are torch's: Python's `max` and `min` return one of their arguments.
_MAKERS_OF_TORCH = frozenset(("max", "min"))
_ON_FLOATS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.MatMult)
_DISPLAYS = (ast.List, ast.Dict, ast.Tuple, ast.ListComp, ast.DictComp)

# Python's in-place operators, as functions and as methods.
_IN_PLACE = frozenset("iadd ifloordiv imatmul imod imul ipow isub itruediv setitem".split())
# Functions that take the name of an attribute as an argument.
_BY_NAME = frozenset(("getattr", "attrgetter", "methodcaller"))
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)
_DATA = (bool, int, float, str, type(None), type, Tensor, nn.Module)


def in_place_writer(model: nn.Module) -> str:
    """The name of a function of the model that may write to a tensor made elsewhere; "" if there is none."""
    for module in modules_of(model):
        if is_set(module, "inplace"):
            return f"{type(module).__name__} (inplace=True)"
        if writer := _writer_of(type(module)) or _writer_held(vars(module)):
            return writer
    return ""


@memoized
def _writer_of(kind: type[nn.Module]) -> str:
    return "" if kind.__module__.startswith("torch.nn.modules.") else _writer_among(reachable_functions(kind))


def _writer_held(value: Any, kind: type = object, depth: int = 4) -> str:
    """The same for functions, callable objects, and containers of these that nest at most `depth` deep.

    `kind`: the class of the object that a method belongs to.
    """
    if has_type(value, _DATA) or not depth:
        return ""
    if values := items_of(value):
        return next(filter(None, (_writer_held(item, kind, depth - 1) for item in values)), "")
    if has_type(value, functools.partial):
        return _writer_held((value.func, *value.args, *value.keywords.values()), kind, depth)
    if has_type(value, types.MethodType):
        owner = value.__self__
        return _writer_held(owner, kind, depth) or _writer_held(value.__func__, type(owner), depth)
    if has_type(value, types.FunctionType):
        return "" if belongs_to_torch(value) else _writer_behind(value, kind)
    return _writer_called(type(value))


@memoized
def _writer_behind(function: types.FunctionType, kind: type) -> str:
    return _writer_among(functions_reachable_from(function, kind))


@memoized
def _writer_called(kind: type) -> str:
    method = inspect.getattr_static(kind, "__call__", None)
    is_trusted = not has_type(method, types.FunctionType) or belongs_to_torch(method)
    return "" if is_trusted else _writer_among(functions_reachable_from(method, kind))


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
    own = _made_here(function, scope) - _passed_on(function)
    return any(name not in own for name in written_names(function, scope))


def _passed_on(function: ast.FunctionDef) -> set[str]:
    """The names in the arguments of calls other than torch's: the callee may be a norm."""
    passed: set[str] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and _root(node.func) not in ("torch", "F", "nn"):
            arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
            passed.update(n.id for a in arguments for n in ast.walk(a) if isinstance(n, ast.Name))
    return passed


def written_names(function: ast.FunctionDef, scope: Scope) -> Iterator[str]:
    """The names of the tensors that a function may write to; "" for a tensor without a name."""
    containers = _containers(function)
    for node in ast.walk(function):
        if isinstance(node, ast.AugAssign):
            # `+=` may extend a list or a string.
            grows = isinstance(node.value, ast.Tuple | ast.List | ast.JoinedStr) or _name(node.target) in containers
            if isinstance(node.op, _ON_FLOATS) and not grows:
                yield _root(node.target)
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            # String keys are those of dicts. Targets of augmented assignments are reported above as well.
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
        # A module may compute the names of its own attributes.
        is_allowed = all(isinstance(n, ast.Constant) for n in names[:1]) or first == "self"
        if not is_allowed or any(isinstance(n, ast.Constant) and _is_in_place(str(n.value)) for n in names):
            yield first if called == "getattr" else ""
        return
    value = scope.value(call.func)
    # An import may rename the function.
    if any(map(_is_in_place, (called, getattr(value, "__name__", "") if has_type(value, _FUNCTIONS) else ""))):
        yield first
    # The flag `inplace` by position, such as F.relu(x, True), is never the first argument.
    if any(isinstance(a, ast.Constant) and a.value is True for a in call.args[1:]) or _may_write(call, value):
        yield first
    for keyword in call.keywords:
        if keyword.arg == "out":
            yield _root(keyword.value)
        elif keyword.arg == "inplace" and getattr(keyword.value, "value", True):
            yield first


def _may_write(call: ast.Call, function: Any) -> bool:
    """Whether positional arguments, or those in a `**dict`, may be `inplace` or `out` of a torch function."""
    has_dict = any(keyword.arg is None for keyword in call.keywords)
    if has_type(function, types.BuiltinFunctionType):
        return has_dict
    if not has_type(function, types.FunctionType) or not belongs_to_torch(function):
        return False
    parameters = list(inspect.signature(function).parameters)
    if "inplace" not in parameters:
        return False
    position = parameters.index("inplace")
    flags = [a for a in call.args[position : position + 1] if not (isinstance(a, ast.Constant) and a.value is False)]
    return has_dict or bool(flags) or any(isinstance(a, ast.Starred) for a in call.args)


def _is_in_place(name: str) -> bool:
    """Whether a method or function of this name writes in place, by torch's and Python's conventions."""
    plain = name.removeprefix("__").removesuffix("__")
    return (name.endswith("_") and not name.endswith("__")) or plain in _IN_PLACE


def _name(tree: ast.expr) -> str:
    return tree.id if isinstance(tree, ast.Name) else ""


def _root(tree: ast.AST) -> str:
    """The name that a chain of attributes, subscripts and calls begins with, or ""."""
    while isinstance(tree, ast.Attribute | ast.Subscript | ast.Call):
        tree = tree.func if isinstance(tree, ast.Call) else tree.value
    return tree.id if isinstance(tree, ast.Name) else ""


def _values(function: ast.FunctionDef) -> dict[str, list[ast.expr | None]]:
    """The expressions that each local name is assigned; None for unknown values, as of arguments and in loops."""
    values: dict[str, list[ast.expr | None]] = {}
    assigned: dict[int, ast.expr] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            assigned.update((id(target), node.value) for target in node.targets)
        elif isinstance(node, ast.AnnAssign | ast.AugAssign) and node.value is not None:
            assigned[id(node.target)] = node.value
        elif isinstance(node, ast.arg):
            values.setdefault(node.arg, []).append(None)
    # An annotation without a value binds nothing.
    bare = {id(n.target) for n in ast.walk(function) if isinstance(n, ast.AnnAssign) and n.value is None}
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load) and id(node) not in bare:
            values.setdefault(node.id, []).append(assigned.get(id(node)))
    return values


def _containers(function: ast.FunctionDef) -> set[str]:
    """Names that are only ever bound to lists, tuples and dicts that the function makes.

    The items may be anything, but setting an item writes to no tensor.
    """
    return {name for name, values in _values(function).items() if all(isinstance(v, _DISPLAYS) for v in values)}


def _made_here(function: ast.FunctionDef, scope: Scope) -> set[str]:
    """Names that are only ever bound to numbers and to tensors that the function makes."""
    containers = _containers(function)
    items = _values(function).items()
    return {name for name, values in items if all(v is not None and _makes(v, scope, containers) for v in values)}


def _makes(tree: ast.expr, scope: Scope, containers: set[str]) -> bool:
    """Whether an expression makes a number or a new tensor."""
    if isinstance(tree, ast.Call):
        called = getattr(tree.func, "attr", getattr(tree.func, "id", ""))
        is_maker = called in _MAKERS or (called in _MAKERS_OF_TORCH and isinstance(tree.func, ast.Attribute))
        return is_maker and _is_torch_function_or_method(scope.value(tree.func), tree.func)
    if isinstance(tree, ast.IfExp):
        return _makes(tree.body, scope, containers) and _makes(tree.orelse, scope, containers)
    if isinstance(tree, ast.BinOp):
        # A sum or a multiple of lists has the items of the lists.
        return not any(isinstance(n, _DISPLAYS) or _name(n) in containers for n in (tree.left, tree.right))
    return isinstance(tree, ast.Constant | ast.Compare)


def _is_torch_function_or_method(called: Any, tree: ast.expr) -> bool:
    """Whether a callee with the name of a torch function is a function of torch or Python, or a tensor's method.

    A method of `self` is the module's own, or a child of the module.
    """
    if called is UNKNOWN:
        return isinstance(tree, ast.Attribute) and _name(tree.value) != "self"
    return has_type(called, types.BuiltinFunctionType | type) or (
        has_type(called, types.FunctionType) and belongs_to_torch(called)
    )

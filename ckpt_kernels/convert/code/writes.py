"""Whether a model's own code may write in place to a tensor that it has handed to a norm.

A norm that computes 16-bit inputs in float32 keeps, in eager torch, a copy of its input; ours keeps the input itself. A
later write to it would be an error in the backward pass where eager torch trains. So a model is searched, as far as the
code of its modules is reached from their forward methods, for writes to anything but what a function has just made.
"""

import ast
import itertools
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..loads import is_set, modules_of
from .called import functions_of, is_torchs
from .remembering import remembered
from .scope import UNKNOWN, Scope
from .source import NoSource, definition_of

# Functions and methods whose results are new, never views of what they were given.
_MAKERS = frozenset(
    """abs amax arange argsort baddbmm bmm cat clone cos cross_entropy cumsum einsum embedding empty empty_like exp
    floor full full_like gather index_select interpolate isin len linspace log log_softmax masked_fill matmul max mean
    meshgrid min mm new_empty new_full new_ones new_zeros norm one_hot ones ones_like pad pow rand rand_like randint
    randn randn_like range relu repeat repeat_interleave roll round rsqrt scatter sigmoid sin softmax sqrt stack sum
    tanh tensor tolist topk tril triu where zeros zeros_like""".split()
)
_ON_FLOATS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.MatMult)

_IN_PLACE = frozenset(f"i{name}" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"))


def writer_in(model: nn.Module) -> str:
    """The first method of the model that may write to a tensor of somebody else's; "" if there is none."""
    for module in modules_of(model):
        if is_set(module, "inplace"):
            return f"{type(module).__name__} (inplace=True)"
        found = _writer_of(type(module))
        if found:
            return found
    return ""


@remembered
def _writer_of(kind: type[nn.Module]) -> str:
    if kind.__module__.startswith("torch.nn.modules."):
        return ""
    for function in functions_of(kind):
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
    """The names of what is written to; "" for what has none."""
    dicts = _dicts(function)
    for node in ast.walk(function):
        if isinstance(node, ast.AugAssign) and isinstance(node.op, _ON_FLOATS):
            if not isinstance(node.value, ast.Tuple | ast.List | ast.JoinedStr):
                yield _root(node.target)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                if not isinstance(target, ast.Subscript):
                    continue
                if isinstance(target.value, ast.Name) and target.value.id in dicts:
                    continue
                if not isinstance(target.slice, ast.Constant) or not isinstance(target.slice.value, str):
                    yield _root(target)
        elif isinstance(node, ast.Call):
            called = getattr(node.func, "attr", "")
            if (called.endswith("_") and not called.startswith("_")) or called.startswith("__i"):
                yield _root(node.func)
            # A flag such as that of F.relu(x, True), which is never first.
            positional = any(isinstance(a, ast.Constant) and a.value is True for a in node.args[1:])
            positional = positional and scope.value(node.func) is not getattr
            if positional or (called or getattr(node.func, "id", "")) in _IN_PLACE:
                yield _root(node.args[0]) if node.args else ""
            for keyword in node.keywords:
                if keyword.arg == "out" or (keyword.arg == "inplace" and getattr(keyword.value, "value", True)):
                    yield _root(node.args[0]) if node.args else ""


def _dicts(function: ast.FunctionDef) -> set[str]:
    """Names that stand for nothing but dicts that the function has made: who sets an item writes to no tensor."""
    given: dict[str, bool] = {}
    literals: set[int] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict | ast.DictComp):
            literals.update(map(id, node.targets))
    for node in ast.walk(function):
        if isinstance(node, ast.arg):
            given[node.arg] = False
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            given[node.id] = given.get(node.id, True) and id(node) in literals
    return {name for name, is_dict in given.items() if is_dict}


def _root(tree: ast.AST) -> str:
    while isinstance(tree, ast.Attribute | ast.Subscript | ast.Call):
        tree = tree.func if isinstance(tree, ast.Call) else tree.value
    return tree.id if isinstance(tree, ast.Name) else ""


def _made_here(function: ast.FunctionDef, scope: Scope) -> set[str]:
    """Names that stand for nothing but numbers, lists, and tensors that the function itself has made."""
    made: dict[str, bool] = {argument.arg: False for argument in ast.walk(function) if isinstance(argument, ast.arg)}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            for name in itertools.chain.from_iterable(map(ast.walk, node.targets)):
                if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store):
                    made[name.id] = made.get(name.id, True) and _makes(node.value, scope)
        if isinstance(node, ast.For | ast.comprehension | ast.NamedExpr | ast.withitem):
            made.update(
                (name.id, False)
                for name in ast.walk(node)
                if isinstance(name, ast.Name) and not isinstance(name.ctx, ast.Load)
            )
    return {name for name, fresh in made.items() if fresh}


def _makes(tree: ast.expr, scope: Scope) -> bool:
    if isinstance(tree, ast.Call):
        named = getattr(tree.func, "attr", getattr(tree.func, "id", "")) in _MAKERS
        return named and _is_not_of_its_own(scope.value(tree.func), tree.func)
    if isinstance(tree, ast.IfExp):
        return _makes(tree.body, scope) and _makes(tree.orelse, scope)
    return isinstance(tree, ast.BinOp | ast.Constant | ast.List | ast.Dict | ast.Tuple | ast.ListComp | ast.Compare)


def _is_not_of_its_own(called: Any, tree: ast.expr) -> bool:
    """Whether what has the name of a function of torch's is that, or one of Python's; or a method, of a tensor."""
    if called is UNKNOWN:
        return isinstance(tree, ast.Attribute)
    return isinstance(called, types.BuiltinFunctionType | type) or (
        isinstance(called, types.FunctionType) and is_torchs(called)
    )

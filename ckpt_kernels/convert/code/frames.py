"""Functions that inspect stack frames, their own or their caller's: these see that a function has been rewritten.

The frame of a rewritten function keeps the file, the line and the name of the original; the locals differ.
"""

import ast
import inspect
import sys
import types
from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from .call_graph import belongs_to_torch
from .code_objects import cell_value, has_type, names_in
from .scope import UNKNOWN, Scope
from .source import tree_of
from .syntax_trees import is_name, root_name, stored_names

# Prefix of the names that a rewrite adds to a function.
PREFIX = "_ckpt_kernels_"
# Functions that give a function access to the frames on the stack.
_STACK: tuple[Any, ...] = (sys._getframe, sys._current_frames, inspect.currentframe, inspect.stack, inspect.trace)
# Functions that give a function access to the function's own frame.
_OWN_FRAME = (*_STACK, locals, vars, eval, exec, dir)
# Attributes of frames that lead to the caller's frame, or to locals.
_OF_FRAMES = frozenset(("f_back", "f_locals"))
_GENERATOR_OR_COROUTINE = 0x20 | 0x80 | 0x100 | 0x200

# Fields of a frame record that a rewrite keeps, and the expression that lists the records.
_OUTER_FRAMES = "inspect.getouterframes(inspect.currentframe())"
_LOCATION = frozenset(("filename", "lineno", "function"))


def why_not_rewritten(function: types.FunctionType, module: nn.Module | None = None) -> str:
    """The reason, for people, why a function must not be rewritten; "" if it may be.

    A function may be rewritten if neither the function nor a global that the function calls inspects the function's
    frame, and no name in the function starts with `PREFIX`. `module` is the first argument, if known.
    """
    code = function.__code__
    names = names_in(code)
    if any(name.startswith(PREFIX) for name in (*names, *code.co_varnames, *code.co_cellvars, *code.co_freevars)):
        return f"{function.__name__} has names that begin with {PREFIX}"
    if code.co_flags & _GENERATOR_OR_COROUTINE:
        return f"{function.__name__} is a generator or a coroutine"
    if inspector := next(_inspectors(function, _OWN_FRAME, module), ""):
        return f"{function.__name__} may inspect its own stack frame by {inspector}"
    callers = (name for name in sorted(names) if _inspects_caller(function.__globals__.get(name)))
    inspector = next(callers, "")
    return f"{function.__name__} calls {inspector}, which may inspect the caller's stack frame" if inspector else ""


def _inspects_caller(function: Any) -> bool:
    """Whether a function reads more of the caller's frame than the location."""
    if not has_type(function, types.FunctionType) or belongs_to_torch(function):
        return False
    used = {*_inspectors(function, _STACK), *(_OF_FRAMES & names_in(function.__code__))}
    return bool(used) and not (used == {"inspect.currentframe"} and _reads_locations_only(function))


def _inspectors(
    function: types.FunctionType, inspectors: Collection[Any], module: nn.Module | None = None
) -> Iterator[str]:
    """The names and expressions in a function that may stand for one of the `inspectors`."""
    names = names_in(function.__code__)
    cells = dict(zip(function.__code__.co_freevars, map(cell_value, function.__closure__ or ()), strict=True))
    # By value, because an import may rename a function.
    known = {name: function.__globals__[name] for name in names & function.__globals__.keys()} | cells
    yield from sorted(name for name, value in known.items() if _is_any(value, inspectors))
    wanted = names & {inspector.__name__ for inspector in inspectors}
    if not wanted:
        return
    tree = tree_of(function)
    if tree is None:
        yield from sorted(wanted)
        return
    scope = Scope(function, tree, module)
    # Names that only a nested function or a comprehension binds.
    rebound = (stored_names(tree) | {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}) - scope.locals
    for node in ast.walk(tree):
        if is_name(node, wanted) and isinstance(node.ctx, ast.Load):
            # A local variable has its value from another expression.
            if node.id not in scope.locals | rebound | known.keys() and _is_any(scope.value(node), inspectors):
                yield node.id
        elif isinstance(node, ast.Attribute) and node.attr in wanted:
            member = _member(scope.value(node.value), node.attr)
            if root_name(node) in rebound or not _is_other(member, inspectors):
                yield ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            source = sys.modules.get(node.module or "") if not node.level else None
            for alias in node.names:
                if alias.name in wanted and not _is_other(getattr(source, alias.name, UNKNOWN), inspectors):
                    yield alias.name


def _is_any(value: Any, inspectors: Collection[Any]) -> bool:
    return any(value is inspector for inspector in inspectors)


def _is_other(value: Any, inspectors: Collection[Any]) -> bool:
    """Whether a value is a module, or a function or class that neither is one of the inspectors nor names one."""
    if has_type(value, types.FunctionType):
        named = {inspector.__name__ for inspector in _OWN_FRAME} & names_in(value.__code__)
        return not _is_any(value, inspectors) and (belongs_to_torch(value) or not named)
    return has_type(value, (types.BuiltinFunctionType, type, nn.Module)) and not _is_any(value, inspectors)


def _member(owner: Any, name: str) -> Any:
    """An attribute of a Python module or of an `nn.Module`, found without running code; UNKNOWN for other owners."""
    if has_type(owner, types.ModuleType):
        return vars(owner).get(name, UNKNOWN)
    if not has_type(owner, nn.Module):
        return UNKNOWN
    return inspect.getattr_static(owner, name, owner._modules.get(name, UNKNOWN))


def _reads_locations_only(function: types.FunctionType) -> bool:
    """Whether a function reads only fields of `_LOCATION` from frames.

    The frames must come from an assignment such as `caller = inspect.getouterframes(inspect.currentframe())[1]`.
    """
    tree = tree_of(function)
    if tree is None:
        return False
    records, assignments = set[str](), 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript):
            (target, *others), subscripted = node.targets, node.value.value
            if isinstance(target, ast.Name) and not others and ast.unparse(subscripted) == _OUTER_FRAMES:
                records.add(target.id)
                assignments += 1
    loads = [n for n in ast.walk(tree) if is_name(n, records) and isinstance(n.ctx, ast.Load)]
    fields = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in _LOCATION]
    frames = [n for n in ast.walk(tree) if getattr(n, "attr", getattr(n, "id", "")) == "currentframe"]
    owners_of_fields = {id(field.value) for field in fields}
    return len(frames) == assignments and all(id(load) in owners_of_fields for load in loads)

"""Modules whose methods, as they are written, call ours in places.

What a method's loads are, a linear layer, an activation, a norm, is read off the module when it is converted. By these
loads and the source, a method is rewritten once for all modules that agree in them.
"""

import ast
import contextlib
import itertools
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...activations import FUNCTIONS as ACTIVATIONS
from ...activations import NAMES
from ...backends.reference import ACTIVATIONS as FORMULAS
from ..adapters import is_adapter
from ..biased_linears import adds_bias
from ..code.frames import may_be_rewritten
from ..code.memoization import memoized
from ..code.scope import UNKNOWN, Scope
from ..code.source import NoSource, decorator_chain, definition_of
from ..code.straight_line import MAX_RUN_LENGTH, Binding, Run, blocks, run_between
from ..rotations.recognition import is_rotation
from ..rules.activation_trials import TrialResult, activation_by_trial
from ..rules.rule import Rule
from ..rules.trial import in_own_thread
from ..swap import is_plain_method
from .callable_objects import method_called
from .formulas import VALUE, Formula, formula_of
from .guards import CHUNK
from .note_reasons import ADAPTER, BIASED, PICKING, picks
from .replacements import FUNCTION_TYPES, REPLACEMENTS
from .rewrite import Rewritten, rewritten_method
from .roles import Role, may_match_any, role_of

# Of one method: the part of each load, by its text.
Parts = tuple[tuple[str, Role], ...]
_NORMS = frozenset(norm.__name__ for norm in (F.layer_norm, F.rms_norm, F.group_norm, F.batch_norm))


@dataclass(frozen=True)
class RewrittenMethods(Rule):
    """What is found in the methods of a module: the parts of their loads, and for people what they have become."""

    parts: tuple[tuple[str, Parts], ...]
    recompute: str
    found: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.parts)

    @property
    def has_norm(self) -> bool:
        """Whether they call a norm of torch's that is a function."""
        return not _NORMS.isdisjoint(self.found)

    def methods(self, original: type[nn.Module]) -> Mapping[str, Callable[..., Any]]:
        made = {}
        for name, parts in self.parts:
            made[name] = getattr(original, name)
            with contextlib.suppress(NoSource):  # of a pickled module, where its source is not
                if (found := _rewritten(made[name], parts, self.recompute)) is not None:
                    made[name] = found.function
        return made

    def __str__(self) -> str:
        counts = {text: self.found.count(text) for text in self.found}
        return "; ".join(text if count == 1 else f"{count} x {text}" for text, count in counts.items())


def rewritten_methods_of(
    module: nn.Module, recompute: str, may_touch: Callable[[nn.Module], bool]
) -> tuple[RewrittenMethods | None, str]:
    """What can be rewritten in the module's methods; and why a method that might be cannot."""
    if adds_bias(module):
        return _written(module, recompute, lambda _: BIASED, look_anyway=True)

    def parts_of(function: types.FunctionType) -> Parts:
        noted = ADAPTER if is_adapter(module) else PICKING * (recompute == "layer" and picks(function))
        return _parts(module, function, may_touch) + noted

    return _written(module, recompute, parts_of)


def adapter_of(module: nn.Module, recompute: str) -> RewrittenMethods | None:
    """What is noted in the methods of an adapter; nothing is tried out."""
    return _written(module, recompute, lambda _: ADAPTER)[0]


def _written(
    module: nn.Module, recompute: str, parts_of: Callable[[types.FunctionType], Parts], look_anyway: bool = False
) -> tuple[RewrittenMethods | None, str]:
    """`look_anyway`: whether to read the methods even if they name no child and no function of ours."""
    parts, found, reason = [], [], ""
    children = {name for name, child in module._modules.items() if child is not None}
    children |= {name for name, value in vars(module).items() if method_called(value) is not None}
    for name, method in _methods(type(module)):
        try:
            layers = decorator_chain(method)
            names_any = look_anyway or _names_any(layers[-1], children) or (recompute == "layer" and picks(layers[-1]))
            if not names_any or not may_be_rewritten(layers[-1]):
                continue
            own = parts_of(layers[-1])
            made = _rewritten(method, own, recompute) if may_match_any(own, recompute) else None
        except NoSource as error:
            made, reason = None, str(error)
        if made is not None:
            parts.append((name, own))
            found += made.found
    return (RewrittenMethods(tuple(parts), recompute, tuple(found)) if parts else None), reason


def functions_in(module: nn.Module) -> Iterator[types.FunctionType]:
    """The methods of a module and of the objects that it calls, as they are written."""
    held = (method_called(value) for value in vars(module).values())
    for method in (*(method for _, method in _methods(type(module))), *filter(None, held)):
        with contextlib.suppress(NoSource):
            yield decorator_chain(method)[-1]


def _methods(kind: type[nn.Module]) -> Iterator[tuple[str, types.FunctionType]]:
    """The methods of a class, but for those of nn.Module itself and Python's own."""
    seen: set[str] = set()
    for owner in itertools.takewhile(lambda owner: owner is not nn.Module, kind.__mro__):
        for name, method in vars(owner).items():
            if name not in seen and is_plain_method(method) and not name.startswith("__"):
                yield name, method
            seen.add(name)


def _names_any(function: types.FunctionType, children: Collection[str]) -> bool:
    """Whether it names a child of the module, or what a formula or an exchange may be made of."""
    if not (names := set(function.__code__.co_names)).isdisjoint(_METHODS | set(children)):
        return True
    values = (function.__globals__.get(name) for name in names | set(function.__code__.co_freevars))
    return any(
        isinstance(value, FUNCTION_TYPES) and (value in ACTIVATIONS or value in REPLACEMENTS) for value in values
    )


_METHODS = frozenset(
    function.__name__ for function in (*ACTIVATIONS, *REPLACEMENTS) if hasattr(function, "__name__")
) | {
    "erf",
    "square",
    "chunk",
    "clamp",
}


@memoized
def _rewritten(method: types.FunctionType, parts: Parts, recompute: str) -> Rewritten | None:
    return rewritten_method(method, dict(parts), recompute)


def _parts(module: nn.Module | None, function: types.FunctionType, may_touch: Callable[[nn.Module], bool]) -> Parts:
    loads, formulas = _read(function)
    scope = Scope(function, _tree(function), module)
    found = {}
    for text, tree in loads:
        value = scope.value(tree)
        if value is not UNKNOWN:
            method = method_called(value)
            found[text] = role_of(value, may_touch) if method is None else _object(method, may_touch)
    for name in _local_rotations(function):
        found[name] = Role("local exchange")
    plain = Scope(function, _tree(function))
    for text, functions in formulas:
        names = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)} - {VALUE}
        values = tuple((name, plain.value(ast.Name(name, ast.Load()))) for name in sorted(names))
        part = _formula(text, values, tuple(map(plain.value, functions)))
        if part.kind:
            found[text] = part
    return tuple(sorted(found.items()))


def _object(method: types.FunctionType, may_touch: Callable[[nn.Module], bool]) -> Role:
    """The part of an object by what runs where it is called, which is read as a method is, but for what it is given."""
    try:
        written = decorator_chain(method)[-1]
        parts = _parts(None, written, may_touch) if may_be_rewritten(written) else ()
    except NoSource:
        return Role()
    return Role("object", known=(method, parts)) if may_match_any(parts) else Role()


@memoized
def _local_rotations(function: types.FunctionType) -> list[str]:
    """The local names that stand for functions which turn heads, wherever they are called."""
    scope = Scope(function, _tree(function))
    calls = [node for node in ast.walk(_tree(function)) if isinstance(node, ast.Call)]
    named = {call.func.id: call.func for call in calls if isinstance(call.func, ast.Name)}
    return [name for name, tree in named.items() if is_rotation(scope.local_function(tree))]


@memoized
def _tree(function: types.FunctionType) -> ast.FunctionDef:
    return definition_of(function).tree


@memoized
def _read(function: types.FunctionType) -> tuple[list[tuple[str, ast.expr]], list[tuple[str, list[ast.expr]]]]:
    """The loads in a function's body, by their text; and the formulas in it, with the functions and numbers in each."""
    tree = _tree(function)
    scope = Scope(function, tree)
    loads: dict[str, ast.expr] = {}
    formulas: dict[str, list[ast.expr]] = {}
    for statement in tree.body:
        for node in ast.walk(statement):
            if isinstance(node, ast.Attribute | ast.Subscript | ast.Name) and isinstance(node.ctx, ast.Load):
                if not (isinstance(node, ast.Name) and node.id in scope.locals):
                    loads.setdefault(ast.unparse(node), node)
            for formula in _formulas(node, scope, {}):
                formulas.setdefault(formula.text, formula.functions)
    for run, last in _runs(tree, scope):
        for node in ast.walk(last):
            for formula in _formulas(node, scope, run.bindings):
                formulas.setdefault(formula.text, formula.functions)
    return list(loads.items()), list(formulas.items())


def _runs(tree: ast.FunctionDef, scope: Scope) -> Iterator[tuple[Run, ast.stmt]]:
    """The runs of statements in a function, and the last statement of each."""

    def is_chunk(function: ast.expr) -> bool:
        return scope.value(function) is CHUNK

    for block in blocks(tree):
        for end, last in enumerate(block.statements):
            for begin in range(max(0, end - MAX_RUN_LENGTH + 1), end):
                run = run_between(tree, block, begin, end, scope.private_locals, is_chunk)
                if run is not None:
                    yield run, last


def _formulas(node: ast.AST, scope: Scope, bindings: Mapping[int, Binding]) -> list[Formula]:
    """The formula that a node may be, beyond sums and products of numbers."""
    found = formula_of(node, scope, bindings) if isinstance(node, ast.Call | ast.BinOp) else None
    return [found] if found is not None and "(" in found.text else []


@memoized
@in_own_thread
def _formula(text: str, values: tuple[tuple[str, Any], ...], known: tuple[Any, ...]) -> Role:
    """The part of a formula, which may be an activation of ours, with these values of the names in it."""
    code = compile(text, "<formula>", "eval")

    def compute(points: Tensor) -> Any:
        return eval(code, {"__builtins__": {}} | dict(values), {VALUE: points})

    try:
        few = torch.tensor((-11.0, -2.5, -0.7, 0.3, 1.9, 10.0), dtype=torch.float64, device="cpu")
        with torch.no_grad():
            values_there = compute(few.clone())
        close = (torch.allclose(values_there, FORMULAS[name](few), rtol=1e-6, atol=1e-6) for name in NAMES)
        name, keeps_input, is_exact = activation_by_trial(compute) if any(close) else TrialResult()
        return Role() if name is None else Role("act", name, not keeps_input, known, is_exact)
    except Exception:  # whatever a formula of torch's functions may raise, it is none of ours
        return Role()

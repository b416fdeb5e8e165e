"""The rule for modules with user-written methods: each method is rewritten to make fused calls.

Conversion finds the roles of a method's loads, such as a linear layer, an activation or a norm, in the module. A method
is rewritten once for all modules with the same source and the same roles.
"""

import ast
import contextlib
import itertools
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...activations import NAMES
from ...backends.reference import ACTIVATIONS as FORMULAS
from ..adapters import adds_bias, is_adapter
from ..attribute_loads import loads_plainly
from ..code.frames import why_not_rewritten
from ..code.memoization import memoized
from ..code.scope import UNKNOWN, Scope
from ..code.source import NoSource, decorator_chain, definition_of
from ..code.straight_line import Binding, Run, blocks, runs_ending_at
from ..operands import has_steps_of
from ..rotations.recognition import is_rotation
from ..rules.activation_trials import TrialResult, activation_by_trial
from ..rules.gates import GateOutline, clamps_or_casts, gate_of_method, gated, outline_of_method
from ..rules.norm_trials import READ
from ..rules.rule import Rule
from ..rules.trial import in_own_thread
from ..swap import is_plain_method
from .callable_objects import method_called
from .candidates import is_candidate
from .formulas import VALUE, Formula, formula_of
from .gate_runs import gate_run_roles
from .note_reasons import ADAPTER, BIASED, noted_roles
from .rewrite import rewritten_method
from .roles import GATE, SUPER_NORM, MethodRoles, Role, may_match_any, role_of, role_of_method
from .super_norms import class_with_forward

_PACKAGE = __name__.partition(".")[0]


@dataclass(frozen=True)
class RewrittenMethods(Rule):
    """The roles of the loads in a module's methods, with descriptions of the rewrites for people.

    `has_norm`: whether a rewrite computes a functional norm of torch.
    """

    roles: tuple[tuple[str, MethodRoles], ...]
    recompute: str
    descriptions: tuple[str, ...]
    has_norm: bool

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.roles)

    def methods(self, original: type[nn.Module]) -> Mapping[str, Callable[..., Any]]:
        methods = {name: getattr(original, name) for name in self.names}
        for name, roles in self.roles:
            if (role := dict(roles).get("", Role())).kind == GATE:
                gate = gate_of_method(original, methods[name], GateOutline(*role.values))
                methods[name] = methods[name] if gate is None else gated(gate, methods[name])
                continue
            with contextlib.suppress(NoSource):  # an unpickled module may have no source here
                if (rewritten := rewritten_method(methods[name], roles, self.recompute)) is not None:
                    methods[name] = rewritten.function
        return methods

    def __str__(self) -> str:
        counts = {text: self.descriptions.count(text) for text in self.descriptions}
        return "; ".join(text if count == 1 else f"{count} x {text}" for text, count in counts.items())


def rewritten_methods_of(
    module: nn.Module, recompute: str, may_touch: Callable[[nn.Module], bool]
) -> tuple[RewrittenMethods | None, str]:
    """The rule for a module's methods, None if nothing can be rewritten, and why a method could not be read."""
    if adds_bias(module):
        return _rule(module, recompute, lambda _: BIASED, read_all=True)

    def roles_in(function: types.FunctionType) -> MethodRoles:
        noted = ADAPTER if is_adapter(module) else noted_roles(function, recompute)
        return _roles(module, function, may_touch) + noted

    return _rule(module, recompute, roles_in, tries_gates=True)


def adapter_of(module: nn.Module, recompute: str) -> RewrittenMethods | None:
    """The rule that notes the sums in the methods of an adapter; makes no trials."""
    return _rule(module, recompute, lambda _: ADAPTER)[0]


def _rule(
    module: nn.Module,
    recompute: str,
    roles_in: Callable[[types.FunctionType], MethodRoles],
    read_all: bool = False,
    tries_gates: bool = False,
) -> tuple[RewrittenMethods | None, str]:
    """`read_all`: whether to read methods that name neither a child nor a function with a replacement; `tries_gates`:
    whether methods may be tried."""
    method_roles: list[tuple[str, MethodRoles]] = []
    descriptions, reason, has_norm = [], "", False
    children = {name for name, child in module._modules.items() if child is not None}
    children |= {name for name, value in vars(module).items() if method_called(value) is not None}
    for name, method in _methods(type(module)):
        roles: MethodRoles = ()
        rewritten = None
        try:
            function = decorator_chain(method)[-1]
            is_read = read_all or is_candidate(function, module, children) or bool(noted_roles(function, recompute))
            if is_read and (why_not := why_not_rewritten(function, module)):
                reason = reason or why_not
            elif is_read:
                roles = roles_in(function)
                rewritten = rewritten_method(method, roles, recompute) if may_match_any(roles, recompute) else None
        except NoSource as error:
            reason = str(error)
        is_fused = rewritten is not None and rewritten.fuses and not clamps_or_casts(method)
        outline = outline_of_method(module, method) if tries_gates and not is_fused else None
        if outline is not None:
            method_roles.append((name, (("", Role(GATE, values=outline)),)))
            descriptions.append(str(gate_of_method(type(module), method, outline)))
        elif rewritten is not None:
            method_roles.append((name, roles))
            descriptions += rewritten.descriptions
            has_norm = has_norm or rewritten.has_norm
    if not method_roles:
        return None, reason
    return RewrittenMethods(tuple(method_roles), recompute, tuple(descriptions), has_norm), reason


def functions_in(module: nn.Module) -> Iterator[types.FunctionType]:
    """The undecorated methods of a module, and those that run when the module calls an object."""
    called = (method_called(value) for value in vars(module).values())
    for method in (*(method for _, method in _methods(type(module))), *filter(None, called)):
        with contextlib.suppress(NoSource):
            yield decorator_chain(method)[-1]


def _methods(kind: type[nn.Module]) -> Iterator[tuple[str, types.FunctionType]]:
    """The methods of a class, without those of nn.Module, those of this package's modules, and dunders."""
    seen: set[str] = set()
    for owner in itertools.takewhile(lambda owner: owner is not nn.Module, kind.__mro__):
        is_ours = owner.__module__.partition(".")[0] == _PACKAGE
        for name, method in vars(owner).items():
            if name not in seen and is_plain_method(method) and not name.startswith("__") and not is_ours:
                yield name, method
            seen.add(name)


def _has_norm_of_torch(kind: type[nn.Module], role: Role) -> bool:
    """Whether `super().forward` in a class computes what torch's norm computes."""
    return loads_plainly(kind, *READ) and has_steps_of(kind, class_with_forward(role.values[0]))


def _roles(
    module: nn.Module | None, function: types.FunctionType, may_touch: Callable[[nn.Module], bool]
) -> MethodRoles:
    """The roles of the loads and formulas in a function, whose first argument is the module unless that is None."""
    loads, formulas = _read(function)
    tree = definition_of(function).tree
    scope, plain = Scope(function, tree, module), Scope(function, tree)
    roles = {}
    for text, load in loads:
        value = scope.value(load)
        if value is not UNKNOWN:
            method = method_called(value)
            role = role_of(value, may_touch) if method is None else _object_role(method, may_touch)
            # A property would run once more.
            if role.kind != SUPER_NORM or (module is not None and _has_norm_of_torch(type(module), role)):
                roles[text] = role
        elif module is not None and isinstance(load, ast.Attribute) and ast.unparse(load.value) == scope.self_name:
            if (role := role_of_method(module, load.attr)).kind:
                roles[text] = role
    for name in _local_rotations(function):
        roles[name] = Role("local replacement")
    for text, functions in formulas:
        names = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)} - {VALUE}
        values = tuple((name, plain.value(ast.Name(name, ast.Load()))) for name in sorted(names))
        role = _formula_role(text, values, tuple(map(plain.value, functions)))
        if role.kind:
            roles[text] = role
    if module is not None:
        roles |= gate_run_roles(module, function)
    return tuple(sorted(roles.items()))


def _object_role(method: types.FunctionType, may_touch: Callable[[nn.Module], bool]) -> Role:
    """The role of a callable object by the `__call__` of its class; attributes of the object are not resolved."""
    try:
        function = decorator_chain(method)[-1]
        roles = _roles(None, function, may_touch) if not why_not_rewritten(function) else ()
    except NoSource:
        return Role()
    return Role("object", values=(method, roles)) if may_match_any(roles) else Role()


@memoized
def _local_rotations(function: types.FunctionType) -> list[str]:
    """The local names of nested or imported functions that the function calls and that are rotations."""
    tree = definition_of(function).tree
    scope = Scope(function, tree)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    callees = {call.func.id: call.func for call in calls if isinstance(call.func, ast.Name)}
    return [name for name, tree in callees.items() if is_rotation(scope.local_function(tree))]


@memoized
def _read(function: types.FunctionType) -> tuple[list[tuple[str, ast.expr]], list[tuple[str, list[ast.expr]]]]:
    """The loads in a function's body by their text, and the formulas with the functions and numbers in each."""
    tree = definition_of(function).tree
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
    for block in blocks(tree):
        for end, last in enumerate(block.statements):
            for run in runs_ending_at(tree, block, end, scope):
                yield run, last


def _formulas(node: ast.AST, scope: Scope, bindings: Mapping[int, Binding]) -> list[Formula]:
    """The formula of a node, if the formula has more than arithmetic operators."""
    formula = formula_of(node, scope, bindings) if isinstance(node, ast.Call | ast.BinOp) else None
    return [formula] if formula is not None and "(" in formula.text else []


@memoized
@in_own_thread
def _formula_role(text: str, values: tuple[tuple[str, Any], ...], functions: tuple[Any, ...]) -> Role:
    """The role of a formula that computes an activation, with these values of the names in the text."""
    code = compile(text, "<formula>", "eval")

    def compute(points: Tensor) -> Any:
        return eval(code, {"__builtins__": {}} | dict(values), {VALUE: points})

    try:
        # A quick test at a few points rules out most formulas before a trial.
        points = torch.tensor((-11.0, -2.5, -0.7, 0.3, 1.9, 10.0), dtype=torch.float64, device="cpu")
        with torch.no_grad():
            results = compute(points.clone())
        close = (torch.allclose(results, FORMULAS[name](points), rtol=1e-6, atol=1e-6) for name in NAMES)
        trial = activation_by_trial(compute) if any(close) else TrialResult()
        role = Role("formula", trial.name or "", not trial.keeps_input, functions, trial.is_exact)
        return role if trial.name else Role()
    except Exception:  # a formula that raises, whatever the exception, is no activation
        return Role()

"""Templates: expressions such as `act(gate(input)) * value(input)` that describe what a fused call computes.

The callees in a template are roles: `act` is an activation, `norm` a norm, `drop` a dropout, `may_drop` a dropout that
may be absent, `formula` an activation as a formula, and `write` an activation of torch that writes over its input.
`gate_half` and `value_half` are the halves of their argument along the last dimension, and `view` is any view by None,
`:` and `...`. Any other callee is a linear layer, and other names are tensors. A sum or a product matches in both
orders.
"""

import ast
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..code.straight_line import CHUNK
from ..operands import as_plain_tensor, has_global_hooks, is_observed, is_ordinary
from ..rules.activation_trials import TriedFunction, TriedMethod
from ..rules.pointwise import KEPT_BY_OUTPUT, activation_of
from .guards import autocast_input, dropout_probability, linear_operands, norm_rule
from .roles import Role

# The results of a guarded call, in the reverse order of their use.
Results = list[Any]

_HALVES = ("gate_half", "value_half")
_NO_LAYERS = (*_HALVES, "act", "formula", "norm", "drop", "may_drop", "view", "write")


def kind_of(name: str) -> str:
    """The kind of `roles.Role` that a template calls by this name."""
    return {"drop": "dropout"}.get(name, name if name in _NO_LAYERS else "linear")


class Pattern(NamedTuple):
    """A template with the function `compute` that computes it, or returns None where the fused op does not apply.

    `description` is for people, and `spellings` are all forms of the template. `compute` takes the `tensors` and the
    (weight, bias) pairs of the `linears` by their names in the template. Among its `parameters` may be `norm` and
    its `rule`, `activation` (the name) and `act` (the module or function), `write` (the module), `p` (the dropout's
    probability), `recompute` (the level of the method's blocks), and the constants in `options`. A template with halves
    gives their `layout` and `dim`, one with `view(x)` the function `x_view`. `makes_act_input`: the template computes
    the activation's input, which no other code sees; `act_input_is_half`: the input is half of a tensor whose other
    half is the value.
    """

    compute: Callable[..., Results | None]
    description: str
    spellings: tuple[ast.expr, ...]
    tensors: tuple[str, ...]
    linears: tuple[str, ...]
    parameters: tuple[str, ...]
    makes_act_input: bool
    act_input_is_half: bool
    options: dict[str, Any]


def pattern(description: str, template: str, **options: Any) -> Callable[[Callable[..., Results | None]], Pattern]:
    """Decorator that makes a function the pattern of a template.

    `options` are the constant arguments of the function with their defaults.
    """
    tree: Any = ast.parse(template, mode="eval").body
    arguments = {callee(node): node.args[0] for node in ast.walk(tree) if isinstance(node, ast.Call)}
    names = {node.id: None for node in ast.walk(tree) if isinstance(node, ast.Name)}
    act_input = arguments.get("act")
    while isinstance(act_input, ast.Call) and callee(act_input) in _HALVES:
        act_input = act_input.args[0]

    def decorator(compute: Callable[..., Results | None]) -> Pattern:
        return Pattern(
            compute,
            description,
            tuple(spellings(tree)),
            tuple(name for name in names if name not in arguments),
            tuple(name for name in arguments if name not in _NO_LAYERS),
            tuple(inspect.signature(compute).parameters),
            isinstance(act_input, ast.Call),
            act_input is not arguments.get("act"),
            options,
        )

    return decorator


def callee(call: ast.Call) -> str:
    """The name of the callee in a template."""
    return ast.unparse(call.func)


def spellings(tree: ast.expr) -> Iterator[ast.expr]:
    """All forms of a template, those with optional dropouts first."""
    if isinstance(tree, ast.Call):
        for inner in spellings(tree.args[0]):
            name = "drop" if callee(tree) == "may_drop" else callee(tree)
            yield ast.Call(ast.Name(name), [inner], [])
        if callee(tree) == "may_drop":
            yield from spellings(tree.args[0])
    elif isinstance(tree, ast.BinOp):
        for left, right in itertools.product(spellings(tree.left), spellings(tree.right)):
            yield ast.BinOp(left, tree.op, right)
            yield ast.BinOp(right, tree.op, left)
    else:
        yield tree


def eager_saves_act_input(pattern: Pattern, constants: Mapping[str, Any]) -> bool:
    """Whether eager torch keeps the storage of the activation's input for any activation.

    For some activations eager torch saves only the output, so that a user may write to the input in place.
    """
    return pattern.makes_act_input or pattern.act_input_is_half or constants.get("views", False)


def guarded_call(
    pattern: Pattern,
    captured: Sequence[str],
    options: dict[str, Any],
    formula: Role | None = None,
    tried: TriedFunction | TriedMethod | None = None,
) -> Callable[..., list[Any]]:
    """The function that a rewritten method calls at a site: checks the operands, then makes the fused call.

    The function returns a list: the results and True, or the `captured` operands and False. The method pops all items,
    so that no name holds a tensor longer than in the original. The activation may be a `formula`, whose role has the
    functions and numbers in it, or a function or method that was `tried`.
    """
    returned = tuple(reversed(captured))
    formulas = tuple((f"f{index}", function) for index, function in enumerate(formula.values if formula else ()))
    constants = pattern.options | options
    parameters = pattern.parameters
    passed = [name for name in ("act", "norm", "write") if name in parameters]
    saves_act_input = eager_saves_act_input(pattern, constants)

    def call(**operands: Any) -> list[Any]:
        results = None if is_observed() or has_global_hooks() else computed(operands)
        if results is None:
            return [*[operands[name] for name in returned], False]
        results.append(True)
        return results

    def computed(operands: dict[str, Any]) -> Results | None:
        """The results, None if an operand no longer has the role of the template."""
        if any(operands[name] is not function for name, function in formulas):
            return None
        if operands.get("halves", CHUNK) is not CHUNK:
            return None
        plain = _plain_tensors(operands, pattern.tensors)
        if plain is None:
            return None
        tensors, kind = plain
        arguments: dict[str, Any] = {**constants, **tensors, **{name: operands.get(name) for name in passed}}
        if "activation" in parameters:
            is_float64 = any(tensor.dtype is torch.float64 for tensor in tensors.values())
            act_name = name_of_activation(operands.get("act"), is_float64)
            if act_name is None or (act_name in KEPT_BY_OUTPUT and not saves_act_input):
                return None
            arguments["activation"] = act_name
        if "p" in parameters:
            has_drop = "drop" in operands
            p = dropout_probability(operands["drop"], operands.get("p"), operands.get("training")) if has_drop else 0.0
            if p is None:
                return None
            arguments["p"] = p
        if pattern.linears:
            pairs = linear_operands([operands[name] for name in pattern.linears], tensors["input"])
            if pairs is None:
                return None
            arguments.update(zip(pattern.linears, pairs, strict=True))
            arguments["input"] = autocast_input(tensors["input"])
        if "rule" in parameters:
            arguments["rule"] = norm_rule(operands["norm"])
            if arguments["rule"] is None:
                return None
        results = pattern.compute(**arguments)
        return results if kind is None or results is None else [result.as_subclass(kind) for result in results]

    def name_of_activation(act: Any, is_float64: bool) -> str | None:
        if formula is not None:
            return formula.name if formula.is_exact or not is_float64 else None
        return tried.name_of(act, is_float64) if tried else activation_of(act, pattern.makes_act_input, is_float64)

    return call


def _plain_tensors(
    operands: Mapping[str, Any], names: Sequence[str]
) -> tuple[dict[str, Tensor], type[Tensor] | None] | None:
    """The operands of these names as plain tensors, and their subclass; None if the fused functions take not all."""
    tensors: dict[str, Tensor] = {}
    kind = None
    for name in names:
        tensor = operands[name]
        if type(tensor) is not Tensor:
            tensor, subclass = as_plain_tensor(tensor)
            if subclass is not None and kind not in (None, subclass):
                return None
            kind = kind or subclass
        if not is_ordinary(tensor):
            return None
        tensors[name] = tensor
    return tensors, kind

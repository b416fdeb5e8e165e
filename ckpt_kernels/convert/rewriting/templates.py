"""What one of our calls computes, as it is written: templates, in all the ways in which each may be spelled.

In a template, what is called is a part: `act` an activation, `norm` a norm, `drop` a dropout, `may_drop` one that may
be absent, and by any other name a linear layer. Other names are tensors. `gate_half` and `value_half` are the halves of
the last dimension of what they are called on, `view` is any view by None, `:` and `...`, and `formula` an activation
that is written out, `write` one of torch's that writes over its input. Both orders of a sum or a product are tried.
"""

import ast
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..operands import as_plain_tensor, has_global_hooks, is_observed, is_ordinary
from ..rules.function_trials import TriedFunction
from ..rules.pointwise import KEPT_BY_OUTPUT, activation_of
from .guards import CHUNK, autocast_input, dropout_probability, linear_operands, norm_rule

# The results of a site, in the order in which they are taken from the end.
Results = list[Any]

_HALVES = ("gate_half", "value_half")
_NO_LAYERS = (*_HALVES, "act", "formula", "norm", "drop", "may_drop", "view", "write")


def kind_of(name: str) -> str:
    """The kind of part that a template calls by that name; see `reading.Role`."""
    return {"drop": "dropout"}.get(name, name if name in _NO_LAYERS else "linear")


class Pattern(NamedTuple):
    """A function that computes a template, for people `said`, or None where it does not.

    It takes the tensors and the operands (weight, bias) of the linear layers by their names, and, where there are such,
    `norm` with its `rule`, `activation` with its name and `act` with the module or function, and `p`, the dropout's
    probability. `made`: what the activation is of is computed in the template, and nobody else sees it; `halved`: it
    is a half of something, of which the other half is a factor. `options` are constants.
    """

    compute: Callable[..., Results | None]
    said: str
    spellings: tuple[ast.expr, ...]
    tensors: tuple[str, ...]
    linears: tuple[str, ...]
    takes: tuple[str, ...]
    made: bool
    halved: bool
    options: dict[str, Any]


def pattern(said: str, template: str, **options: Any) -> Callable[[Callable[..., Results | None]], Pattern]:
    """Makes a function the pattern of a template."""
    tree: Any = ast.parse(template, mode="eval").body
    called = {callee(node): node.args[0] for node in ast.walk(tree) if isinstance(node, ast.Call)}
    names = {node.id: None for node in ast.walk(tree) if isinstance(node, ast.Name)}
    of = called.get("act")
    while isinstance(of, ast.Call) and callee(of) in _HALVES:
        of = of.args[0]

    def made(compute: Callable[..., Results | None]) -> Pattern:
        return Pattern(
            compute,
            said,
            tuple(spellings(tree)),
            tuple(name for name in names if name not in called),
            tuple(name for name in called if name not in _NO_LAYERS),
            tuple(inspect.signature(compute).parameters),
            isinstance(of, ast.Call),
            of is not called.get("act"),
            options,
        )

    return made


def callee(call: ast.Call) -> str:
    """What a template calls, which is a name everywhere."""
    if not isinstance(call.func, ast.Name):
        raise TypeError(f"a template calls {ast.unparse(call.func)}; expected a name")
    return call.func.id


def spellings(tree: ast.expr) -> Iterator[ast.expr]:
    """All ways in which a template may be written, with the dropouts that may be absent first."""
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


def keeps(pattern: Pattern, constants: Mapping[str, Any]) -> bool:
    """Whether eager torch keeps what the activation is of, too, whichever that is. It keeps the output of some, and not
    their input, to which somebody may write."""
    return pattern.made or pattern.halved or constants.get("parts", False)


def guarded_call(
    pattern: Pattern,
    captured: Sequence[str],
    options: dict[str, Any],
    functions: Sequence[Any] = (),
    activation: str | None = None,
    is_exact: bool = True,
    tried: TriedFunction | None = None,
) -> Callable[..., list[Any]]:
    """What the rewritten method calls: the results and True, or what it has to be given back, `captured`, and False.

    In a list, from which all is taken: no local name holds a tensor longer than the original's would. `functions` are
    those that a formula of this activation was known with, which computes that in float64 too where it `is_exact`; or
    the activation is a function that was `tried`.
    """
    again = tuple(reversed(captured))
    formulas = tuple((f"f{index}", known) for index, known in enumerate(functions))
    constants = pattern.options | options
    tensors, linears, takes = pattern.tensors, pattern.linears, pattern.takes
    passed = [name for name in ("act", "norm", "write") if name in takes]
    kept = keeps(pattern, constants)

    def call(**operands: Any) -> list[Any]:
        results = None if is_observed() or has_global_hooks() else computed(operands)
        if results is None:
            return [*[operands[name] for name in again], False]
        results.append(True)
        return results

    def computed(operands: dict[str, Any]) -> Results | None:
        """The results, if the parts are what they were taken for."""
        for name, known in formulas:
            if operands[name] is not known:
                return None
        if operands.get("halves", CHUNK) is not CHUNK:
            return None
        kind, wide, given = None, False, constants.copy()
        for name in tensors:
            tensor = operands[name]
            if type(tensor) is not Tensor:
                tensor, subclass = as_plain_tensor(tensor)
                if subclass is not None and kind not in (None, subclass):
                    return None
                kind = kind or subclass
            if not is_ordinary(tensor):
                return None
            wide = wide or tensor.dtype is torch.float64
            given[name] = tensor
        for name in passed:
            given[name] = operands.get(name)
        if "activation" in takes:
            act = operands.get("act")
            found = activation or (
                activation_of(act, pattern.made, wide) if tried is None else tried.name_of(act, wide)
            )
            if found is None or (wide and not is_exact) or (not kept and found in KEPT_BY_OUTPUT):
                return None
            given["activation"] = found
        if "p" in takes:
            p = (
                dropout_probability(operands["drop"], operands.get("p"), operands.get("training"))
                if "drop" in operands
                else 0.0
            )
            if p is None:
                return None
            given["p"] = p
        if linears:
            input = given["input"]
            of_linears = linear_operands([operands[name] for name in linears], input)
            if of_linears is None:
                return None
            given.update(zip(linears, of_linears, strict=True))
            given["input"] = autocast_input(input)
        if "rule" in takes:
            given["rule"] = norm_rule(operands["norm"])
            if given["rule"] is None:
                return None
        results = pattern.compute(**given)
        return results if kind is None or results is None else [result.as_subclass(kind) for result in results]

    return call

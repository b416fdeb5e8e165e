"""What stands in a rewritten method where several calls were written: it computes the whole, or does nothing at all.

Each function takes what was written there (modules, functions, tensors) under the names of its parameters. Where these
are what they were taken for (plain calls, known modules, tensors that fit), it returns the results. Else it has done
nothing and returns None, and the original expression runs.

An activation is a module or a function; a dropout is a module, or `torch.nn.functional.dropout` with its probability
and mode.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import functional as F
from .guards import (
    activation_name_of,
    are_alike,
    are_wanted,
    chains,
    level_for,
    linear_operands,
    modulates,
    norm_rule,
    probability,
)
from .norms import RowNorm
from .operands import as_plain, has_hooks_for_all, is_operand
from .pointwise import KEPT_BY_OUTPUT

# The results of a site, in the order in which they are taken from the end.
Results = list[Any]


def site(
    compute: Callable[..., Results | None], captured: Sequence[str], options: dict[str, Any], functions: Sequence[Any]
) -> Callable[..., list]:
    """What the rewritten method calls: the results and True, or what it has to be given back, `captured`, and False.

    In a list, from which all is taken: no local name holds a tensor longer than the original's would. `functions` are
    those that a formula in it was known with.
    """
    again = tuple(reversed(captured))
    tensors = TENSORS.get(compute.__name__, ("input",))
    formulas = tuple((f"f{index}", known) for index, known in enumerate(functions))

    def call(**operands: Any) -> list[Any]:
        given, kind = operands, None
        for name, known in formulas:
            if operands[name] is not known:
                return [*[operands[name] for name in again], False]
        if formulas:
            given = {name: operand for name, operand in operands.items() if (name, operand) not in formulas}
        for name in tensors:
            if type(operands[name]) is not Tensor:
                given, kind = _plain(given, tensors)
                break
        results = None if has_hooks_for_all() else compute(**given, **options)
        if results is None:
            return [*[operands[name] for name in again], False]
        if kind is not None:
            results = [result.as_subclass(kind) for result in results]
        results.append(True)
        return results

    return call


# The operands that are tensors, of the functions that have others than `input`.
TENSORS = {"glu": ("gate", "value"), "add_norm": ("left", "right"), "modulated": ("input", "scale", "shift")}


def _plain(operands: dict[str, Any], tensors: Sequence[str]) -> tuple[dict[str, Any], type[Tensor] | None]:
    """The operands with plain tensors for those of one subclass, and this class."""
    found = {name: as_plain(operands[name]) for name in tensors}
    kinds = {kind for _, kind in found.values() if kind is not None}
    if len(kinds) != 1:
        return operands, None
    return operands | {name: tensor for name, (tensor, _) in found.items()}, kinds.pop()


def mlp(
    first: Any,
    act: Any,
    last: Any,
    input: Any,
    drop: Any = None,
    p: Any = None,
    training: Any = None,
    *,
    recompute: str,
) -> Results | None:
    """last(drop(act(first(input))))."""
    name, p = activation_name_of(act, True), probability(drop, p, training)
    if name is None or p is None or not is_operand(input):
        return None
    firsts, lasts = linear_operands(first, input), linear_operands(last, input)
    if firsts is None or lasts is None or not chains(input, firsts, lasts):
        return None
    if recompute == "block" and (name in ("sigmoid", "tanh") or getattr(act, "inplace", False)):
        return None
    recompute = level_for(recompute, firsts)
    return [F.mlp(input, *firsts, *lasts, activation=name, dropout_p=p, recompute=recompute)]


def gated_mlp(
    gate: Any,
    act: Any,
    value: Any,
    last: Any,
    input: Any,
    drop: Any = None,
    p: Any = None,
    training: Any = None,
    *,
    recompute: str,
) -> Results | None:
    """last(drop(act(gate(input)) * value(input)))."""
    name, p = activation_name_of(act, True), probability(drop, p, training)
    if name is None or p is None or not is_operand(input):
        return None
    gates, values, lasts = (linear_operands(module, input) for module in (gate, value, last))
    if gates is None or values is None or lasts is None:
        return None
    if not chains(input, gates, lasts) or values[0].shape != gates[0].shape:
        return None
    if not are_wanted(input, gates, values):
        return None
    recompute = level_for(recompute, gates, values)
    weights = {"gate_bias": gates[1], "value_bias": values[1], "bias": lasts[1]}
    options = {"activation": name, "dropout_p": p, "recompute": recompute}
    return [F.gated_mlp(input, gates[0], values[0], lasts[0], **weights, **options)]


def packed_mlp(
    packed: Any,
    act: Any,
    last: Any,
    input: Any,
    drop: Any = None,
    p: Any = None,
    training: Any = None,
    *,
    layout: str,
    recompute: str,
) -> Results | None:
    """last(drop(act(gate) * value)), gate and value the halves of packed(input)."""
    name, p = activation_name_of(act, True), probability(drop, p, training)
    if name is None or p is None or not is_operand(input):
        return None
    packs, lasts = linear_operands(packed, input), linear_operands(last, input)
    if packs is None or lasts is None or not chains(input, packs, lasts, 2):
        return None
    recompute = level_for(recompute, packs)
    options = {"activation": name, "layout": layout, "dropout_p": p, "recompute": recompute}
    return [F.gated_mlp(input, packs[0], None, lasts[0], gate_bias=packs[1], bias=lasts[1], **options)]


def gated_products(gate: Any, act: Any, value: Any, input: Any) -> Results | None:
    """act(gate(input)) * value(input), of two linear layers."""
    name = activation_name_of(act, True)
    if name is None or not is_operand(input):
        return None
    gates, values = linear_operands(gate, input), linear_operands(value, input)
    if gates is None or values is None or gates[0].shape != values[0].shape or gates[0].shape[1] != input.shape[-1]:
        return None
    if not are_wanted(input, gates, values):
        return None
    return [F.glu(gate(input), value(input), activation=name)]


def glu(act: Any, gate: Any, value: Any) -> Results | None:
    """act(gate) * value."""
    name = activation_name_of(act)
    # Eager torch keeps the output of some, and not their input, to which somebody may write.
    if (
        name is None
        or name in KEPT_BY_OUTPUT
        or not is_operand(gate)
        or not is_operand(value)
        or not are_alike(gate, value)
    ):
        return None
    if torch.is_grad_enabled() and not (gate.requires_grad and value.requires_grad):
        return None
    return [F.glu(gate, value, activation=name)]


def packed_glu(act: Any, input: Any, *, layout: str) -> Results | None:
    """act(gate) * value, the halves of the input's last dimension."""
    name = activation_name_of(act)
    if name is None or name in KEPT_BY_OUTPUT or not is_operand(input) or input.dim() == 0 or input.shape[-1] % 2:
        return None
    return [F.packed_glu(input, activation=name, layout=layout)]


def activation(act: Any, input: Any) -> Results | None:
    """act(input)."""
    name = activation_name_of(act)
    return [F.bias_act(input, activation=name)] if name is not None and is_operand(input) else None


def norm_act(norm: Any, act: Any, input: Any) -> Results | None:
    """act(norm(input))."""
    rule, name = norm_rule(norm), activation_name_of(act, True)
    if rule is None or name is None or not is_operand(input):
        return None
    output = rule.compute(norm, input, name)
    return None if output is None else [output]


def add_norm(
    norm: Any, left: Any, right: Any, drop: Any = None, p: Any = None, training: Any = None, *, total: bool = True
) -> Results | None:
    """norm(left + right), and left + right if asked for, which is taken first; `right` is dropped out before."""
    rule, p = norm_rule(norm), probability(drop, p, training)
    if not isinstance(rule, RowNorm) or rule.channels_first or p is None:
        return None
    if not is_operand(left) or not is_operand(right) or not are_alike(left, right) or not rule.takes(norm, left):
        return None
    # A sum of what has no gradient has none.
    if torch.is_grad_enabled() and not (left.requires_grad or right.requires_grad):
        return None
    if not left.is_contiguous() or not right.is_contiguous():
        return None
    _, shape, weight, bias, eps = rule.operands(norm, left)
    if tuple(shape) != left.shape[left.dim() - len(shape) :]:
        return None
    if rule.centered:
        results = F.add_layer_norm(right, left, shape, weight, bias, eps, dropout_p=p)
    else:
        results = F.add_rms_norm(right, left, shape, weight, eps, dropout_p=p, **rule.rms_options())
    return list(results) if total else [results[0]]


def modulated(norm: Any, input: Any, scale: Any, shift: Any, *, scale_view: Any, shift_view: Any) -> Results | None:
    """norm(input) * (1 + scale) + shift, these as their views."""
    rule = norm_rule(norm)
    if not isinstance(rule, RowNorm) or rule.channels_first or rule.weight_offset:
        return None
    if not is_operand(input) or not is_operand(scale) or not is_operand(shift) or not rule.takes(norm, input):
        return None
    # Eager torch keeps 1 + scale, and nothing of shift: a write to them must not be seen here either.
    if torch.is_grad_enabled() and not (input.requires_grad and scale.requires_grad):
        return None
    scale, shift = scale_view(scale).clone(), shift_view(shift).clone()
    _, shape, weight, bias, eps = rule.operands(norm, input)
    if len(shape) != 1 or (rule.cast_before_weight and weight is not None):
        return None
    if not modulates(scale, input) or not modulates(shift, input) or scale.shape != shift.shape:
        return None
    if rule.centered:
        return [F.modulated_layer_norm(input, scale, shift, shape, weight, bias, eps)]
    return [F.modulated_rms_norm(input, scale, shift, shape, weight, eps)]


def act_drop(act: Any, drop: Any, input: Any, p: Any = None, training: Any = None) -> Results | None:
    """drop(act(input))."""
    name, p = activation_name_of(act), probability(drop, p, training)
    if name is None or name in KEPT_BY_OUTPUT or not p or not is_operand(input):
        return None
    return [F.bias_act(input, activation=name, dropout_p=p)]

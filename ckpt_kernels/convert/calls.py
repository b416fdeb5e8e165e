"""What stands in a converted module's graph for several of its modules' calls.

Each takes the modules and what they are called on. If they are as they were found, one of our functions computes it
all. If one has hooks, was wrapped (an adapter, a parametrization) or replaced since, the modules are called one after
the other, as they were before.

An activation is a module, or the name of one that was a function. A dropout is a module, the probability of one that
was a function, or None.
"""

from typing import Any

import torch
import torch.nn.functional
from torch import Tensor, nn

from .. import functional as F
from ..ops.linear import recomputed_linear
from .norms import BatchNorm, Norm, RowNorm
from .pointwise import named_activation
from .swap import rule_of
from .tracing import has_hooks

Act = nn.Module | str
Drop = nn.Module | float | None


def norm_act(norm: nn.Module, act: Act, input: Tensor) -> Tensor:
    """act(norm(input))."""
    rule, name = rule_of(norm), _name(act)
    if isinstance(rule, Norm) and name is not None and not has_hooks(norm):
        return rule.compute(norm, input, name)
    return activate(act, norm(input))


def norm_add_act(norm: nn.Module, act: Act, input: Tensor, residual: Tensor) -> Tensor:
    """act(norm(input) + residual), of a batch norm."""
    rule, name = rule_of(norm), _name(act)
    fits = isinstance(residual, Tensor) and residual.shape == input.shape and residual.dtype == input.dtype
    if isinstance(rule, BatchNorm) and name is not None and fits and not has_hooks(norm):
        return rule.compute_with_residual(norm, input, residual, name)
    return activate(act, norm(input) + residual)


def add_norm(norm: nn.Module, drop: Drop, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """residual + drop(input), and the row norm of it first."""
    rule, p = rule_of(norm), _probability(drop)
    fits = isinstance(residual, Tensor) and residual.shape == input.shape and residual.dtype == input.dtype
    if not isinstance(rule, RowNorm) or rule.channels_first or p is None or not fits or has_hooks(norm):
        total = residual + _dropped(drop, input)
        return norm(total), total
    promoted, shape, weight, bias, eps = rule.operands(norm, input)
    if promoted is not input:
        total = residual + _dropped(drop, input)
        return norm(total), total
    if rule.centered:
        return F.add_layer_norm(input, residual, shape, weight, bias, eps, dropout_p=p)
    return F.add_rms_norm(input, residual, shape, weight, eps, dropout_p=p, **rule.rms_options())


def modulated(norm: nn.Module, input: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """norm(input) * (1 + scale) + shift."""
    rule = rule_of(norm)
    fits = isinstance(rule, RowNorm) and not rule.channels_first and not rule.weight_offset and not has_hooks(norm)
    if fits and _modulates(scale, input) and _modulates(shift, input) and scale.shape == shift.shape:
        promoted, shape, weight, bias, eps = rule.operands(norm, input)
        if promoted is input and len(shape) == 1 and not (rule.cast_before_weight and weight is not None):
            if rule.centered:
                return F.modulated_layer_norm(input, scale, shift, shape, weight, bias, eps)
            return F.modulated_rms_norm(input, scale, shift, shape, weight, eps)
    return norm(input) * (1 + scale) + shift


def product(linear: nn.Module, input: Tensor) -> Tensor:
    """linear(input), of which whatever keeps it keeps a recipe that runs it again."""
    operands = _linear(linear)
    return linear(input) if operands is None else recomputed_linear(input, *operands)


def activate(act: Act, input: Tensor) -> Tensor:
    """act(input)."""
    return F.bias_act(input, activation=act) if isinstance(act, str) else act(input)


def act_drop(act: Act, drop: Drop, input: Tensor) -> Tensor:
    """drop(act(input))."""
    name, p = _name(act), _probability(drop)
    if name is None or p is None:
        return _dropped(drop, activate(act, input))
    return F.bias_act(input, activation=name, dropout_p=p)


def glu(act: Act, gate: Tensor, value: Tensor) -> Tensor:
    """act(gate) * value."""
    name = _name(act)
    fits = isinstance(value, Tensor) and value.shape == gate.shape and value.dtype == gate.dtype
    return F.glu(gate, value, activation=name) if name is not None and fits else activate(act, gate) * value


def packed_glu(act: Act, layout: str, input: Tensor) -> Tensor:
    """act(gate) * value, the halves of the input's last dimension."""
    name = _name(act)
    if name is not None and input.shape[-1] % 2 == 0:
        return F.packed_glu(input, activation=name, layout=layout)
    first, second = input.chunk(2, -1)
    return activate(act, first) * second if layout == "gate_first" else first * activate(act, second)


def mlp(first: nn.Module, act: Act, drop: Drop, last: nn.Module, recompute: str, input: Tensor) -> Tensor:
    """last(drop(act(first(input))))."""
    name, p = _name(act), _probability(drop)
    firsts, lasts = _linear(first), _linear(last)
    if name is None or p is None or firsts is None or lasts is None:
        return last(act_drop(act, drop, first(input)))
    return F.mlp(input, *firsts, *lasts, activation=name, dropout_p=p, recompute=recompute)


def gated_mlp(
    gate: nn.Module, value: nn.Module, act: Act, drop: Drop, last: nn.Module, recompute: str, input: Tensor
) -> Tensor:
    """last(drop(act(gate(input)) * value(input)))."""
    name, p = _name(act), _probability(drop)
    gates, values, lasts = _linear(gate), _linear(value), _linear(last)
    if name is None or p is None or gates is None or values is None or lasts is None:
        return last(_dropped(drop, glu(act, gate(input), value(input))))
    weights = {"gate_bias": gates[1], "value_bias": values[1], "bias": lasts[1]}
    options = {"activation": name, "dropout_p": p, "recompute": recompute}
    return F.gated_mlp(input, gates[0], values[0], lasts[0], **weights, **options)


def packed_mlp(
    packed: nn.Module, layout: str, act: Act, drop: Drop, last: nn.Module, recompute: str, input: Tensor
) -> Tensor:
    """last(drop(act(gate) * value)), gate and value the halves of packed(input)."""
    name, p = _name(act), _probability(drop)
    packs, lasts = _linear(packed), _linear(last)
    if name is None or p is None or packs is None or lasts is None:
        return last(_dropped(drop, packed_glu(act, layout, packed(input))))
    options = {"activation": name, "layout": layout, "dropout_p": p, "recompute": recompute}
    return F.gated_mlp(input, packs[0], None, lasts[0], gate_bias=packs[1], bias=lasts[1], **options)


def is_linear(module: nn.Module) -> bool:
    """Whether it computes what `torch.nn.Linear` does, or the same with its weight transposed (GPT-2's Conv1D)."""
    if isinstance(module, nn.Linear):
        return type(module).forward is nn.Linear.forward
    weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    shape = getattr(module, "nx", None), getattr(module, "nf", None)
    return weight is not None and bias is not None and tuple(weight.shape) == shape and bias.shape == shape[1:]


def _linear(module: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias as F.linear takes them, if there is nothing else to it."""
    if has_hooks(module) or not is_linear(module):
        return None
    return (module.weight, module.bias) if isinstance(module, nn.Linear) else (module.weight.t(), module.bias)


def _name(act: Act) -> str | None:
    if isinstance(act, str):
        return act
    return None if has_hooks(act) else named_activation(act)


def _probability(drop: Drop) -> float | None:
    if drop is None or isinstance(drop, float):
        return drop or 0.0
    if has_hooks(drop) or not isinstance(drop, nn.Dropout):
        return None
    return float(drop.p) if drop.training else 0.0


def _dropped(drop: Drop, input: Tensor) -> Any:
    if drop is None:
        return input
    return torch.nn.functional.dropout(input, drop) if isinstance(drop, float) else drop(input)


def _modulates(tensor: Any, input: Tensor) -> bool:
    """Whether it is one for each sample: (B, 1, N) or (B, T, N) beside an input (B, T, N), or (B, N) beside (B, N)."""
    if not isinstance(tensor, Tensor) or tensor.dim() != input.dim() or tensor.dtype != input.dtype:
        return False
    samples, lead = list(tensor.shape[:-1]), list(input.shape[:-1])
    while samples and samples[-1] == 1 and lead[len(samples) - 1] != 1:
        samples.pop()
    return tensor.shape[-1] == input.shape[-1] and samples == lead[: len(samples)]

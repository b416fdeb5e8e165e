"""Fused patterns: the expressions that one fused call replaces, each with the function that makes the call.

A function computes the whole expression, or has no effect and returns None, so that the original expression runs. For
the arguments see `templates`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ... import functional as F
from ... import ops
from ... import recompute as recomputing
from ...autocast import is_autocast
from ...functional.mlps import known_gated_mlp, known_mlp
from ...levels import discards_outputs
from ..attribute_loads import is_set
from ..code.code_objects import has_type
from ..rules.in_place import out_of_place
from ..rules.norms import Norm, RowNorm
from ..rules.pointwise import activated, has_halves
from .aliases import are_views_of_one_base
from .guards import are_chained, have_same_shape_dtype_device, is_per_sample, level_for_weights, share_gradient_need
from .templates import Pattern, Results, pattern

# The weight and bias of a linear layer.
Linear = tuple[Tensor, Tensor | None]
# Activations of which eager torch saves only the output, out of place and in place. Other activations in place save a
# clone of the input too.
_BY_RESULT = ("sigmoid", "tanh")
_BY_RESULT_IN_PLACE = ("relu", "leaky_relu", "elu")


@pattern("gated MLP", "last(may_drop(act(gate(input)) * value(input)))")
def gated_mlp(
    input: Tensor, gate: Linear, value: Linear, last: Linear, activation: str, p: float, recompute: str
) -> Results | None:
    if not share_gradient_need(input, gate, value):
        return None
    level = level_for_weights(recompute, gate, value)
    if (output := known_gated_mlp(input, gate, value, last, activation, p, level)) is not None:
        return [output]
    if not are_chained(input, gate, last) or value[0].shape != gate[0].shape:
        return None
    (w, b), (w2, b2), (w3, b3) = gate, value, last
    return [F.gated_mlp(input, w, w2, w3, b, b2, b3, activation=activation, dropout_p=p, recompute=level)]


@pattern("packed gated MLP", "last(may_drop(act(gate_half(packed(input))) * value_half(packed(input))))")
def packed_mlp(
    input: Tensor, packed: Linear, last: Linear, activation: str, p: float, layout: str, dim: int, recompute: str
) -> Results | None:
    if not are_chained(input, packed, last, 2) or dim not in (-1, input.dim() - 1):
        return None
    biases: dict[str, Any] = {"gate_bias": packed[1], "bias": last[1]}
    level = level_for_weights(recompute, packed)
    options: dict[str, Any] = {"activation": activation, "layout": layout, "recompute": level}
    return [F.gated_mlp(input, packed[0], None, last[0], **biases, **options, dropout_p=p)]


@pattern("MLP", "last(may_drop(act(first(input))))")
def mlp(
    input: Tensor, first: Linear, act: Any, last: Linear, activation: str, p: float, recompute: str
) -> Results | None:
    # The output that eager torch saves is saved by the last layer anyway.
    if not discards_outputs(recompute):
        in_place = has_type(act, nn.Module) and is_set(act, "inplace")
        if activation in (_BY_RESULT_IN_PLACE if in_place else _BY_RESULT):
            return None
    recompute = level_for_weights(recompute, first)
    if (output := known_mlp(input, first, last, activation, p, recompute)) is not None:
        return [output]
    if not are_chained(input, first, last):
        return None
    return [F.mlp(input, *first, *last, activation=activation, dropout_p=p, recompute=recompute)]


@pattern("norm, scale and shift", "norm(input) * (1 + view(scale)) + view(shift)")
def modulated(
    input: Tensor,
    scale: Tensor,
    shift: Tensor,
    norm: nn.Module,
    rule: Norm,
    scale_view: Callable[[Tensor], Tensor],
    shift_view: Callable[[Tensor], Tensor],
) -> Results | None:
    if not isinstance(rule, RowNorm) or rule.channels_first or rule.weight_offset or not rule.takes(norm, input):
        return None
    # Eager torch saves 1 + scale and nothing of shift, so that the user may write to both: the fused op gets copies.
    if torch.is_grad_enabled() and not (input.requires_grad and scale.requires_grad):
        return None
    scale, shift = scale_view(scale).clone(), shift_view(shift).clone()
    _, shape, weight, bias, eps = rule.operands(norm, input)
    if len(shape) != 1 or (rule.cast_before_weight and weight is not None):
        return None
    if not is_per_sample(scale, input) or not is_per_sample(shift, input) or scale.shape != shift.shape:
        return None
    if rule.centered:
        return [F.modulated_layer_norm(input, scale, shift, shape, weight, bias, eps)]
    return [F.modulated_rms_norm(input, scale, shift, shape, weight, eps)]


@pattern("norm, activation", "act(norm(input))")
def norm_act(input: Tensor, norm: nn.Module, rule: Norm, activation: str) -> Results | None:
    output = rule.compute(norm, input, activation)
    return None if output is None else [output]


@pattern("add, norm", "norm(left + may_drop(right))", total=False)
def add_norm(left: Tensor, right: Tensor, norm: nn.Module, rule: Norm, p: float, total: bool) -> Results | None:
    """The norm of the sum, and with `total` the sum too, which is used first."""
    if not isinstance(rule, RowNorm) or rule.channels_first:
        return None
    if not have_same_shape_dtype_device(left, right) or not rule.takes(norm, left):
        return None
    # The sum of operands without gradients needs no gradient.
    if torch.is_grad_enabled() and not (left.requires_grad or right.requires_grad):
        return None
    if not right.is_contiguous():
        return None
    _, shape, weight, bias, eps = rule.operands(norm, left)
    if rule.centered:
        results = F.add_layer_norm(right, left, shape, weight, bias, eps, dropout_p=p)
    else:
        results = F.add_rms_norm(right, left, shape, weight, eps, dropout_p=p, **rule.rms_options())
    return list(results) if total else [results[0]]


@pattern("packed gate", "act(gate_half(input)) * value_half(input)")
def packed_glu(input: Tensor, activation: str, layout: str, dim: int) -> Results | None:
    if not has_halves(input, dim):
        return None
    return [F.packed_glu(input, activation=activation, layout=layout)]


@pattern("gate of two products", "act(gate(input)) * value(input)")
def gated_products(input: Tensor, gate: Linear, value: Linear, activation: str) -> Results | None:
    if (
        gate[0].shape != value[0].shape
        or gate[0].shape[1] != input.shape[-1]
        or not share_gradient_need(input, gate, value)
    ):
        return None
    linear = ops.products.linear_of_torch
    return [F.glu(linear(input, *gate), linear(input, *value), activation=activation)]


@pattern("gate", "act(gate) * value", views=False)
def glu(gate: Tensor, value: Tensor, activation: str, views: bool) -> Results | None:
    """`views`: eager torch saves the value but not the gate, so that both must be views of one tensor."""
    if views and not are_views_of_one_base(gate, value):
        return None
    if not have_same_shape_dtype_device(gate, value) or (
        torch.is_grad_enabled() and not (gate.requires_grad and value.requires_grad)
    ):
        return None
    return [F.glu(gate, value, activation=activation)]


@pattern("activation, dropout", "drop(act(input))")
def act_drop(input: Tensor, activation: str, p: float) -> Results | None:
    return [F.bias_act(input, activation=activation, dropout_p=p)] if p else None


@pattern("activation of a product, out of place", "write(first(input))")
def written_over(input: Tensor, first: Linear, write: Any) -> Results | None:
    """Without gradients nothing is saved, and in place is better."""
    if not torch.is_grad_enabled() or not share_gradient_need(input, first) or first[0].shape[1] != input.shape[-1]:
        return None
    compute = out_of_place(write)
    return None if compute is None else [compute(ops.products.linear_of_torch(input, *first))]


@pattern("square, scale and shift", "scale * input ** 2 + shift")
def scaled_square(input: Tensor, scale: Tensor, shift: Tensor) -> Results | None:
    """As in StarReLU. Torch saves the squared tensor, from which a recipe recomputes the output.

    User code never sees the product `scale * input ** 2`.
    """
    if torch.compiler.is_compiling() or not recomputing.is_active() or is_autocast(input):
        return None
    if not (torch.is_grad_enabled() and input.requires_grad):
        return None
    if not (scale.is_leaf and scale.numel() == shift.numel() == 1 and scale.dim() <= 1 and shift.dim() <= 1):
        return None
    output = _scaled_square(input, scale, shift)
    # Torch does not save the shift, which may change before the backward pass: the recipe gets a copy.
    recomputing.record(output, (_scaled_square, (input, scale, shift.detach().clone())))
    return [output]


def _scaled_square(input: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return scale * input**2 + shift


@pattern("bias_act ({})", "formula(input)")
def formula(input: Tensor, activation: str) -> Results | None:
    return [activated(input, activation)]


# As they are defined above: larger patterns first.
PATTERNS = tuple(value for value in list(vars().values()) if isinstance(value, Pattern))

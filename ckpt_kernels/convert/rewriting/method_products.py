"""Products of a tensor and an activation that a method of the module computes, `value * self.gelu(gate)`.

The activation is known only once the method has run: it may choose by device or dtype. The fused gate then computes the
product from gate and value, so that the activation's output is not kept.
"""

import ast
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ... import functional as ours
from ..code.code_objects import names_in
from ..code.syntax_trees import is_name
from ..operands import is_operand
from ..rules.pointwise import activated_by
from .guards import have_same_shape_dtype_device
from .roles import ACTIVATING, Role

# The names of the functions whose replacements `activated_by` recognises.
_NAMES = frozenset(("gelu", "silu"))


def activating_roles(
    module: nn.Module, methods: Mapping[str, types.FunctionType], loads: Sequence[tuple[str, ast.expr]], self_name: str
) -> dict[str, Role]:
    """The roles of the module's own methods that may compute an activation, by the text of their loads."""
    roles = {}
    for text, load in loads:
        if not isinstance(load, ast.Attribute) or not is_name(load.value, (self_name,)) or load.attr in vars(module):
            continue
        method = methods.get(load.attr)
        if method is not None and not _NAMES.isdisjoint(names_in(method.__code__)):
            roles[text] = Role(ACTIVATING)
    return roles


def factors(tree: ast.AST, is_activating: Callable[[ast.expr], bool]) -> list[ast.expr] | None:
    """The value, the method and the gate of a product `value * self.gelu(gate)`, in evaluation order; None for any
    other expression."""
    if not isinstance(tree, ast.BinOp) or not isinstance(tree.op, ast.Mult) or not isinstance(tree.right, ast.Call):
        return None
    call = tree.right
    fits = len(call.args) == 1 and not call.keywords and not isinstance(call.args[0], ast.Starred)
    return [tree.left, call.func, call.args[0]] if fits and is_activating(call.func) else None


def product_with_method(compute: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """A function of the factors: by the fused gate where it computes the same, else by `compute`, the operator."""

    def call(value: Any, method: Callable[[Any], Any], gate: Any) -> Any:
        activated, name = activated_by(method, gate) if _may_be_fused(value, gate) else (method(gate), None)
        return compute(value, activated) if name is None else ours.glu(gate, value, activation=name)

    return call


def _may_be_fused(value: Any, gate: Any) -> bool:
    """Whether eager torch saves value and gate, and the fused gate takes both."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not (is_operand(value) and is_operand(gate)):
        return False
    are_plain = type(value) is Tensor and type(gate) is Tensor
    return are_plain and value.requires_grad and gate.requires_grad and have_same_shape_dtype_device(gate, value)

"""Guards before fused calls, checked in C where the library `_thin` is there (`csrc/thin/guards.cpp`), else in Python.

Guards are checked at each call, and nothing of one call is kept for the next. The C checks pass only where the Python
checks beside them pass (`guards.linear_operands`, `operands.is_called_plainly`, and `templates.guarded_call` for a
whole call site). Rare cases fail in C and are then checked in Python. Under torch.compile only the Python checks run,
and are traced.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..thin import direct

# A holder (a dict or any object), the name of an item or attribute, and the value.
Binding = tuple[Any, str, Any]
MISSING = object()

_is_compiling = torch.compiler.is_compiling


class ModuleGuard(NamedTuple):
    """The conditions on a module and on its class.

    Attributes:
        kind: the module is an instance of this class.
        class_attributes: names and values of attributes that the class has.
        same: bindings that still hold.
        undefined: names that neither the class nor its bases define.
        empty: names of dicts in the module's `__dict__` that are empty.
        absent: names that are not in the module's `__dict__`.
    """

    kind: type[nn.Module]
    class_attributes: tuple[tuple[str, Any], ...]
    same: tuple[Binding, ...]
    undefined: tuple[str, ...]
    empty: tuple[str, ...]
    absent: tuple[str, ...]


class GlobalStateGuard(NamedTuple):
    """The conditions under which nothing but autograd can observe or change a fused call.

    Attributes:
        inactive: functions that return false.
        same: bindings that still hold.
        absent: holders, and names that they do not contain.
        empty: dicts, and names under which they hold empty dicts.
    """

    inactive: tuple[Callable[[], Any], ...]
    same: tuple[Binding, ...]
    absent: tuple[tuple[Any, tuple[str, ...]], ...]
    empty: tuple[tuple[dict[str, Any], tuple[str, ...]], ...]


class ActivationGuard(NamedTuple):
    """The conditions under which a module computes the activation `name`: a guard, and values of plain settings."""

    module: ModuleGuard
    settings: tuple[tuple[str, Any], ...]
    name: str


# The attribute of a converted class that holds the `ActivationGuard` of its instances, or None.
ACTIVATION = "_ckpt_activation"


class SiteGuard(NamedTuple):
    """The conditions on the operands of a call site.

    Attributes:
        state: the condition on global state.
        owner: the condition on the first value, where operands are attributes of that module.
        linear: the condition on linear layers.
        activations: functions and classes, each with the name of the activation or with an `ActivationGuard`. A class
            may have a guard of its own, under `ACTIVATION`.
        wanted: the operands. Each is a place among the values, or the name of an attribute of the first value, and a
            letter for the kind of operand: "t", an ordinary tensor of at most 32 bits an element; "l", a linear layer
            that passes `linear` and reads the first of these tensors; "a", an activation; "o", any object.
    """

    state: GlobalStateGuard
    owner: ModuleGuard
    linear: ModuleGuard
    activations: tuple[tuple[Any, str | ActivationGuard], ...]
    wanted: tuple[tuple[int | str, str], ...]

    def native_check(self) -> Callable[..., tuple | None] | None:
        """The check in C, a function of the values; None without the library.

        The function returns the operands, with weight and bias in place of a linear layer and the name in place of an
        activation, or None where any condition may not hold.
        """
        return None if direct.thin_module is None else functools.partial(direct.thin_module.operands, *self)


def are_same(bindings: tuple[Binding, ...]) -> bool:
    """Whether each holder still has the value under the name."""
    return _are_same_in_python(bindings) if _is_compiling() else are_same_untraced(bindings)


def are_same_untraced(bindings: tuple[Binding, ...]) -> bool:
    """`are_same` for callers that no compiler traces."""
    library = direct.thin_module
    return _are_same_in_python(bindings) if library is None else library.are_same(bindings, MISSING)


def _are_same_in_python(bindings: tuple[Binding, ...]) -> bool:
    for holder, name, value in bindings:
        now = holder.get(name, MISSING) if type(holder) is dict else getattr(holder, name, MISSING)
        if now is not value:
            return False
    return True


def native_same_check(bindings: tuple[Binding, ...]) -> Callable[[], bool]:
    """`are_same` as a function without arguments, for callers that no compiler traces."""
    if direct.thin_module is None:
        return functools.partial(are_same, bindings)
    return functools.partial(direct.thin_module.are_same, bindings, MISSING)


def passes_natively(module: Any, guard: ModuleGuard) -> bool:
    """Whether the module passes the guard, by the check in C; False where that cannot tell."""
    return not (direct.thin_module is None or _is_compiling()) and direct.thin_module.is_such(module, guard)


def linear_parameters_natively(
    modules: Iterable[Any], guard: ModuleGuard, input: Tensor
) -> list[tuple[Tensor, Tensor | None]] | None:
    """Weights and biases of linear layers that pass the guard, with the input's dtype and device; None where the check
    in C cannot tell."""
    if direct.thin_module is None or _is_compiling():
        return None
    return direct.thin_module.plain_linears(guard, input, *modules)

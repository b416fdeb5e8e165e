"""What is asked of code, modules and tensors at each call, in C where `_thin` is there (`csrc/thin/guards.cpp`).

Nothing is remembered from one call to the next: the same is asked again, of what is there then. C only ever says yes
where the Python beside it does (`guards.linear_operands`, `operands.is_called_plainly`, of a whole site
`templates.site`); else that is asked, with what is rare. A compiler sees none of it, and traces the Python.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..thin import direct

# What holds something, a dict or an object; under which name; and what.
Binding = tuple[Any, str, Any]
MISSING = object()

_is_compiling = torch.compiler.is_compiling


class ModuleGuard(NamedTuple):
    """What a module has to be: of a class, or one below it, which has these attributes, where all of `same` still is
    what it was, and that and what it inherits has nothing under the names `inherited` itself. Of its own it has dicts
    with nothing in them under the names `empty`, and nothing under the names `absent`."""

    kind: type[nn.Module]
    of_class: tuple[tuple[str, Any], ...]
    same: tuple[Binding, ...]
    inherited: tuple[str, ...]
    empty: tuple[str, ...]
    absent: tuple[str, ...]


class GlobalStateGuard(NamedTuple):
    """What must be so for nobody but autograd to see or change what a site does: the functions `still` give what is
    false, all of `same` is what it was, and under the names there is nothing in the holders `without`, and an empty
    dict in the dicts `empty`."""

    still: tuple[Callable[[], Any], ...]
    same: tuple[Binding, ...]
    without: tuple[tuple[Any, tuple[str, ...]], ...]
    empty: tuple[tuple[dict[str, Any], tuple[str, ...]], ...]


class ActivationGuard(NamedTuple):
    """What an activation has to be to have a name: such a module, with these settings."""

    such: ModuleGuard
    settings: tuple[tuple[str, Any], ...]
    name: str


# Under this name a converted class has the `Activation` that its modules are, or None.
ACTIVATION = "_ckpt_activation"


class SiteGuard(NamedTuple):
    """What is asked of the values at a site. Each of `wanted` is the place of a value, or the name of an attribute of
    the first value, a module that is such an `owner`; and a letter: "t" of an ordinary tensor of at most 32 bits an
    element, "l" of a linear layer that is such a `linear` and reads the first of these tensors, "a" of an activation,
    and "o" of any object.

    The answer has weight and bias in the place of the layer, and the name in that of the activation: what
    `activations` have for the function or the class, or the class itself has under `ACTIVATION`.
    """

    quiet: GlobalStateGuard
    owner: ModuleGuard
    linear: ModuleGuard
    activations: tuple[tuple[Any, str | ActivationGuard], ...]
    wanted: tuple[tuple[int | str, str], ...]

    def native_check(self) -> Callable[..., tuple | None] | None:
        """The function that C answers by, of the values: None, where something may be other than it was."""
        return None if direct.asked is None else functools.partial(direct.asked.operands, *self)


def are_same(found: tuple[Binding, ...]) -> bool:
    """Whether each holder still has what it had."""
    return _are_the_same(found) if _is_compiling() else are_same_untraced(found)


def are_same_untraced(found: tuple[Binding, ...]) -> bool:
    """The same, for whoever knows that no compiler traces the call."""
    asked = direct.asked
    return _are_the_same(found) if asked is None else asked.are_same(found, MISSING)


def _are_the_same(found: tuple[Binding, ...]) -> bool:
    for holder, name, value in found:
        now = holder.get(name, MISSING) if type(holder) is dict else getattr(holder, name, MISSING)
        if now is not value:
            return False
    return True


def native_same_check(found: tuple[Binding, ...]) -> Callable[[], bool]:
    """The same as a function of nothing, which no compiler is to see."""
    if direct.asked is None:
        return functools.partial(are_same, found)
    return functools.partial(direct.asked.are_same, found, MISSING)


def passes_natively(module: Any, such: ModuleGuard) -> bool:
    """Whether C knows the module for such a one."""
    return not (direct.asked is None or _is_compiling()) and direct.asked.is_such(module, such)


def linear_parameters_natively(
    modules: Iterable[Any], such: ModuleGuard, input: Tensor
) -> list[tuple[Tensor, Tensor | None]] | None:
    """Weights and biases of linear layers that are such ones, and that read an input of their dtype on their device."""
    if direct.asked is None or _is_compiling():
        return None
    return direct.asked.plain_linears(such, input, *modules)

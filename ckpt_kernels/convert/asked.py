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
Found = tuple[Any, str, Any]
MISSING = object()

_is_compiling = torch.compiler.is_compiling


class Such(NamedTuple):
    """What a module has to be: of a class, or one below it, which has these attributes, where all of `same` still is
    what it was, and that and what it inherits has nothing under the names `inherited` itself. Of its own it has dicts
    with nothing in them under the names `empty`, and nothing under the names `absent`."""

    kind: type[nn.Module]
    of_class: tuple[tuple[str, Any], ...]
    same: tuple[Found, ...]
    inherited: tuple[str, ...]
    empty: tuple[str, ...]
    absent: tuple[str, ...]


class Quiet(NamedTuple):
    """What must be so for nobody but autograd to see or change what a site does: the functions `still` give what is
    false, all of `same` is what it was, and under the names there is nothing in the holders `without`, and an empty
    dict in the dicts `empty`."""

    still: tuple[Callable[[], Any], ...]
    same: tuple[Found, ...]
    without: tuple[tuple[Any, tuple[str, ...]], ...]
    empty: tuple[tuple[dict[str, Any], tuple[str, ...]], ...]


class Activation(NamedTuple):
    """What an activation has to be to have a name: such a module, with these settings."""

    such: Such
    settings: tuple[tuple[str, Any], ...]
    name: str


# Under this name a converted class has the `Activation` that its modules are, or None.
ACTIVATION = "_ckpt_activation"


class Site(NamedTuple):
    """What is asked of the values at a site. Each of `wanted` is the place of a value, or the name of an attribute of
    the first value, a module that is such an `owner`; and a letter: "t" of an ordinary tensor of at most 32 bits an
    element, "l" of a linear layer that is such a `linear` and reads the first of these tensors, "a" of an activation,
    and "o" of any object.

    The answer has weight and bias in the place of the layer, and the name in that of the activation: what
    `activations` have for the function or the class, or the class itself has under `ACTIVATION`.
    """

    quiet: Quiet
    owner: Such
    linear: Such
    activations: tuple[tuple[Any, str | Activation], ...]
    wanted: tuple[tuple[int | str, str], ...]

    def asker(self) -> Callable[..., tuple | None] | None:
        """The function that C answers by, of the values: None, where something may be other than it was."""
        return None if direct.asked is None else functools.partial(direct.asked.operands, *self)


def are_same(found: tuple[Found, ...]) -> bool:
    """Whether each holder still has what it had."""
    return _are_the_same(found) if _is_compiling() else are_same_untraced(found)


def are_same_untraced(found: tuple[Found, ...]) -> bool:
    """The same, for whoever knows that no compiler traces the call."""
    asked = direct.asked
    return _are_the_same(found) if asked is None else asked.are_same(found, MISSING)


def _are_the_same(found: tuple[Found, ...]) -> bool:
    for holder, name, value in found:
        now = holder.get(name, MISSING) if type(holder) is dict else getattr(holder, name, MISSING)
        if now is not value:
            return False
    return True


def surely_same(found: tuple[Found, ...]) -> Callable[[], bool]:
    """The same as a function of nothing, which no compiler is to see."""
    if direct.asked is None:
        return functools.partial(are_same, found)
    return functools.partial(direct.asked.are_same, found, MISSING)


def is_surely(module: Any, such: Such) -> bool:
    """Whether C knows the module for such a one."""
    return not (direct.asked is None or _is_compiling()) and direct.asked.is_such(module, such)


def linears_surely(modules: Iterable[Any], such: Such, input: Tensor) -> list[tuple[Tensor, Tensor | None]] | None:
    """Weights and biases of linear layers that are such ones, and that read an input of their dtype on their device."""
    if direct.asked is None or _is_compiling():
        return None
    return direct.asked.plain_linears(such, input, *modules)

"""What is asked of code, modules and tensors at each call, in C where `_thin` is there (`csrc/thin/guards.cpp`).

Nothing is remembered from one call to the next: the same is asked again, of what is there then. C only ever says yes
where the Python beside it does (`guards.linear_operands`, `operands.is_called_plainly`); else that is asked, with what
is rare. A compiler sees none of it, and traces the Python.
"""

from collections.abc import Iterable
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


def is_surely(module: Any, such: Such) -> bool:
    """Whether C knows the module for such a one."""
    return not (direct.asked is None or _is_compiling()) and direct.asked.is_such(module, such)


def linears_surely(modules: Iterable[Any], such: Such, input: Tensor) -> list[tuple[Tensor, Tensor | None]] | None:
    """Weights and biases of linear layers that are such ones, and that read an input of their dtype on their device."""
    if direct.asked is None or _is_compiling():
        return None
    return direct.asked.plain_linears(such, input, *modules)

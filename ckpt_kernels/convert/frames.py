"""Whether the names and the frame of a function are nobody's affair but its own, so that it may be made anew."""

import types
from typing import Any

from .called import is_a, is_torchs, names_in

# Of the names that are new in a function.
PREFIX = "_ckpt_kernels_"
# A function that looks at its own frame sees what it is made of.
_LOOKS = frozenset(("locals", "vars", "eval", "exec", "dir", "_getframe", "currentframe", "stack"))
_LOOKS_OUT = frozenset(("_getframe", "currentframe", "f_back", "f_locals"))
_RESUMED = 0x20 | 0x80 | 0x100 | 0x200  # generators and coroutines


def may_be_rewritten(function: types.FunctionType) -> bool:
    """Whether what is in its frame is nobody's affair but its own, and the new names are new."""
    code = function.__code__
    names = {*code.co_names, *code.co_varnames, *code.co_cellvars, *code.co_freevars}
    if any(name.startswith(PREFIX) for name in names):
        return False
    called = (function.__globals__.get(name) for name in code.co_names)
    return not (_LOOKS & names or code.co_flags & _RESUMED or any(map(_looks_out, called)))


def _looks_out(function: Any) -> bool:
    """Whether a function looks at the frame that calls it."""
    if not is_a(function, types.FunctionType) or is_torchs(function):
        return False
    names = names_in(function.__code__)
    return bool(_LOOKS_OUT & names) or {"inspect", "stack"} <= names

"""A model and inputs for the model: as (args, kwargs), as tensors, or as a MODULE:CALLABLE of the command line."""

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

Inputs = tuple[Any, ...] | Mapping[str, Any]

EXPECTED = (
    "expected (model, inputs): a torch.nn.Module, and what it is called with, which is a tensor, a tuple of several "
    "inputs, or a dict of them by name"
)


class TargetError(Exception):
    """A MODULE:CALLABLE that does not give a model and inputs. The text says why, with a traceback if the user's code
    failed."""


def arguments_of(inputs: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """(args, kwargs) of a call with `inputs`: a tuple of several, a mapping by name, or else a single input."""
    if isinstance(inputs, Mapping):
        return (), inputs
    # A list is one input, of a detector for example, as in `convert`.
    return inputs if isinstance(inputs, tuple) else (inputs,), {}


def load_target(target: str) -> tuple[nn.Module, Inputs]:
    """Calls `target`, MODULE:CALLABLE. Returns the model and the inputs, a tuple or a mapping. Raises TargetError."""
    function = _load_callable(target)
    if isinstance(function, nn.Module):
        raise TargetError(f"{target} is a model, {type(function).__name__}, not a function that gives one; {EXPECTED}")
    if not _takes_no_arguments(function):
        raise TargetError(f"{target} takes arguments, {inspect.signature(function)}; expected a function without any")
    try:
        result = function()
    except KeyboardInterrupt:
        raise
    # Even SystemExit: a call of sys.exit would end the command as if it had succeeded.
    except BaseException as error:
        raise TargetError(_user_traceback(f"{target}() failed, in its own code", error)) from error
    if isinstance(result, nn.Module):
        raise TargetError(f"{target}() gives only a model, {type(result).__name__}; {EXPECTED}")
    if not isinstance(result, tuple | list) or len(result) != 2:
        count = f" of {len(result)}" if isinstance(result, tuple | list) else ""
        raise TargetError(f"{target}() gives a {type(result).__name__}{count}; {EXPECTED}")
    model, inputs = result
    if not isinstance(model, nn.Module):
        raise TargetError(f"{target}() gives a {type(model).__name__} for its model; {EXPECTED}")
    lazy = UninitializedParameter | UninitializedBuffer
    if any(isinstance(tensor, lazy) for tensor in (*model.parameters(), *model.buffers())):
        raise TargetError(f"{target}() gives a model with lazy parameters; call the model once on its inputs before")
    if isinstance(inputs, Mapping):
        return model, inputs
    if isinstance(inputs, Tensor | list | tuple):
        return model, arguments_of(inputs)[0]
    raise TargetError(f"{target}() gives a {type(inputs).__name__} for its inputs; {EXPECTED}")


def _load_callable(target: str) -> Any:
    """The callable that MODULE:CALLABLE names. Modules are also looked for in the current folder."""
    module, colon, name = target.partition(":")
    if not (module and colon and name):
        raise TargetError(f"the target is {target!r}; expected MODULE:CALLABLE, as in my_module:my_function")
    if module.startswith(".") or os.sep in module:
        raise TargetError(f"{target}: {module!r} is no name of a module; expected names with dots between them")
    sys.path.insert(0, os.getcwd())
    try:
        imported = importlib.import_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and (module == missing or module.startswith(f"{missing}.")):
            raise TargetError(f"{target}: there is no module {missing!r} here or in Python's path") from error
        raise TargetError(
            _user_traceback(f"{target}: the import of {module} failed, in its own code", error)
        ) from error
    function = getattr(imported, name, None)
    if not callable(function):
        what = f"no {name!r}" if function is None else f"a {type(function).__name__} {name!r}, not a function"
        raise TargetError(f"{target}: {module} has {what}")
    return function


def _takes_no_arguments(function: Any) -> bool:
    """Whether a function can be called without arguments."""
    try:
        inspect.signature(function).bind()
        return True
    except TypeError:
        return False
    except ValueError:  # There is no signature to inspect: only a call can tell.
        return True


def _user_traceback(what: str, error: BaseException) -> str:
    """The traceback of the user's frames, followed by `what` failed."""
    trace = error.__traceback__.tb_next if error.__traceback__ else None
    lines = traceback.format_exception(type(error), error, trace)
    return f"{''.join(lines)}\n{what}: {type(error).__name__}: {error}"

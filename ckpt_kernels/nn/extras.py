"""Helpers that the modules share: checks and text of settings, reads of parameters, and calls in torch.fx graphs."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy, Tracer

from ..arguments import size
from ..functional.checks import normalized


def extras(**settings: tuple[object, object]) -> str:
    """Text ", name=value" for each setting that differs from its default, given as name=(value, default)."""
    return "".join(f", {name}={value!r}" for name, (value, default) in settings.items() if value != default)


def row_shape(normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    """The shape of the normalised rows; TypeError or ValueError unless these are sizes."""
    return tuple([size(each, "normalized_shape") for each in normalized(normalized_shape)])


_search, _search_of_objects = nn.Module.__getattr__, object.__getattribute__
_kept_namespaces: dict[type, tuple[Mapping[str, Any], ...]] = {}


def weight_and_bias(module: Any) -> tuple[Tensor | None, Tensor | None]:
    """The attributes `weight` and `bias` of a module.

    Torch's search for an attribute costs as much as a small kernel. So both are read from the registered parameters,
    unless an attribute of the module or of a class replaces them. Classes may change at any time, so every call checks.
    """
    kind: Any = type(module)
    own = module.__dict__
    if (
        not torch.compiler.is_compiling()
        and kind.__getattr__ is _search
        and kind.__getattribute__ is _search_of_objects
        and not ("weight" in own or "bias" in own)
    ):
        for names in _kept_namespaces.get(kind) or _namespaces(kind):
            if "weight" in names or "bias" in names:
                break
        else:
            registered = module._parameters
            try:
                return registered["weight"], registered["bias"]
            except KeyError:
                pass
    return module.weight, module.bias


def _namespaces(kind: type) -> tuple[Mapping[str, Any], ...]:
    """The namespaces of a class and its bases, which show later changes of these classes.

    They are cached for the classes of this package only. A cache would keep other classes alive.
    """
    found = tuple([base.__dict__ for base in kind.__mro__])
    if kind.__module__.startswith(f"{__package__}.") and "<locals>" not in kind.__qualname__:
        _kept_namespaces[kind] = found
    return found


def recorded(module: nn.Module, *inputs: Any) -> Proxy | None:
    """Record the module's call as one node of the torch.fx graph, as torch.fx records calls of torch.nn's modules.

    The node follows later changes of the training mode and of running statistics. A call of a function with the
    module's parameters would not. None if this module is the one that is traced.
    """
    tracer = inputs[0].tracer
    if not isinstance(tracer, Tracer) or tracer.root is module:
        return None
    return tracer.create_proxy("call_module", tracer.path_of_module(module), inputs, {})

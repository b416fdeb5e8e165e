"""What the modules share: settings checked, and settings told, and how torch.fx sees a module."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy, Tracer


def extras(**settings: tuple[object, object]) -> str:
    """ ", name=value" for every setting that is not at its default."""
    return "".join(f", {name}={value!r}" for name, (value, default) in settings.items() if value != default)


_search, _search_of_objects = nn.Module.__getattr__, object.__getattribute__
_kept_namespaces: dict[type, tuple[Mapping[str, Any], ...]] = {}


def weight_and_bias(module: Any) -> tuple[Tensor | None, Tensor | None]:
    """Both parameters, without torch's search for an attribute, which costs as much as a small kernel.

    From where they are registered; whatever puts something in their place takes them from there, or lays it over them
    in the module's own attributes, or in its class, which may change at any time.
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
    """What a class and its bases define, as it is at any time.

    Kept for the classes of this package, which live as long as the process does; others would be kept alive.
    """
    found = tuple([base.__dict__ for base in kind.__mro__])
    if kind.__module__.startswith(f"{__package__}.") and "<locals>" not in kind.__qualname__:
        _kept_namespaces[kind] = found
    return found


def recorded(module: nn.Module, *inputs: Any) -> Proxy | None:
    """The module's call as one node of the graph that torch.fx makes, as is a call of torch.nn's modules.

    So it follows the module's training mode and statistics, which functions of its parameters would not. None for the
    module that is traced itself.
    """
    tracer = inputs[0].tracer
    if not isinstance(tracer, Tracer) or tracer.root is module:
        return None
    return tracer.create_proxy("call_module", tracer.path_of_module(module), inputs, {})

"""What the modules share: settings checked, and settings told, and how torch.fx sees a module."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy, Tracer


def extras(**settings: tuple[object, object]) -> str:
    """ ", name=value" for every setting that is not at its default."""
    return "".join(f", {name}={value!r}" for name, (value, default) in settings.items() if value != default)


def probability(dropout: float) -> float:
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout is {dropout}; expected a probability between 0 and 1")
    return dropout


def weight_and_bias(module: Any) -> tuple[Tensor | None, Tensor | None]:
    """Both parameters, without torch's search for an attribute, which costs as much as a small kernel.

    From where they are registered; whatever puts something in their place takes them from there, or lays it over them
    in the module's own attributes.
    """
    own = module.__dict__
    if (
        not torch.compiler.is_compiling()
        and _searches_as_torch(type(module))
        and not ("weight" in own or "bias" in own)
    ):
        registered = module._parameters
        try:
            return registered["weight"], registered["bias"]
        except KeyError:
            pass
    return module.weight, module.bias


_search, _search_of_objects = nn.Module.__getattr__, object.__getattribute__
# What the classes of this package and their bases define, as it is at any time. These classes live as long as the
# process; of others nothing is remembered, which would keep them alive.
_namespaces: dict[type, tuple[Mapping[str, Any], ...]] = {}


def _searches_as_torch(kind: Any) -> bool:
    """Whether a module of this class finds its weight and bias the way that torch's modules find a parameter.

    Asked at each call: a class may be given a property later on.
    """
    if kind.__getattr__ is not _search or kind.__getattribute__ is not _search_of_objects:
        return False
    namespaces = _namespaces.get(kind)
    if namespaces is None:
        if kind.__module__.startswith(__package__) and "<locals>" not in kind.__qualname__:
            _namespaces[kind] = tuple([base.__dict__ for base in kind.__mro__])
        return not (hasattr(kind, "weight") or hasattr(kind, "bias"))
    for names in namespaces:
        if "weight" in names or "bias" in names:
            return False
    return True


def recorded(module: nn.Module, *inputs: Any) -> Proxy | None:
    """The module's call as one node of the graph that torch.fx makes, as is a call of torch.nn's modules.

    So it follows the module's training mode and statistics, which functions of its parameters would not. None for the
    module that is traced itself.
    """
    tracer = inputs[0].tracer
    if not isinstance(tracer, Tracer) or tracer.root is module:
        return None
    return tracer.create_proxy("call_module", tracer.path_of_module(module), inputs, {})

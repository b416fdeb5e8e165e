"""What the modules share: settings checked, and settings told, and how torch.fx sees a module."""

from typing import Any

from torch import nn
from torch.fx import Proxy, Tracer


def extras(**settings: tuple[object, object]) -> str:
    """ ", name=value" for every setting that is not at its default."""
    return "".join(f", {name}={value!r}" for name, (value, default) in settings.items() if value != default)


def probability(dropout: float) -> float:
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout is {dropout}; expected a probability between 0 and 1")
    return dropout


def recorded(module: nn.Module, *inputs: Any) -> Proxy | None:
    """The module's call as one node of the graph that torch.fx makes, as is a call of torch.nn's modules.

    So it follows the module's training mode and statistics, which functions of its parameters would not. None for the
    module that is traced itself.
    """
    tracer = inputs[0].tracer
    if not isinstance(tracer, Tracer) or tracer.root is module:
        return None
    return tracer.create_proxy("call_module", tracer.path_of_module(module), inputs, {})

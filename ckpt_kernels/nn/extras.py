"""What the modules share: settings checked, and settings told, and how torch.fx sees a module."""

import functools
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
    kind: Any = type(module)
    own = module.__dict__
    if not torch.compiler.is_compiling() and _has_plain_parameters(kind) and not ("weight" in own or "bias" in own):
        registered = module._parameters
        try:
            return registered["weight"], registered["bias"]
        except KeyError:
            pass
    return module.weight, module.bias


@functools.lru_cache(maxsize=1024)
def _has_plain_parameters(kind: Any) -> bool:
    """Whether a module of this class finds its weight and bias the way that torch's modules find a parameter."""
    return kind.__getattr__ is nn.Module.__getattr__ and not any(hasattr(kind, name) for name in ("weight", "bias"))


def recorded(module: nn.Module, *inputs: Any) -> Proxy | None:
    """The module's call as one node of the graph that torch.fx makes, as is a call of torch.nn's modules.

    So it follows the module's training mode and statistics, which functions of its parameters would not. None for the
    module that is traced itself.
    """
    tracer = inputs[0].tracer
    if not isinstance(tracer, Tracer) or tracer.root is module:
        return None
    return tracer.create_proxy("call_module", tracer.path_of_module(module), inputs, {})

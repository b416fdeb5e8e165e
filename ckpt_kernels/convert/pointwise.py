"""Which activations and dropouts a module computes.

torch.nn's activations are known by their type. Any other module without parameters and modules of its own is tried
out in float64, where two formulas for one activation agree.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from ..activations import NAMES, activation_name
from ..backends.reference import ACTIVATIONS
from .swap import Rule, Unary, rule_of

# A Linear or a convolution keeps the output of these and their own gradient needs no more: nothing to win.
KEPT_BY_OUTPUT = ("identity", "relu", "leaky_relu")


@dataclass(frozen=True)
class ActivationRule(Unary):
    """An activation by its name, as long as the module's settings are what they were."""

    name: str
    settings: tuple[tuple[str, Any], ...]

    def of(self, module: nn.Module, input: Tensor) -> Tensor:
        if not self.holds(module):
            return module.original.forward(module, input)
        return F.bias_act(input, activation=self.name)

    def holds(self, module: nn.Module) -> bool:
        return all(getattr(module, key) == value for key, value in self.settings)

    def __str__(self) -> str:
        return f"bias_act ({self.name})"


@dataclass(frozen=True)
class DropoutRule(Unary):
    """`torch.nn.Dropout`, of which no mask is kept. Its random numbers are not those that torch's would draw."""

    def of(self, module: nn.Module, input: Tensor) -> Tensor:
        if module.p == 0.0 or not module.training:
            return input
        return F.bias_act(input, dropout_p=module.p)

    def __str__(self) -> str:
        return "bias_act (dropout)"


def pointwise_of(module: nn.Module) -> Rule | None:
    """How an activation or a dropout is to be converted; None for what is neither, or has nothing to win."""
    if type(module) is nn.Dropout:
        return None if module.inplace else DropoutRule()
    if getattr(module, "inplace", False):
        return None
    name = named_activation(module)
    if name is None or name in KEPT_BY_OUTPUT:
        return None
    settings = {k: v for k, v in vars(module).items() if type(v) in (bool, int, float, str) and k != "training"}
    return ActivationRule(name, tuple(settings.items()))


def named_activation(module: nn.Module) -> str | None:
    """The name of the activation that a module computes, converted or not; None if it is none of ours."""
    rule = rule_of(module)
    if isinstance(rule, ActivationRule):
        return rule.name if rule.holds(module) else None
    if type(module).__module__.startswith("torch.nn.modules."):
        try:
            return activation_name(module)
        except ValueError:
            return None
    if next(module.parameters(), None) is not None or next(module.children(), None) is not None:
        return None
    return _tried_out(module) if "act" in _words(module) or "lu" in _words(module) else None


def _words(module: nn.Module) -> str:
    return type(module).__name__.lower()


def _tried_out(module: nn.Module) -> str | None:
    points = torch.linspace(-12, 12, 2403, dtype=torch.float64)
    training = module.training
    try:
        with torch.no_grad():
            values = type(module).forward(module, points.clone())
    except Exception:
        return None
    if not isinstance(values, Tensor) or values.shape != points.shape or module.training != training:
        return None
    # Formulas with rounded constants differ by less than float32 can tell.
    close = [name for name in NAMES if torch.allclose(values, ACTIVATIONS[name](points), rtol=1e-7, atol=1e-7)]
    return close[0] if close else None

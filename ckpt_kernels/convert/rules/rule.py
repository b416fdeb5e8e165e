"""Rules: how a converted module computes instead of by the methods of the original class."""

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..native_guards import ActivationGuard, Binding
from ..operands import as_plain_tensor, is_operand

Forward = Callable[..., Any]


class Rule(abc.ABC):
    """Replacements for some methods of a class. A rule is hashable and picklable.

    `description` says, for people, what the module computes with.
    """

    description = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the methods that the rule replaces."""
        return ("forward",)

    @abc.abstractmethod
    def methods(self, original: type[nn.Module]) -> Mapping[str, Forward]:
        """The replacements by name, for a class `original`. Each takes the module as its first argument."""

    def activation_guard(self, bindings: tuple[Binding, ...]) -> ActivationGuard | None:
        """The guard under which converted modules compute an activation; None where they compute anything else.

        `bindings` are the conditions under which the class and the forward are unchanged.
        """
        return None

    def __str__(self) -> str:
        return self.description


class UnaryRule(Rule):
    """A rule for modules that compute a function of one tensor.

    The original forward runs for any other arguments, and for tensors that the fused functions do not take.
    """

    def methods(self, original: type[nn.Module]) -> Mapping[str, Forward]:
        def forward(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
            # A parametrization that was added since computes the weight at each load.
            if len(args) == 1 and not kwargs and "parametrizations" not in module._modules:
                output = self.by_plan(module, args[0])
                if output is not None:
                    return output
                input, kind = as_plain_tensor(args[0])
                output = self.apply(module, input) if is_operand(input) else None
                if output is not None:
                    return output if kind is None else output.as_subclass(kind)
            return original.forward(module, *args, **kwargs)

        return {"forward": forward}

    def by_plan(self, module: nn.Module, input: Any) -> Tensor | None:
        """The output by the plan of an earlier call (see `thin`), without further checks; None if there is none, or if
        more has to be checked than the plan's key contains."""
        return None

    @abc.abstractmethod
    def apply(self, module: nn.Module, input: Tensor) -> Tensor | None:
        """The output; None where the original forward must compute the output."""


@dataclass(frozen=True)
class ContextOnly(Rule):
    """A rule that replaces nothing, for modules that are converted only to put contexts around the forward."""

    description = "forward pass within discard_outputs"

    def methods(self, original: type[nn.Module]) -> Mapping[str, Forward]:
        return {}

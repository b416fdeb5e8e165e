"""What a converted module computes in the place of its class's methods."""

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..native_guards import ActivationGuard, Binding
from ..operands import as_plain_tensor, is_operand

Forward = Callable[..., Any]


class Rule(abc.ABC):
    """What a converted module computes in place of its original's methods, `names`. Hashable and picklable."""

    @property
    def names(self) -> tuple[str, ...]:
        return ("forward",)

    @abc.abstractmethod
    def methods(self, original: type[nn.Module]) -> Mapping[str, Forward]:
        """What takes the place of these methods; each takes the module first."""

    def activation_guard(self, asked: tuple[Binding, ...]) -> ActivationGuard | None:
        """What its modules are, where that is an activation; `asked` is what their class and its forward have to be."""
        return None

    def __str__(self) -> str:
        return type(self).__name__


class UnaryRule(Rule):
    """What a module computes of one tensor. Called in another way, or with a tensor of another kind than our functions
    take, its original forward runs."""

    def methods(self, original: type[nn.Module]) -> Mapping[str, Forward]:
        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            # Where it was parametrized since, each load of its weight computes it.
            if len(args) == 1 and not kwargs and "parametrizations" not in module._modules:
                input, kind = as_plain_tensor(args[0])
                output = self.apply(module, input) if is_operand(input) else None
                if output is not None:
                    return output if kind is None else output.as_subclass(kind)
            return original.forward(module, *args, **kwargs)

        return {"forward": forward}

    @abc.abstractmethod
    def apply(self, module: nn.Module, input: Tensor) -> Tensor | None:
        """The output, or None where the original has to compute it."""


@dataclass(frozen=True)
class ContextOnly(Rule):
    """The original's methods, for modules that are converted for nothing but what is around their forward."""

    def methods(self, original: type[nn.Module]) -> Mapping[str, Forward]:
        return {}

    def __str__(self) -> str:
        return "forward pass within discard_outputs"

"""How a module is converted and stays the module it was: its class is exchanged for a subclass with another forward.

So whoever holds the module keeps holding it, and its parameters, buffers, hooks, names, training mode and attributes
are not touched. The subclass bears the original's name, prints like it, is an instance of it, and is pickled as what
makes it again.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..recompute import discard_outputs

# What a converted module has in its __dict__ beyond what it had: its rule.
ATTRIBUTE = "_ckpt_rule"


class Rule:
    """What a converted module computes in place of its original's methods. Picklable.

    `methods` names what is replaced; each is called as `rule.call(method, module, *args, **kwargs)`.
    """

    methods: tuple[str, ...] = ("forward",)

    def call(self, method: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def __str__(self) -> str:
        return type(self).__name__


class Within(Rule):
    """The original's forward, for modules that are converted for nothing but to run within `discard_outputs`."""

    methods = ()

    def __str__(self) -> str:
        return "forward pass within discard_outputs"


class Converted:
    """The first base of every converted module's class. `original` is the class that it was of."""

    original: type[nn.Module]
    discards: bool

    def __reduce_ex__(self, protocol: int) -> tuple:
        made, arguments, *rest = super().__reduce_ex__(protocol)
        if made.__name__ != "__newobj__" or len(arguments) != 1:
            raise TypeError(
                f"{self.original.__qualname__} is pickled in a way of its own; expected the usual one. "
                "Call ckpt_kernels.revert first"
            )
        return _made_again, (self.original, getattr(self, ATTRIBUTE), self.discards), *rest


def swap(module: nn.Module, rule: Rule, discards: bool) -> None:
    """Converts one module by `rule`; with `discards` its forward runs within `discard_outputs`."""
    module.__dict__[ATTRIBUTE] = rule
    module.__class__ = _converted_class(type(module), rule.methods, discards)


def swap_back(module: nn.Module) -> None:
    module.__class__ = type(module).original
    del module.__dict__[ATTRIBUTE]


def is_converted(module: nn.Module) -> bool:
    return isinstance(module, Converted)


def is_wrapped(module: nn.Module) -> bool:
    """Whether a converted module's class has been exchanged again since, as parametrizations and FSDP do."""
    return is_converted(module) and "original" not in vars(type(module))


def rule_of(module: nn.Module) -> Rule | None:
    return module.__dict__.get(ATTRIBUTE)


@functools.cache
def _converted_class(original: type[nn.Module], methods: tuple[str, ...], discards: bool) -> type[nn.Module]:
    members: dict[str, Any] = {
        "original": original,
        "discards": discards,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    for method in methods:
        members[method] = _calling(original, method)
    if discards:
        members["forward"] = _within_discard_outputs(original, members.get("forward", original.forward))
    return type(original.__name__, (Converted, original), members)


def _calling(original: type[nn.Module], method: str) -> Callable[..., Any]:
    @functools.wraps(getattr(original, method))
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__[ATTRIBUTE].call(method, self, *args, **kwargs)

    return call


def _within_discard_outputs(original: type[nn.Module], forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original.forward)
    def discarding_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(self, *args, **kwargs)
        with discard_outputs():
            return forward(self, *args, **kwargs)

    return discarding_forward


def _made_again(original: type[nn.Module], rule: Rule, discards: bool) -> nn.Module:
    module = original.__new__(original)
    swap(module, rule, discards)
    return module

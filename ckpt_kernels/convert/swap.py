"""How a module is converted and stays the module it was: its class is exchanged for a subclass with another forward.

So whoever holds the module keeps holding it, and its parameters, buffers, hooks, names, training mode and attributes
are not touched. The subclass bears the original's name, prints like it, is an instance of it, and is pickled as what
makes it again.
"""

import abc
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..recompute import discard_outputs, selective_contexts

# What a converted module has in its __dict__ beyond what it had: its rule.
ATTRIBUTE = "_ckpt_rule"

Forward = Callable[..., Any]
# Called with a forward, the module, and the forward's arguments.
Around = Callable[[Forward, nn.Module, tuple, dict[str, Any]], Any]

_PASSES = (Tensor, type(None), bool, int, float, str, tuple)


class Rule(abc.ABC):
    """What a converted module computes in place of its original's methods. Picklable.

    `methods` names what is replaced; each is called as `rule.call(method, module, *args, **kwargs)`.
    """

    methods: tuple[str, ...] = ("forward",)

    @abc.abstractmethod
    def call(self, method: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any: ...

    def __str__(self) -> str:
        return type(self).__name__


class Unary(Rule):
    """What a module computes of one tensor. Called in another way than with that alone, its original forward runs."""

    def call(self, method: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            return self.of(module, args[0])
        return module.original.forward(module, *args, **kwargs)

    @abc.abstractmethod
    def of(self, module: nn.Module, input: Tensor) -> Tensor: ...


class Within(Rule):
    """The original's forward, for modules that are converted for nothing but what is around it."""

    methods = ()

    def call(self, method: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return getattr(module.original, method)(module, *args, **kwargs)

    def __str__(self) -> str:
        return "forward pass within discard_outputs"


class Converted:
    """The first base of every converted module's class. `original` is the class that it was of."""

    original: type[nn.Module]
    around: tuple[Around, ...]

    def __reduce_ex__(self, protocol: int) -> tuple:
        made, arguments, *rest = super().__reduce_ex__(protocol)
        if made.__name__ != "__newobj__" or len(arguments) != 1:
            raise TypeError(
                f"{self.original.__qualname__} is pickled in a way of its own; expected the usual one. "
                "Call ckpt_kernels.revert first"
            )
        return _made_again, (self.original, getattr(self, ATTRIBUTE), self.around), *rest


def swap(module: nn.Module, rule: Rule, around: tuple[Around, ...] = ()) -> None:
    """Converts one module by `rule`; its forward, whichever it then is, runs as the functions `around` it do."""
    module.__dict__[ATTRIBUTE] = rule
    module.__class__ = _converted_class(type(module), rule.methods, around)


def discarding(forward: Forward, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The forward within `discard_outputs`."""
    if not torch.is_grad_enabled():
        return forward(module, *args, **kwargs)
    with discard_outputs():
        return forward(module, *args, **kwargs)


def selecting(forward: Forward, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Under torch.compile, which has no `discard_outputs`: the forward in a checkpoint that computes blocks again."""
    if not torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return forward(module, *args, **kwargs)
    # A cache, say, that the forward writes to cannot pass into the checkpoint. One of the model's own is enough.
    if getattr(module, "gradient_checkpointing", False) or not all(
        isinstance(a, _PASSES) for a in (*args, *kwargs.values())
    ):
        return forward(module, *args, **kwargs)
    return checkpoint(forward, module, *args, use_reentrant=False, context_fn=selective_contexts, **kwargs)


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
def _converted_class(
    original: type[nn.Module], methods: tuple[str, ...], around: tuple[Around, ...]
) -> type[nn.Module]:
    members: dict[str, Any] = {
        "original": original,
        "around": around,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    for method in methods:
        members[method] = _calling(original, method)
    for outer in around:
        members["forward"] = _surrounded(original, outer, members.get("forward", original.forward))
    return type(original.__name__, (Converted, original), members)


def _calling(original: type[nn.Module], method: str) -> Forward:
    @functools.wraps(getattr(original, method))
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__[ATTRIBUTE].call(method, self, *args, **kwargs)

    return call


def _surrounded(original: type[nn.Module], outer: Around, forward: Forward) -> Forward:
    @functools.wraps(original.forward)
    def surrounded(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return outer(forward, self, args, kwargs)

    return surrounded


def _made_again(original: type[nn.Module], rule: Rule, around: tuple[Around, ...]) -> nn.Module:
    module = original.__new__(original)
    swap(module, rule, around)
    return module

"""What the forward of a converted module runs in, so that outputs are let go of: eager, and under torch.compile."""

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..ops.tiles import in_tiles
from ..recompute import discard_outputs, run_as_layer, selective_contexts
from ..recompute import discarding as discarding_now
from ..saved_tensors import as_is
from .code.called import leads_to_transforms
from .loads import is_set
from .noticing import look_over
from .rules.rule import Forward

# Called with a forward, the module, and the forward's arguments.
Around = Callable[[Forward, nn.Module, tuple, dict[str, Any]], Any]

_PASSES = (Tensor, type(None), bool, int, float, str, tuple)


def discarding(forward: Forward, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The forward within `discard_outputs`."""
    if not torch.is_grad_enabled() or _is_transformed(module, args, kwargs):
        return forward(module, *args, **kwargs)
    with discard_outputs(module):
        return forward(module, *args, **kwargs)


def discarding_products(forward: Forward, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The forward within `discard_outputs`, which lets go of the products that blocks read too."""
    if not torch.is_grad_enabled() or _is_transformed(module, args, kwargs):
        return forward(module, *args, **kwargs)
    with discard_outputs(module, products=True):
        return forward(module, *args, **kwargs)


def as_layer(forward: Forward, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The forward of a layer, whose products run again, but the last."""
    if not torch.is_grad_enabled() or _is_transformed(module, args, kwargs):
        return forward(module, *args, **kwargs)
    return run_as_layer(functools.partial(forward, module), module, args, kwargs)


@dataclass(frozen=True)
class InTiles:
    """A forward whose MLPs take their rows in so many tiles."""

    tiles: int

    def __call__(self, forward: Forward, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():
            return forward(module, *args, **kwargs)
        with in_tiles(self.tiles):
            return forward(module, *args, **kwargs)


def looking_over(forward: Forward, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The forward, and before it the conversion of what came into the module later."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        look_over(module)
    return forward(module, *args, **kwargs)


def _is_transformed(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether what came after the conversion, arguments and hooks, leads to torch.func's transforms, which refuse to
    run within `discard_outputs`."""
    # Within another, that one goes on.
    if torch.compiler.is_compiling() or discarding_now() is not None:
        return False
    below = look_over(module)
    for argument in (*args, *kwargs.values()):
        if not isinstance(argument, _PASSES) and leads_to_transforms(argument):
            return True
    of_all = [each.__dict__ for each in below if each is not None]
    hooked = [own for own in of_all if own["_forward_hooks"] or own["_forward_pre_hooks"]]
    return any(leads_to_transforms(own[name]) for own in hooked for name in ("_forward_hooks", "_forward_pre_hooks"))


def _contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """Where the graph breaks within a layer, its checkpoint runs outside of any graph. Then it sees nothing of what is
    saved: so nothing runs twice, and outputs are let go of as in eager torch."""
    if torch.compiler.is_compiling():
        return selective_contexts()
    return torch.autograd.graph.saved_tensors_hooks(as_is, as_is), contextlib.nullcontext()


def selecting(forward: Forward, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Under torch.compile, which has no `discard_outputs`: the forward in a checkpoint that computes blocks again."""
    if not torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return forward(module, *args, **kwargs)
    # A cache, say, that the forward writes to cannot pass into the checkpoint. One of the model's own is enough.
    if is_set(module, "gradient_checkpointing") or not all(isinstance(a, _PASSES) for a in (*args, *kwargs.values())):
        return forward(module, *args, **kwargs)
    return checkpoint(forward, module, *args, use_reentrant=False, context_fn=_contexts, **kwargs)

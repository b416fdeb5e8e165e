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
from ..saved_tensor_hooks import as_is
from .loads import is_set
from .noticing import look_over
from .rules.rule import Forward

# Called with a forward, the module, and the forward's arguments.
Around = Callable[[Forward, nn.Module, tuple, dict[str, Any]], Any]

_PASSES = (Tensor, type(None), bool, int, float, str, tuple)


def discarding(forward: Forward, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The forward within `discard_outputs`."""
    if not torch.is_grad_enabled():
        return forward(module, *args, **kwargs)
    look_for_later(module)
    with discard_outputs(module):
        return forward(module, *args, **kwargs)


def discarding_products(forward: Forward, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The forward within `discard_outputs`, which lets go of the products that blocks read too."""
    if not torch.is_grad_enabled():
        return forward(module, *args, **kwargs)
    look_for_later(module)
    with discard_outputs(module, products=True):
        return forward(module, *args, **kwargs)


def as_layer(forward: Forward, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The forward of a layer, whose products run again, but the last."""
    if not torch.is_grad_enabled():
        return forward(module, *args, **kwargs)
    look_for_later(module)
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


def look_for_later(module: nn.Module) -> None:
    """Has what came into the module later converted. Within another converted module that one has looked."""
    if not torch.compiler.is_compiling() and discarding_now() is None:
        look_over(module)


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
    # With dynamic shapes numbers are inputs of the graph, and what one checkpoint has of them torch 2.13 refuses in the
    # next.
    if not torch._dynamo.config.assume_static_by_default:
        return forward(module, *args, **kwargs)
    # A cache, say, that the forward writes to cannot pass into the checkpoint. One of the model's own is enough.
    if is_set(module, "gradient_checkpointing") or not all(isinstance(a, _PASSES) for a in (*args, *kwargs.values())):
        return forward(module, *args, **kwargs)
    return checkpoint(forward, module, *args, use_reentrant=False, context_fn=_contexts, **kwargs)

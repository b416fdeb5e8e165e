"""The contexts that the forward of a converted module runs in, which discard block outputs, eager or compiled."""

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
from ..recompute import discarding, run_at, selective_contexts
from ..recompute.contexts import opened
from ..saved_tensor_hooks import as_is
from .attribute_loads import is_set
from .late_modules import convert_late_modules
from .rules.rule import Forward

# Runs a forward: called with the forward, the module, and the arguments of the call.
ForwardContext = Callable[[Forward, nn.Module, tuple, dict[str, Any]], Any]

# The types of arguments that a checkpoint under torch.compile takes.
_CHECKPOINTED_TYPES = (Tensor, type(None), bool, int, float, str, tuple)


@dataclass(frozen=True)
class Discarding:
    """Runs a forward within `discard_outputs`, with or without products, unless such a context is active already."""

    products: bool

    def __call__(self, forward: Forward, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if not torch.is_grad_enabled():
            return forward(module, *args, **kwargs)
        # Within another context that one stays active, and a compiler does not use hooks. Most calls end here.
        if torch.compiler.is_compiling() or discarding() is not None:
            return forward(module, *args, **kwargs)
        convert_late_modules(module)
        context = None
        try:
            context = opened(module, self.products, False)
            return forward(module, *args, **kwargs)
        finally:
            if context is not None:
                context.close()


def as_layer(forward: Forward, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Runs a forward as a layer whose products run again, within another context too."""
    if not torch.is_grad_enabled():
        return forward(module, *args, **kwargs)
    convert_late_modules_if_outermost(module)
    return run_at("layer", functools.partial(forward, module), module, args, kwargs)


@dataclass(frozen=True)
class InTiles:
    """Runs a forward in which MLPs compute their rows in that many tiles."""

    tiles: int

    def __call__(self, forward: Forward, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():
            return forward(module, *args, **kwargs)
        with in_tiles(self.tiles):
            return forward(module, *args, **kwargs)


def converting_late_modules(forward: Forward, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Converts the modules that were added since the last call, and runs the forward."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        convert_late_modules(module)
    return forward(module, *args, **kwargs)


def convert_late_modules_if_outermost(module: nn.Module) -> None:
    """Converts the modules that were added since the last call, unless the call is within another converted module's,
    which has already done so."""
    if not torch.compiler.is_compiling() and discarding() is None:
        convert_late_modules(module)


def _checkpoint_contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """The contexts of the checkpoint in `checkpointing_selectively`.

    Where the graph breaks within a layer, the checkpoint runs outside of any graph. Hooks that change nothing then hide
    saved tensors from the checkpoint, so that nothing runs twice, and outputs are discarded as in eager torch.
    """
    if torch.compiler.is_compiling():
        return selective_contexts()
    return torch.autograd.graph.saved_tensors_hooks(as_is, as_is), contextlib.nullcontext()


def takes_checkpoints() -> bool:
    """Whether the compiler takes several checkpoints in one graph: not with dynamic shapes, where sizes are inputs of
    the graph, and torch 2.13 refuses those of one checkpoint in the next."""
    return torch._dynamo.config.assume_static_by_default


def checkpointing_selectively(forward: Forward, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Under torch.compile, which cannot trace `discard_outputs`, runs the forward in a selective checkpoint that
    recomputes blocks. In eager mode it runs the forward alone."""
    if not torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return forward(module, *args, **kwargs)
    if not takes_checkpoints():
        return forward(module, *args, **kwargs)
    # A model's own gradient checkpointing is enough. Any other object among the arguments, such as a cache that the
    # forward writes to, cannot pass into a checkpoint.
    given = (*args, *kwargs.values())
    if is_set(module, "gradient_checkpointing") or not all(isinstance(a, _CHECKPOINTED_TYPES) for a in given):
        return forward(module, *args, **kwargs)
    return checkpointed(forward, module, args, kwargs, context_fn=_checkpoint_contexts)


def checkpointed(forward: Forward, module: nn.Module, args: tuple, kwargs: dict[str, Any], **options: Any) -> Any:
    """Runs the forward in torch's checkpoint with these options.

    Keyword arguments pass by position, because `checkpoint` takes some names, such as `debug`, for its own options.
    """
    # The checkpoint keeps this function, which must not keep the arguments.
    count, names = len(args), tuple(kwargs)

    def run(module: nn.Module, *values: Any) -> Any:
        return forward(module, *values[:count], **dict(zip(names, values[count:], strict=True)))

    return checkpoint(run, module, *args, *kwargs.values(), use_reentrant=False, **options)

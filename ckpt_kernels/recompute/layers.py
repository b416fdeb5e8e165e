"""A layer of a network, whose products run again in its backward pass, or which has a level of its own."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..nested_values import tensors_among
from .active import discarding
from .contexts import discard_outputs
from .discarder import Discarder


class layer:
    """A layer of a network, as a function or a module, whose backward pass runs all products again but the last.

    The object is called as the function is, and is no module. Kept are the layer's input and the part of attention's
    result that attention saves. Queries, keys and values, the product of attention's output, the first products of the
    MLP, norms, gates and rotations are made again, once, when the backward pass comes to the layer. Neither attention
    runs again nor the last product: a checkpoint of the layer runs both for nothing.

    A product runs again if torch's graph says how (`nn.Linear`, `F.linear`, two-dimensional `@`, grouped ones,
    convolutions), and the last one too where a norm reads it. Kept are products of three dimensions, as of an attention
    that is written out, and plain sums of products that a norm reads: those of `add_rms_norm` and `add_layer_norm` are
    made again. Where the function is no module, writes to a bias in the forward pass are not seen. Under no_grad
    and torch.compile a layer does nothing.

    Args:
        function: anything that is called with tensors, and returns tensors, by themselves or in a tuple, list or dict.

    Kept for backward:
        The layer's inputs and outputs, if somebody's gradient needs them; tensors that no recipe can make again; copies
        of biases.

    Raises:
        RuntimeError: in the backward pass, where a tensor that is to be read again has been written to in place since.

    Example:
        >>> block = torch.nn.Sequential(ckpt_kernels.nn.LayerNorm(64), ckpt_kernels.nn.MLP(64, 256))
        >>> x = torch.randn(32, 64, requires_grad=True)
        >>> layer = ckpt_kernels.recompute.layer(block)
        >>> saved_bytes(layer, x, parameters_of=block) < saved_bytes(block, x) / 3
        True
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self._function if isinstance(self._function, nn.Module) else None
        return run_as_layer(self._function, module, args, kwargs)


def run_as_layer(function: Callable[..., Any], module: nn.Module | None, args: tuple, kwargs: dict[str, Any]) -> Any:
    """See `layer`. `module` is the one whose forward runs, if there is one."""
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    with discard_outputs(module, products=True):
        discarder = None if torch.compiler.is_compiling() else discarding()
        if discarder is None:
            return function(*args, **kwargs)
        return _between_edges("layer", discarder, function, args, kwargs)


def run_at(
    level: str,
    function: Callable[..., Any],
    module: nn.Module,
    args: tuple,
    kwargs: dict[str, Any],
    alone: bool = False,
) -> Any:
    """A module's forward at a level of its own, whatever the level of the contexts around.

    Args:
        level: "block", "output", "all" or "layer", as of `convert`.
        function: the forward.
        module: that it is the forward of.
        args, kwargs: of the call.
        alone: whether the module is to keep the same, tensor by tensor, when it is called again by itself: then nothing
            that was made before it is looked at.
    """
    with discard_outputs(module):
        discarder = None if torch.compiler.is_compiling() else discarding()
        if discarder is None:
            return function(*args, **kwargs)
        return _between_edges(level, discarder, function, args, kwargs, alone or level == "layer")


def _between_edges(
    level: str,
    discarder: Discarder,
    function: Callable[..., Any],
    args: tuple,
    kwargs: dict[str, Any],
    holds: bool = True,
) -> Any:
    for tensor in tensors_among((args, kwargs)) if holds else ():
        discarder.hold(tensor)
    with discarder.at(level):
        output = function(*args, **kwargs)
    for tensor in tensors_among(output) if holds else ():
        discarder.hold(tensor)
    return output

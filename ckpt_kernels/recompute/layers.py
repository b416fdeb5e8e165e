"""Layers whose matrix products run again in the backward pass, and modules that run at a level of their own."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..levels import runs_layers_again
from ..nested_values import tensors_among
from .active import discarding
from .contexts import discard_outputs


class layer:
    """A layer of a network whose backward pass recomputes all matrix products but the last.

    The object is called like `function`, which may be a module, but is no module. Kept are the layer's input and the
    part of the attention result that attention saves. Queries, keys and values, the output projection of attention, the
    first products of the MLP, norms, gates and rotations are recomputed once, when the backward pass reaches the layer.
    Neither attention nor the last product runs again: a checkpoint of the layer would run both needlessly.

    A product runs again if the autograd graph shows how (`nn.Linear`, `F.linear`, two-dimensional `@`, grouped
    products, convolutions), and the last product too if a norm reads the result. Products of three dimensions, such as
    those of an attention written in plain torch ops, are kept. So are plain sums of products that a norm reads; the
    sums of `add_rms_norm` and `add_layer_norm` are recomputed. If the function is no module, writes to a bias during
    the forward pass are not seen. Under no_grad and torch.compile a layer does nothing.

    Args:
        function: any callable that takes tensors and returns tensors, alone or in a tuple, list or dict.

    Kept for backward:
        The layer's inputs and outputs, if somebody's gradient needs them; tensors that no recipe can make again; copies
        of biases.

    Raises:
        TypeError: `function` is not callable.
        RuntimeError: in the backward pass, where a tensor that is read again has been written to in place since.

    Example:
        >>> block = torch.nn.Sequential(ckpt_kernels.nn.LayerNorm(64), ckpt_kernels.nn.MLP(64, 256))
        >>> x = torch.randn(32, 64, requires_grad=True)
        >>> layer = ckpt_kernels.recompute.layer(block)
        >>> saved_bytes(layer, x, parameters_of=block) < saved_bytes(block, x) / 3
        True
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        if not callable(function):
            raise TypeError(f"function is {type(function).__name__}; expected a function or a module")
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._function(*args, **kwargs)
        module = self._function if isinstance(self._function, nn.Module) else None
        return run_at("layer", self._function, module, args, kwargs)


def run_at(
    level: str,
    function: Callable[..., Any],
    module: nn.Module | None,
    args: tuple,
    kwargs: dict[str, Any],
    alone: bool = False,
) -> Any:
    """Runs a forward pass at a given level, whatever the level of the contexts around the call.

    Args:
        level: "none", "block", "output", "all" or "layer", as in `convert`. Here "none" is the same as "block".
        function: the forward.
        module: the module that `function` belongs to, if there is one.
        args, kwargs: the arguments of the call.
        alone: whether the module must keep the same tensors when it is called again by itself. As for a layer, recipes
            then do not cross the inputs and outputs.
    """
    with discard_outputs(module):
        discarder = None if torch.compiler.is_compiling() else discarding()
        if discarder is None:
            return function(*args, **kwargs)
        has_boundaries = alone or runs_layers_again(level)
        for tensor in tensors_among((args, kwargs)) if has_boundaries else ():
            discarder.hold(tensor)
        with discarder.at(level):
            output = function(*args, **kwargs)
        for tensor in tensors_among(output) if has_boundaries else ():
            discarder.hold(tensor)
        return output

"""Checkpoints that span several calls: layers in a row keep the input of the first alone, and run again.

`torch.utils.checkpoint` needs one function for all that is to run again. A model calls its layers one by one, from a
loop of its own, and what the loop does between two calls is its own affair. So a `Run` follows the calls: while each
layer runs, its saved tensors are dropped, and its arguments are noted; those that are outputs of the run's own earlier
calls, the very tensors, version_checked, are noted as such and not kept. When the backward pass first asks for a tensor, all
calls of the run are made again from what is kept, up to the last tensor that was saved. A call whose arguments do not
come from the one before begins another run: a loop that does more than hand on costs memory, and never a wrong number.

As in torch's checkpoint, random numbers and autocast are as they were, and the number, shapes and dtypes of what is
saved are held against the first time. Beyond it, buffers that the first pass wrote to in place, such as running
statistics, are for the second what they were, and are not moved by it; a layer's arguments and parameters must not have
been written to since.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .arguments import are_plain
from .calls import Call, Place, is_sharded
from .run import Run
from .state import is_repeating, thread

__all__ = ["Place", "Run", "is_repeating", "is_sharded", "run_in"]


def run_in(
    places: Sequence[Place],
    inside: Callable[..., Any],
    module: nn.Module,
    args: tuple,
    kwargs: dict[str, Any],
) -> Any:
    """Calls a layer, `inside(*args, **kwargs)`, as a part of a run.

    Args:
        places: where the layer is in the run, and in the runs within that one which are made when it runs again.
        inside: what computes the layer's result, without the runs.
        module: the layer.
        args, kwargs: of the call.
    """
    hooks: Any = torch._C._autograd  # of which not all is in torch's stubs
    # What is in a checkpoint already needs none of its own; under torch.func there are none.
    is_within = thread.within or thread.repeating
    if is_within or not torch.is_grad_enabled() or not hooks._saved_tensors_hooks_is_enabled():
        return inside(*args, **kwargs)
    if not are_plain((*args, *kwargs.values())):
        return inside(*args, **kwargs)
    place = places[0]
    run = None if thread.open is None else thread.open()
    thread.open = None
    if run is None or not run.continues_with(place, args, kwargs):
        run = Run(place.key)
    thread.within = True
    try:
        output = run.call(Call(inside, module, places), args, kwargs)
    finally:
        thread.within = False
    if not place.is_last:
        thread.open = weakref.ref(run)
    return output

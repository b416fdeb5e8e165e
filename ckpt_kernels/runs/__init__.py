"""Checkpoints that span several calls: consecutive layers keep only the input of the first, and run again together.

`torch.utils.checkpoint` needs one function for everything that runs again. A model calls its layers one by one, in a
loop of its own that may compute anything between two calls. So a `Run` follows the calls. While a layer runs, its saved
tensors are dropped and its arguments are recorded. An argument that is an output of an earlier call of the run, the
same tensor object without an in-place write, is recorded as a link and not kept. When the backward pass first asks for
a tensor, all calls of the run are repeated from the kept arguments, up to the last tensor that was saved. A call whose
arguments do not come from the previous call begins another run. So a loop that computes something between the calls
costs memory, but never gives a wrong result.

As in torch's checkpoint, random numbers and autocast are restored, and the number, shapes and dtypes of the saved
tensors are compared with the first pass. In addition, buffers that the first pass wrote to in place, such as running
statistics, have their old values in the second pass, which does not change them; and the modules have the parameters,
children, hooks, training mode and plain attributes of the first pass (see `module_state`). A layer's arguments and
parameters must not have been written to since.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..nested_values import tensors_among
from ..ops.registration import is_transformed
from ..recompute.transforms import allow_transforms
from .arguments import are_plain
from .calls import Call, Place, is_sharded
from .held import held_by
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
        places: the places of the layer in the run, and in the inner runs that are created when the run is repeated.
        inside: the function that computes the layer's result, without runs.
        module: the layer.
        args, kwargs: the arguments of the call.
    """
    hooks: Any = torch._C._autograd  # torch's type stubs lack some of its functions
    # A layer inside a checkpoint needs no other; under torch.func there are no hooks.
    is_within = thread.within or thread.repeating
    if is_within or not torch.is_grad_enabled() or not hooks._saved_tensors_hooks_is_enabled():
        return inside(*args, **kwargs)
    # A second pass outside of a transform would lack its tangents or batches, and a trace would record the bookkeeping
    # of the first pass.
    if is_transformed():
        return inside(*args, **kwargs)
    if not are_plain((*args, *kwargs.values())):
        return inside(*args, **kwargs)
    if (held := held_by(module)) is None:
        return inside(*args, **kwargs)
    allow_transforms()
    place = places[0]
    tensors = list(tensors_among((args, kwargs)))
    run = None if thread.open is None else thread.open()
    thread.open = None
    if run is None or not run.continues_with(place, tensors):
        run = Run(place.key)
    thread.within = True
    try:
        output = run.call(Call(inside, module, places, held), held, args, kwargs, tensors)
    finally:
        thread.within = False
    if not place.is_last:
        thread.open = weakref.ref(run)
    return output

"""Letting go of blocks' outputs: what reads one keeps a recipe for it, and gets it back in the backward pass.

A block keeps its input and computes the rest again in its backward kernel. Its output would still be kept, by whatever
reads it for a gradient of its own: a Linear, a convolution, attention, any autograd.Function. Within `discard_outputs`
that reader's graph keeps a `Recipe` in the place of the output: the tensors that the block keeps anyway, and its
forward kernel to run on them again, which costs memory traffic and no matrix product. Gradients are the same to the
last bit, because the kernel and what it reads are the same. The same goes for what torch's own cheap ops make, where
the graph says how (see `provenance`).

It works by torch's saved-tensor hooks, on the thread and for the time of the context. Only the innermost pair of hooks
runs in torch; hooks that were there before are called from here for all that is not discarded.
"""

from .active import discarding, is_active, thread
from .announced import Announcement
from .announcing import announce, announce_in_layer, note, record
from .contexts import DiscardOutputs, discard_outputs, selective_contexts
from .layers import layer, run_as_layer, run_at

__all__ = [
    "Announcement",
    "DiscardOutputs",
    "announce",
    "announce_in_layer",
    "discard_outputs",
    "discarding",
    "is_active",
    "layer",
    "note",
    "record",
    "run_as_layer",
    "run_at",
    "selective_contexts",
    "thread",
]

"""Letting go of blocks' outputs: what reads one keeps a recipe for it, and gets it back in the backward pass.

A block keeps the input and computes the rest again in the backward kernel. The output would still be kept, by a reader
that needs it for a gradient: a Linear, a convolution, attention, any autograd.Function. Within `discard_outputs` the
reader's node keeps a `Recipe` instead: the tensors that the block keeps anyway, and the forward kernel to run on them
again, which costs memory traffic and no matrix product. Gradients are the same to the last bit, because the kernel and
its operands are the same. Outputs of torch's own cheap ops have recipes too, where the graph tells how they were made
(see `provenance`).

The contexts work by torch's saved-tensor hooks, on one thread. Only the innermost pair of hooks runs in torch; hooks
that were there before are called from here for all tensors that are not discarded.
"""

from .active import discarding, is_active, thread
from .announcements import Announcement
from .announcing import announce, announce_in_layer, note, record, watch
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
    "watch",
]

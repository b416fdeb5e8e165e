"""Discards outputs in the forward pass, and recomputes them in the backward pass.

A block keeps the input and recomputes the rest in the backward kernel. The output would still be kept by every reader
that needs the output for a gradient: a Linear, a convolution, attention, any autograd.Function. Within
`discard_outputs` the reader's autograd node keeps a `Recipe` instead: the tensors that the block keeps anyway, and the
forward kernel that runs on them again. A recipe costs memory traffic and no matrix product. Gradients are bitwise the
same, because kernel and operands are the same. Outputs of torch's own cheap ops have recipes too, where the autograd
graph shows how they were made (see `provenance`).

The contexts are saved-tensor hooks of one thread. torch calls only the innermost pair of hooks, so these hooks call the
outer ones for every tensor that is not discarded.
"""

from .active import discarding, is_active, thread
from .announcements import Announcement
from .announcing import announce, announce_in_layer, copied, note, record, watch
from .contexts import DiscardOutputs, discard_outputs, selective_contexts
from .layers import layer, run_at
from .narrow_hooks import keeping_narrow
from .view_writes import write_over_view
from .widened import is_widened

__all__ = [
    "Announcement",
    "DiscardOutputs",
    "announce",
    "announce_in_layer",
    "copied",
    "discard_outputs",
    "discarding",
    "is_active",
    "is_widened",
    "keeping_narrow",
    "layer",
    "note",
    "record",
    "run_at",
    "selective_contexts",
    "thread",
    "watch",
    "write_over_view",
]

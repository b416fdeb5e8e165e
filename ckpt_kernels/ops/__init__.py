"""One file a family: a block declared once. Which backend computes is not known here."""

from . import (
    bias_act,
    block,
    channel_norm,
    dyt,
    glu,
    linear,
    linear_blocks,
    linear_loss,
    nested,
    operands,
    products,
    rotary,
    row_norm,
    sharding,
    sync_batch_norm,
    tiles,
)

__all__ = [
    "bias_act",
    "block",
    "channel_norm",
    "dyt",
    "glu",
    "linear",
    "linear_blocks",
    "linear_loss",
    "nested",
    "operands",
    "products",
    "rotary",
    "row_norm",
    "sharding",
    "sync_batch_norm",
    "tiles",
]

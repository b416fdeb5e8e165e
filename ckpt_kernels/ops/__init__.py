"""One file a family: op schema, fake function and autograd rule. Which backend computes is not known here."""

from . import bias_act, channel_norm, glu, linear, nested, row_norm, sharding, sync_batch_norm

__all__ = ["bias_act", "channel_norm", "glu", "linear", "nested", "row_norm", "sharding", "sync_batch_norm"]

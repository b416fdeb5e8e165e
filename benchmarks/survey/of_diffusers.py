"""Models of diffusers: a row of a table has the arguments and inputs of a class.

Settings that most classes share by name are filled in.
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from .diffusers_autoencoders import AUTOENCODERS
from .diffusers_denoisers import DENOISERS
from .diffusers_rows import POOLED, TEXT, Row
from .entry import Entry, Shape


def _axes(head: int) -> tuple[int, int, int]:
    """The dimensions of a head, divided among three axes."""
    return head // 4, head // 4, head // 2


# Values for settings that a class has and the row of the class does not give.
_USUAL: dict[str, Callable[[int], Any]] = {
    "num_attention_heads": lambda width: 4,
    "num_heads": lambda width: 4,
    "attention_head_dim": lambda width: width // 4,
    "num_layers": lambda width: 2,
    "num_single_layers": lambda width: 2,
    "num_refiner_layers": lambda width: 1,
    "hidden_size": lambda width: width,
    "dim": lambda width: width,
    "ffn_dim": lambda width: 2 * width,
    "in_channels": lambda width: 4,
    "out_channels": lambda width: 4,
    "text_dim": lambda width: TEXT,
    "text_embed_dim": lambda width: TEXT,
    "caption_channels": lambda width: TEXT,
    "joint_attention_dim": lambda width: TEXT,
    "cap_feat_dim": lambda width: TEXT,
    "pooled_projection_dim": lambda width: POOLED,
    "caption_projection_dim": lambda width: width,
    "sample_size": lambda width: 16,
    "freq_dim": lambda width: 32,
    "time_embed_dim": lambda width: 32,
    "norm_num_groups": lambda width: 8,
    "layers_per_block": lambda width: 1,
    "axes_dims_rope": lambda width: _axes(width // 4),
    "rope_axes_dim": lambda width: _axes(width // 4),
}


def _model(row: Row, width: int) -> nn.Module:
    import diffusers

    cls = getattr(diffusers, row.cls)
    known = inspect.signature(cls.__init__).parameters
    usual = {name: make(width) for name, make in _USUAL.items() if name in known}
    own = {name: value(width) if callable(value) else value for name, value in row.settings.items()}
    return cls(**usual | own)


def _inputs(row: Row, shape: Shape) -> dict[str, Any]:
    return {name: make(shape) for name, make in row.inputs.items()}


def entries() -> list[Entry]:
    return [
        Entry(
            f"diffusers/{name}",
            lambda width, row=row: _model(row, width),
            lambda model, shape, row=row: _inputs(row, shape),
            has_wide=row.wide,
        )
        for name, row in (DENOISERS | AUTOENCODERS).items()
    ]

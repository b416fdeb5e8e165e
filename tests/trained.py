"""What the tests of trainers train, and how two that were trained are held against each other."""

import copy

import torch
from torch import nn


def blocks(layers: int = 2) -> nn.Sequential:
    """Layers that a plan can choose for."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0, norm_first=True)
    return nn.Sequential(*(copy.deepcopy(layer) for _ in range(layers)))


def same_weights(one: nn.Module, other: nn.Module) -> None:
    """After the same steps. The losses are computed in float32, whatever the model is in."""
    pairs = list(zip(one.parameters(), other.parameters(), strict=True))
    assert pairs
    for mine, its in pairs:
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-8)

"""A small model for the tests of trainers, and a comparison of two trained models."""

import copy

import torch
from torch import nn


def blocks(layers: int = 2) -> nn.Sequential:
    """Transformer layers, for which a plan can choose levels."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0, norm_first=True)
    return nn.Sequential(*(copy.deepcopy(layer) for _ in range(layers)))


def same_weights(one: nn.Module, other: nn.Module) -> None:
    """Asserts equal weights after the same steps. Trainers compute losses in float32, whatever the model's dtype."""
    pairs = list(zip(one.parameters(), other.parameters(), strict=True))
    assert pairs
    for parameter, expected in pairs:
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-8)

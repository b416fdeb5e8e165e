"""Layers at "checkpoint" whose forward writes to the layer's own weights."""

import pytest
import torch
from torch import Tensor, nn

import ckpt_kernels

WIDTH = 6


class Normalizing(nn.Module):
    """Reads the weights before or after it normalizes them."""

    def __init__(self, reads_first: bool) -> None:
        super().__init__()
        self.reads_first, self.linear = reads_first, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.linear.weight.exp().sum() if self.reads_first else 1.0
        with torch.no_grad():
            self.linear.weight.div_(self.linear.weight.norm())
        return torch.tanh(self.linear(x)) * scale


@pytest.mark.parametrize("reads_first", [False, True])
def test_weights_that_the_layer_writes_to_are_an_error(reads_first: bool) -> None:
    """No copy of the earlier value is kept, and what was read of it is not known."""
    net = nn.Sequential(Normalizing(reads_first))
    ckpt_kernels.convert(net, recompute={"0": "checkpoint"})
    loss = net(torch.randn(3, WIDTH)).sum()
    with pytest.raises(RuntimeError, match="a parameter of a checkpointed layer"):
        loss.backward()

"""Layers at "checkpoint" whose forward writes to the layer's own weights."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import ckpt_kernels

WIDTH = 6


class OwnWeights(nn.Module):
    """A layer that writes to its own weights before it reads them."""

    def __init__(self, write: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.write, self.norm, self.linear = write, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for parameter in (self.linear.weight, self.norm.weight):
                parameter.copy_(self.write(parameter))
        return x + torch.tanh(self.linear(torch.nn.functional.gelu(self.norm(x)))) * self.linear.weight.sum()


def of_own_weights(level: str, write: Callable[[Tensor], Tensor], calls: int) -> list[Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(OwnWeights(write), OwnWeights(write)).double()
    ckpt_kernels.convert(net, recompute={"?": level})
    loss = sum(net(x).square().sum() for x in torch.randn(calls, 3, WIDTH, dtype=torch.float64))
    loss.backward()
    versions = torch.tensor([parameter._version for parameter in net.parameters()])
    return [*(parameter.grad for parameter in net.parameters()), *net.state_dict().values(), versions]


def test_a_layer_that_normalizes_its_weights() -> None:
    def normalized(weight: Tensor) -> Tensor:
        return weight / weight.norm()

    for found, expected in zip(
        *(of_own_weights(level, normalized, 1) for level in ("checkpoint", "none")), strict=True
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("level", ["checkpoint", "none"])
def test_weights_that_a_later_call_writes_to_are_an_error(level: str) -> None:
    with pytest.raises(RuntimeError, match=r"modified by an in-?place operation"):
        of_own_weights(level, lambda weight: weight / weight.norm(), 2)


def test_a_layer_whose_weights_change_with_each_run_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="has another value when the layer runs again"):
        of_own_weights("checkpoint", lambda weight: 0.999 * weight, 1)

"""Attributes of checkpointed layers that hold tensors with a graph, which a repeated call must find again."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import ckpt_kernels

from .conftest import DEVICE
from .conversion import WIDTH, close, random_tensor


class Conditioned(nn.Module):
    """Reads a tensor that the caller sets."""

    condition: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(self.norm(x)) * self.condition)


class Recurrent(Conditioned):
    """Replaces the tensor at each call, and reads it before."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        self.condition = torch.sin(self.condition + x)
        return x


def state_of(layer: nn.Module) -> Tensor:
    return layer.hidden


class ByFunction(Conditioned):
    """Only a function reads the tensor that the layer replaces."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.linear(self.norm(x)) * state_of(self))
        self.hidden = torch.sin(x)
        return x


class ItsOwnOutput(Conditioned):
    """Reads its last output, which is also its argument where calls follow each other."""

    def forward(self, x: Tensor) -> Tensor:
        self.condition = super().forward(x) + self.condition.tanh()
        return self.condition


class ByProperty(Conditioned):
    @property
    def scale(self) -> Tensor:
        return self.hidden * 2

    def forward(self, x: Tensor) -> Tensor:
        self.hidden, self.condition = self.condition, self.scale
        return super().forward(x)


class Net(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(kind() for _ in range(2))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        for layer in self.layers:
            layer.condition = layer.hidden = self.embed(condition)
        for layer in self.layers:
            x = layer(layer(x))
        return x


@pytest.mark.parametrize("kind", [Conditioned, Recurrent, ByFunction, ItsOwnOutput, ByProperty])
def test_the_tensors_of_the_first_call_return(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    net = Net(kind).to(DEVICE)
    other = copy.deepcopy(net)
    ckpt_kernels.convert(other, recompute={"layers": "checkpoint"})
    gradients = []
    for each in (net, other):
        x = random_tensor(4, WIDTH).requires_grad_()
        first, second = (each(x, random_tensor(1, WIDTH) * sign) for sign in (1, -1))
        for layer in each.layers:
            layer.condition = None
        (first * second).mean().backward()
        assert all(layer.condition is None for layer in each.layers)
        gradients.append({name: p.grad for name, p in each.named_parameters()} | {"x": x.grad})
    assert close(*gradients)


class Cached(nn.Module):
    """Replaces a tensor at each call that no code of the layer reads."""

    last: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        self.last = last = self.linear(self.norm(x))
        return x + torch.tanh(last)


def test_a_tensor_that_the_layer_only_writes_is_freed() -> None:
    layers = nn.Sequential(Cached(), Cached()).to(DEVICE)
    ckpt_kernels.convert(layers, recompute={"?": "checkpoint"})
    x = random_tensor(4, WIDTH)
    layers(x)
    storages = [StorageWeakRef(layer.last.untyped_storage()) for layer in layers]
    y = layers(x)
    assert all(storage.expired() for storage in storages)
    y.sum().backward()


def test_a_write_to_such_a_tensor_is_an_error() -> None:
    net = Net(Conditioned).to(DEVICE)
    ckpt_kernels.convert(net, recompute={"layers": "checkpoint"})
    x = random_tensor(4, WIDTH)
    y = net(x, random_tensor(1, WIDTH))
    conditions = [layer.condition for layer in net.layers]
    for layer in net.layers:
        layer.condition = None
    conditions[1].mul_(2)
    with pytest.raises(RuntimeError, match=r"condition of a checkpointed layer, .* was modified by an in-place"):
        y.sum().backward()

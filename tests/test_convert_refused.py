"""Running statistics that torch rejects: a converted model raises the same type of error."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ckpt_kernels

from .conftest import DEVICE
from .conversion import WIDTH


def mean_only(norm: nn.Module) -> None:
    norm.running_mean = None


def variance_only(norm: nn.Module) -> None:
    norm.running_var = None


def wide(norm: nn.Module) -> None:
    norm.running_mean = norm.running_mean.double()


def requires_gradients(norm: nn.Module) -> None:
    norm.running_var.requires_grad_()


def longer(norm: nn.Module) -> None:
    norm.running_mean = torch.zeros(2 * WIDTH, device=DEVICE)


def momentum_is_a_tensor(norm: nn.Module) -> None:
    norm.momentum = torch.tensor(0.5)


class ByFunction(nn.Module):
    """A batch norm that calls torch's function itself."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.act = norm, nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, True, 0.1)


_REJECTED = [mean_only, variance_only, wide, requires_gradients, longer, momentum_is_a_tensor]


@pytest.mark.parametrize("around", [nn.Sequential, lambda norm: nn.Sequential(norm, nn.ReLU()), ByFunction])
@pytest.mark.parametrize(
    "kind", [nn.BatchNorm1d, lambda width: nn.InstanceNorm1d(width, True, track_running_stats=True)]
)
@pytest.mark.parametrize("change", _REJECTED)
def test_running_statistics_that_torch_rejects(
    change: Callable[[nn.Module], None], kind: Callable[[int], nn.Module], around: Callable[[nn.Module], nn.Module]
) -> None:
    if change is wide and DEVICE != "cpu":
        pytest.skip("torch's GPU kernels read the statistics as float32, whatever their dtype")
    results = []
    for convert in (False, True):
        norm = kind(WIDTH).to(DEVICE)
        model = around(norm)
        if convert:
            ckpt_kernels.convert(model)
        change(norm)
        input = torch.linspace(-1, 1, 6 * WIDTH, device=DEVICE).view(6, WIDTH)
        input = input if isinstance(norm, nn.BatchNorm1d) else input.t().reshape(1, WIDTH, 6)
        try:
            results.append([model(input).detach(), norm.running_mean, norm.running_var])
        except (RuntimeError, ValueError, TypeError) as error:
            results.append(type(error))
    theirs, ours = results
    if isinstance(theirs, list):
        torch.testing.assert_close(ours, theirs)
    else:
        assert ours is theirs

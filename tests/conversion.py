"""A model and its converted twin, for the tests of `convert`."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ckpt_kernels import memory

from .conftest import DEVICE

INNER = 48


def kept(model: nn.Module, *inputs: Tensor) -> int:
    return memory.saved_bytes(model, *[i.detach().clone().requires_grad_() for i in inputs])


def twins(kind: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = kind().to(DEVICE)
    return model, copy.deepcopy(model)

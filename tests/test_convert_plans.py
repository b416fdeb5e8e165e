"""Converted norms that look up a plan before other checks."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as TF

import ckpt_kernels

from .conftest import DEVICE

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="plans are for the CPU")

CASES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "layer norm": (lambda: nn.LayerNorm(64), torch.randn(8, 64)),
    "group norm": (lambda: nn.GroupNorm(4, 8), torch.randn(2, 8, 4, 4)),
}


def node_of(module: nn.Module, input: Tensor) -> str:
    """The name of the autograd node of the output."""
    return module(input.clone().requires_grad_()).grad_fn.name()


def is_torchs(name: str) -> bool:
    return name.startswith(("NativeLayerNorm", "NativeGroupNorm"))


@pytest.mark.parametrize("patched", ["layer_norm", "group_norm"])
def test_plans_of_converted_norms_see_patches(patched: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, small = CASES[patched.replace("_", " ")]
    module = make()
    ckpt_kernels.convert(module)
    for _ in range(2):  # the second call has a plan
        assert not is_torchs(node_of(module, small))
    calls: list[str] = []
    function = getattr(TF, patched)
    monkeypatch.setattr(TF, patched, lambda *args, **kwargs: (calls.append(patched), function(*args, **kwargs))[1])
    assert is_torchs(node_of(module, small)) and calls == [patched]


@pytest.mark.parametrize("shape", [(3, 8), (3, 6, 4, 4), (3, 8, 4)], ids=str)
def test_plans_of_converted_group_norms_take_what_torch_takes(shape: tuple[int, ...]) -> None:
    plain, module = nn.GroupNorm(2, 8), nn.GroupNorm(2, 8)
    ckpt_kernels.convert(module)
    x = torch.randn(shape)
    # The function makes the plan for any shape.
    if shape[1] == 8:
        ckpt_kernels.functional.group_norm(x, 2, module.weight, module.bias, module.eps)
        torch.testing.assert_close(module(x), plain(x))
        assert is_torchs(node_of(module, x)) == (len(shape) == 2)
    else:
        with pytest.raises(RuntimeError):
            module(x)

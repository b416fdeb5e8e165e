"""At "block", torch's own ops compute small norms and activations that stand alone."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as TF

import ckpt_kernels
from ckpt_kernels.convert.rules import channel_norms, norms, pointwise

# A module, with a small and a large input.
CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, Tensor]] = {
    "layer norm": (lambda: nn.LayerNorm(64), torch.randn(8, 64), torch.randn(norms._MOST_LEFT // 64 + 1, 64)),
    "group norm": (
        lambda: nn.GroupNorm(4, 8),
        torch.randn(2, 8, 4, 4),
        torch.randn(channel_norms._MOST_LEFT // 128 + 1, 8, 4, 4),
    ),
    "activation": (nn.GELU, torch.randn(8, 64), torch.randn(pointwise._MOST_LEFT // 64 + 1, 64)),
}
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU our kernels compute small inputs too")


def node_of(module: nn.Module, input: Tensor) -> str:
    """The name of the autograd node of the output."""
    return module(input.clone().requires_grad_()).grad_fn.name()


def is_torchs(name: str) -> bool:
    return name.startswith(("NativeLayerNorm", "NativeGroupNorm", "Gelu"))


@pytest.mark.parametrize("case", CASES)
def test_small_inputs_are_computed_by_torch_at_block_alone(case: str) -> None:
    make, small, large = CASES[case]
    module = make()
    assert is_torchs(node_of(module, small))
    ckpt_kernels.convert(module, recompute="block")
    assert is_torchs(node_of(module, small)) and not is_torchs(node_of(module, large))
    for level in ("output", {"*": "block"}):
        ckpt_kernels.convert(module, recompute=level)
        assert not is_torchs(node_of(module, small)) and not is_torchs(node_of(module, large))


def test_group_norms_in_channels_last_are_always_ours() -> None:
    make, small, _ = CASES["group norm"]
    module = make()
    ckpt_kernels.convert(module, recompute="block")
    assert not is_torchs(node_of(module, small.to(memory_format=torch.channels_last)))


class AddNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = x + self.drop(y)
        return self.norm(x)


def test_a_small_sum_before_a_norm_is_fused_with_a_dropout_alone() -> None:
    model, x, y = AddNorm(), torch.randn(8, 64), torch.randn(8, 64)
    ckpt_kernels.convert(model, recompute="block")
    x.requires_grad_(), y.requires_grad_()
    assert not is_torchs(model(x, y).grad_fn.name())  # the mask is not kept
    assert is_torchs(model.eval()(x, y).grad_fn.name())


@pytest.mark.parametrize("patched", ["layer_norm", "group_norm"])
def test_plans_of_converted_norms_see_patches(patched: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, small, _ = CASES[patched.replace("_", " ")]
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

"""Norms over the channels of maps, as they lie in memory: numbers, strides, recipes, and modules that use them."""

import copy

import pytest
import torch
from torch import Tensor, nn

import ckpt_kernels
from ckpt_kernels import functional as F
from ckpt_kernels import ops
from ckpt_kernels.functional.map_norm import map_norm
from ckpt_kernels.memory import saved_bytes
from ckpt_kernels.ops.channel_layout import last_strides
from ckpt_kernels.ops.map_norm import MapNormOptions
from ckpt_kernels.recompute import discard_outputs

from .conftest import DEVICE, emulated, where

# Channels and pixels that vectors and tiles divide, or not; samples that tiles do not divide; long rows of channels.
SHAPES = ((2, 32, 8, 8), (3, 37, 5, 7), (2, 5, 131), (1, 1100, 3, 2), (2, 3, 4, 3, 5), (2, 70, 9, 17), (2, 1, 3, 4))
LAYOUTS = ("contiguous", "last")


def lying(tensor: Tensor, layout: str) -> Tensor:
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "last" else tensor.contiguous()


def options(centered: bool = True, activation: str = "identity", last: bool = False) -> MapNormOptions:
    return MapNormOptions(1e-5, centered, activation, 0.0, False, last)


def operands(shape: tuple, layout: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(shape))
    x, w, b = (torch.randn(size, generator=generator) for size in (shape, shape[1:2], shape[1:2]))
    return [t.to(DEVICE, dtype).requires_grad_() for t in (lying(2 * x + 1, layout), w + 1, b)]


def of_rows(x: Tensor, w: Tensor, b: Tensor, centered: bool, activation: str) -> Tensor:
    rows, shape = x.movedim(1, -1), x.shape[1:2]
    if centered:
        return F.layer_norm(rows, shape, w, b, activation=activation).movedim(-1, 1)
    return F.rms_norm(rows, shape, w, 1e-5, activation=activation).movedim(-1, 1)


@where(lambda backend, shape, layout: not emulated(backend) or (shape == SHAPES[1] and layout == "contiguous"))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_numbers_are_those_of_rows(shape: tuple, layout: str, served: tuple[str, torch.dtype]) -> None:
    """The rows' numbers meet the contract; those of maps have the same bits, sums over all pixels excepted."""
    _, dtype = served
    g = torch.randn(shape, device=DEVICE).to(dtype)
    for centered, activation in ((True, "identity"), (False, "silu")):
        x, w, b = operands(shape, layout, dtype)
        b = b if centered else None
        leaves = [t for t in (x, w, b) if t is not None]
        expected = of_rows(x, w, b, centered, activation)
        rows = torch.autograd.grad(expected, leaves, g, retain_graph=True)
        for output, incoming in ((0, 0), (0, 1), (1, 0), (1, 1)):
            found = map_norm(x, w, b, options(centered, activation, bool(output)))
            assert torch.equal(found, expected)
            grads = torch.autograd.grad(found, leaves, lying(g, LAYOUTS[incoming]))
            assert torch.equal(grads[0], rows[0])
            for grad, row in zip(grads[1:], rows[1:], strict=True):
                torch.testing.assert_close(grad, row)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout: str, backend: str) -> None:
    x, w, b = operands((2, 6, 3, 5), layout)
    for last in (False, True):
        found = map_norm(x, w, b, options(last=last))
        assert found.stride() == (last_strides(x.shape) if last else torch.empty(x.shape).stride())
        assert not found._is_view()
        # An expanded gradient, as that of a sum, is copied.
        for grad in (torch.ones_like(found), torch.ones((), device=DEVICE).expand(x.shape)):
            (grad_input,) = torch.autograd.grad(found, x, grad, retain_graph=True)
            assert grad_input.stride() == x.stride()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_discarded_output_is_recomputed(layout: str, backend: str) -> None:
    x, w, b = operands((2, 6, 3, 5), layout)

    def step() -> Tensor:
        return map_norm(x, w, b, options(activation="gelu", last=layout == "last")).square()

    kept = step()
    with discard_outputs():
        discarded = step()
    assert torch.equal(kept, discarded)
    for a, e in zip(*(torch.autograd.grad(y.sum(), (x, w, b)) for y in (discarded, kept)), strict=True):
        assert torch.equal(a, e)
    # The input, two statistics of each pixel, weight and bias.
    assert saved_bytes(discard_outputs()(step)) == 4 * (x.numel() + 2 * x.numel() // 6 + 2 * 6)


def test_each_gradient_alone_is_the_same(backend: str) -> None:
    tensors = operands((2, 6, 3, 5), "contiguous")
    every = torch.autograd.grad(map_norm(*tensors, options()).square().sum(), tensors)
    for index, grad in enumerate(every):
        alone = [t.detach().requires_grad_(i == index) for i, t in enumerate(tensors)]
        map_norm(*alone, options()).square().sum().backward()
        assert torch.equal(alone[index].grad, grad)


def test_maps_without_elements(backend: str) -> None:
    x, w, b = operands((0, 6, 3, 5), "contiguous")
    grads = torch.autograd.grad(map_norm(x, w, b, options()).sum(), (x, w, b))
    assert grads[0].shape == x.shape and not grads[1].any() and not grads[2].any()


def test_second_derivatives() -> None:
    tensors = [t.detach().double().requires_grad_() for t in operands((2, 3, 2, 3), "contiguous")]
    assert torch.autograd.gradgradcheck(lambda *t: map_norm(*t, options(activation="silu")), tensors)


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        rows = x.permute(0, 2, 3, 1)
        rows = torch.nn.functional.layer_norm(rows, self.normalized_shape, self.weight, self.bias, self.eps)
        return rows.permute(0, 3, 1, 2)


class Called(LayerNorm2d):
    """A branch, so that the call of the function is replaced, and not the module's forward."""

    fast = False

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        if self.fast:
            x = x.float()
        else:
            x = torch.nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class Written(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(channels)), nn.Parameter(torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        x_hat = (x - mean) / torch.sqrt((x - mean).pow(2).mean(1, keepdim=True) + 1e-6)
        return self.weight[:, None, None] * x_hat + self.bias[:, None, None]


@pytest.mark.skipif(DEVICE != "cpu", reason="maps are computed as they lie on the CPU")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", [LayerNorm2d, Called, Written])
def test_modules_compute_maps_as_they_lie(norm: type, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (norm is Called and layout == "last"):  # rows as they lie
        monkeypatch.setattr(ops.row_norm.row_norm, "forward", None)
    plain = nn.Sequential(norm(12))
    twin = copy.deepcopy(plain)
    ckpt_kernels.convert(twin, recompute="block")
    x = operands((2, 12, 5, 6), layout)[0]
    found, expected = twin(x), plain(x)
    torch.testing.assert_close(found, expected)
    assert found.stride() == expected.stride()
    for a, e in zip(*(torch.autograd.grad(y.square().sum(), x) for y in (found, expected)), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(DEVICE != "cpu", reason="maps are computed as they lie on the CPU")
def test_a_bias_alone_keeps_nothing() -> None:
    model = nn.Sequential(Written(12))
    ckpt_kernels.convert(model, recompute="block")
    model[0].weight.requires_grad_(False)
    x = operands((2, 12, 5, 6), "contiguous")[0].detach()
    assert saved_bytes(model, x) <= 4 * 12

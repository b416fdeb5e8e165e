"""Norms that `convert` recognises by the function that they compute."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ckpt_kernels

from .conftest import DEVICE
from .conversion import WIDTH, close, kept, random_tensor, reason_of, replacement_of, results_of


class Norm(nn.Module):
    """An RMS norm as models write it."""

    def __init__(self, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.variance_epsilon = 1e-6
        self.offset = offset

    def forward(self, input: Tensor) -> Tensor:
        wide = input.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return (wide * (self.offset + self.weight.float())).type_as(input)


class RoundsFirst(Norm):
    def forward(self, input: Tensor) -> Tensor:
        wide = input.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(input.dtype)


class EpsOutside(Norm):
    def forward(self, input: Tensor) -> Tensor:
        wide = input.float()
        wide = wide / (wide.square().mean(-1, keepdim=True).sqrt() + self.variance_epsilon)
        return (wide * self.weight.float()).type_as(input)


class OfHalf(Norm):
    """A partial norm: the statistics are of the first half of a row."""

    def forward(self, input: Tensor) -> Tensor:
        wide = input.float()
        wide = wide * torch.rsqrt(wide[..., : WIDTH // 2].square().mean(-1, keepdim=True) + self.variance_epsilon)
        return (wide * self.weight.float()).type_as(input)


class InBfloat16(Norm):
    def forward(self, input: Tensor) -> Tensor:
        return input * torch.rsqrt(input.square().mean(-1, keepdim=True) + self.variance_epsilon) * self.weight


class Centered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.beta = nn.Parameter(torch.rand(WIDTH))
        self.eps = 1e-5

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input.float(), (WIDTH,), self.gamma.float(), self.beta.float(), self.eps).type_as(input)


class WithoutWeightNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.eps = 1e-6

    def forward(self, input: Tensor) -> Tensor:
        wide = input.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).type_as(input)


class Normalizes(nn.Module):
    """A norm that rounds the length, the quotient, and both products."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.scale = WIDTH**0.5
        self.gamma = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH).view(shape))

    def forward(self, input: Tensor) -> Tensor:
        return F.normalize(input, dim=-1) * self.scale * self.gamma


class NormalizesChannels(Normalizes):
    def forward(self, input: Tensor) -> Tensor:
        return F.normalize(input, dim=1) * self.scale * self.gamma


class UnusedBias(Norm):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.ones(WIDTH))


class ByTorch(Norm):
    def forward(self, input: Tensor) -> Tensor:
        return torch.rms_norm(input, [WIDTH], self.weight, 1e-6)


class Calls(nn.Module):
    """Calls the norms of torch that torch.nn.functional wraps."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, input: Tensor) -> Tensor:
        h = torch.rms_norm(input, (WIDTH,), eps=1e-6) + torch.layer_norm(input, (WIDTH,), self.linear.bias)
        h = h + torch.layer_norm(input, (WIDTH,), None, None, 1e-5, False)
        return self.linear(torch.group_norm(h.unsqueeze(-1), 2, cudnn_enabled=False).squeeze(-1))


class WithoutWeight(nn.Module):
    """The same under another name, written in a helper."""

    def scaled(self, wide: Tensor) -> Tensor:
        return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)

    def forward(self, input: Tensor) -> Tensor:
        return self.scaled(input.float()).type_as(input)


@pytest.mark.parametrize(
    ("norm", "found"),
    (
        (Norm(), "rms_norm"),
        (Norm(1.0), "rms_norm (weight_offset=1)"),
        (RoundsFirst(), "rms_norm (cast_before_weight)"),
        (Centered(), "layer_norm"),
        (WithoutWeightNorm(), "rms_norm"),
        (WithoutWeight(), "rms_norm"),
        (UnusedBias(), "rms_norm"),
        (ByTorch(), "rms_norm"),
        (nn.RMSNorm(WIDTH), "rms_norm"),
        (nn.LayerNorm((4, WIDTH)), "layer_norm"),
        (nn.LayerNorm(WIDTH, elementwise_affine=False), "layer_norm"),
    ),
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_norms_are_recognised_by_their_function(norm: nn.Module, found: str) -> None:
    model = nn.Sequential(norm, nn.Linear(WIDTH, WIDTH)).to(DEVICE)
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        eager = results_of(model, random_tensor(3, 4, WIDTH, dtype=dtype))
        assert replacement_of(ckpt_kernels.convert(model), "0") == found
        ours = results_of(model, random_tensor(3, 4, WIDTH, dtype=dtype))
        assert close(ours, eager, 1e-5 if dtype == torch.float32 else 0.02)
        ckpt_kernels.revert(model)


@pytest.mark.parametrize("kind", (Norm, RoundsFirst, Centered))
def test_bfloat16_inputs_and_float32_weights_give_the_same_dtype(kind: type[nn.Module]) -> None:
    norm, input = kind().to(DEVICE), random_tensor(3, 4, WIDTH, dtype=torch.bfloat16)
    eager = norm(input)
    assert ckpt_kernels.convert(norm).replaced
    ours = norm(input)
    assert ours.dtype == eager.dtype
    torch.testing.assert_close(ours, eager, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize(("kind", "why"), ((EpsOutside, "none of our row norms"), (OfHalf, "a slice of")))
def test_a_norm_with_another_function_is_left_alone(kind: type[nn.Module], why: str) -> None:
    model = nn.Sequential(kind(), nn.Linear(WIDTH, WIDTH))
    type(model[0]).__name__ = "SomeNorm"
    report = ckpt_kernels.convert(model)
    assert replacement_of(report, "0") is None and why in reason_of(report, "0")
    assert "left alone" in str(report) and why in str(report)


def test_a_norm_that_rounds_bfloat16_is_fused_in_float32_only() -> None:
    norm = InBfloat16().to(DEVICE)
    report = ckpt_kernels.convert(norm)
    assert replacement_of(report, "") == "rms_norm" and "weights are bfloat16" in reason_of(report, "")
    narrow = random_tensor(3, 4, WIDTH, dtype=torch.bfloat16)
    assert torch.equal(norm.to(torch.bfloat16)(narrow), InBfloat16.forward(norm, narrow))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("norm", "shape"), [(Normalizes(WIDTH), (8, WIDTH)), (NormalizesChannels(WIDTH, 1, 1), (2, WIDTH, 6, 5))]
)
def test_a_norm_by_normalize_is_no_less_exact_in_16_bits(
    norm: nn.Module, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    norm = copy.deepcopy(norm).to(DEVICE, dtype)
    input = random_tensor(*shape, dtype=dtype)
    truth = results_of(copy.deepcopy(norm).double(), input.double())
    eager, eager_kept = results_of(norm, input), kept(norm, input)
    report = ckpt_kernels.convert(norm)
    assert report.replaced and not report.left_alone
    for name, ours in results_of(norm, input).items():
        error, allowed = ((t.double() - truth[name]).abs().max() for t in (ours, eager[name]))
        assert error <= 1.5 * allowed + torch.finfo(dtype).eps * truth[name].abs().max()
    assert kept(norm, input) <= 0.75 * eager_kept


def test_the_reason_speaks_of_weights_only_where_there_are_any() -> None:
    class NoWeightNorm(nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            return input * torch.rsqrt(input.square().mean(-1, keepdim=True) + 1e-6)

    report = ckpt_kernels.convert(nn.Sequential(NoWeightNorm()))
    assert replacement_of(report, "0") == "rms_norm" and "its input is bfloat16" in reason_of(report, "0")


def test_functions_of_torch_are_replaced_as_their_wrappers_are() -> None:
    model = Calls().to(DEVICE)
    input = random_tensor(6, WIDTH)
    eager = results_of(model, input)
    assert replacement_of(ckpt_kernels.convert(model), "") == "rms_norm; 2 x layer_norm; group_norm"
    assert close(results_of(model, input), eager, 1e-5)


def test_a_norm_of_a_part_of_an_image_is_left_alone() -> None:
    class OfACorner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(WIDTH, 1, 1))

        def forward(self, input: Tensor) -> Tensor:
            corner = input[:, :, :60, :60]
            return self.weight * corner * torch.rsqrt(corner.square().mean(1, keepdim=True) + 1e-6)

    norm = OfACorner().to(DEVICE)
    ckpt_kernels.convert(norm)
    assert norm(random_tensor(1, WIDTH, 64, 64)).shape == (1, WIDTH, 60, 60)


def test_scales_and_positions_are_no_norms() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.ones(WIDTH))

        def forward(self, input: Tensor) -> Tensor:
            return input * self.gamma

    report = ckpt_kernels.convert(nn.Sequential(Scale(), nn.Linear(WIDTH, WIDTH), nn.Embedding(3, 4)))
    assert not report.replaced and not report.left_alone and "nothing was replaced: it has no norm" in str(report)

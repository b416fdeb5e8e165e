"""Differences that trials must detect, strides of outputs, and saved bytes under autocast."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format

import ckpt_kernels

from .conftest import DEVICE
from .conversion import WIDTH, close, kept, random_tensor, results_of, twins
from .test_convert_outside import LEVELS, RMS, computed
from .test_convert_tried import Gated, found_in, rows

# Differences that trials must detect


class Capped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.sigmoid(x)
        return y - F.relu(y - 20.0)


class CutOff(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x) * torch.sigmoid(400 - x)


class CappedFormula(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.linear(x) * 100
        return F.gelu(hidden) - F.relu(hidden - 20.0)


class CappedNorm(RMS):
    def forward(self, x: Tensor) -> Tensor:
        x = x - F.hardswish(x - 30)
        return super().forward(x)


class Lengths(RMS):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * max(1.0, math.sqrt(x.shape[1] / 512))


class Halves(RMS):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + x.shape[1] // 512)


class Packed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x.contiguous())


@pytest.mark.parametrize("kind", [Capped, CutOff, CappedFormula, CappedNorm, Lengths, Halves, Packed])
def test_functions_that_differ_on_large_inputs_are_unchanged(kind: type[nn.Module]) -> None:
    x = torch.cat((random_tensor(2, 600, WIDTH), 1000 * random_tensor(2, 600, WIDTH)))
    assert computed(kind, x)


class Bounded(nn.Module):
    """A norm whose parameters are replaced after the conversion."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(WIDTH)), nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        centered = x - x.mean(-1, keepdim=True)
        return centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + 1e-5) * self.weight + self.bias


@pytest.mark.parametrize("shape,dtype", [((1, 1, WIDTH), None), ((WIDTH,), torch.float64), ((1,), None)])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_replaced_parameters_are_read(name: str, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
    model = nn.Sequential(Bounded()).to(DEVICE)
    assert found_in(ckpt_kernels.convert(model)) == {"0": "layer_norm"}
    setattr(model[0], name, nn.Parameter(torch.rand(shape, dtype=dtype, device=DEVICE)))
    found = model(rows())
    ckpt_kernels.revert(model)
    expected = model(rows())
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("make", [lambda: nn.LayerNorm(8), lambda: nn.BatchNorm1d(8), lambda: nn.GroupNorm(2, 8)])
def test_dtypes_that_torch_rejects_are_rejected(make: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(make())
    ckpt_kernels.convert(model)
    with pytest.raises(RuntimeError):
        model(torch.rand(4, 8, 8, dtype=torch.float64))


def test_the_report_names_no_module_that_is_never_fused() -> None:
    class Squared(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x) ** 2

    report = ckpt_kernels.convert(nn.Sequential(nn.Conv1d(4, 8, 1), nn.GLU(dim=1), Squared()))
    assert found_in(report) == {"2": "bias_act (relu_squared) where it is fused, and without gradients"}
    assert [(entry.name, entry.reason) for entry in report.left_alone] == [
        ("1", "halves another dimension than the last")
    ]


# Layouts


@pytest.mark.parametrize(
    "make,shape",
    [
        (lambda: RMS(8), (2, 3, 4, 8)),
        (lambda: nn.RMSNorm(8), (2, 3, 4, 8)),
        (lambda: nn.LayerNorm(8), (2, 3, 4, 8)),
        (lambda: nn.InstanceNorm2d(3, affine=True), (2, 3, 4, 8)),
        (lambda: nn.GroupNorm(1, 3), (2, 3, 4, 8)),
        (lambda: nn.BatchNorm2d(3), (2, 3, 4, 8)),
    ],
    ids=["hand-written", "RMSNorm", "LayerNorm", "InstanceNorm", "GroupNorm", "BatchNorm"],
)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (0, 2, 3, 1), (2, 0, 1, 3), (0, 1, 3, 2)])
def test_outputs_of_norms_have_torchs_strides(make: Callable, shape: tuple[int, ...], order: tuple[int, ...]) -> None:
    """`order` is the order of the dimensions in memory."""
    torch.manual_seed(0)
    model = nn.Sequential(make()).to(DEVICE)
    converted = copy.deepcopy(model)
    ckpt_kernels.convert(converted)
    inner = random_tensor(*[shape[d] for d in order])
    x = inner.permute([order.index(d) for d in range(len(order))])
    for input in (x, x[:, :, :, :], x[1:]):
        expected, found = model(input), converted(input)
        if isinstance(model[0], nn.GroupNorm) and DEVICE == "cuda":
            # On GPUs torch's output is always contiguous; ours keeps the input's memory format, as on the CPU.
            expected = expected.to(memory_format=suggest_memory_format(input))
        assert [s for s, n in zip(found.stride(), found.shape, strict=True) if n > 1] == [
            s for s, n in zip(expected.stride(), expected.shape, strict=True) if n > 1
        ]
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("make", [lambda: nn.GroupNorm(2, 8), lambda: nn.InstanceNorm2d(8), lambda: RMS(4)])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_a_part_of_a_large_tensor_does_not_keep_the_whole(make: Callable, requires_grad: bool) -> None:
    model = nn.Sequential(make()).to(DEVICE)
    converted = copy.deepcopy(model)
    ckpt_kernels.convert(converted)
    whole = random_tensor(2, 8, 64, 64)

    def saved(model: nn.Module) -> int:
        part = whole[..., :4, :4].detach().requires_grad_(requires_grad)
        return ckpt_kernels.memory.saved_bytes(model, part)

    assert saved(converted) <= max(saved(model) * 1.25, 2048)


# Autocast, and inputs that are not kept


class InPlaceResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 48), nn.GELU(), nn.Linear(48, WIDTH))
        self.gated = Gated()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            x = self.embed(x).float()
            x += self.mlp(x)
            x += self.gated(x)
        return x


@pytest.mark.parametrize("level", LEVELS)
def test_a_residual_written_in_place_under_autocast(level: str) -> None:
    model, converted = twins(InPlaceResidual)
    ckpt_kernels.convert(converted, recompute=level)
    assert close(results_of(converted, rows()), results_of(model, rows()), 0.02)


@pytest.mark.parametrize("level", ["output", "all"])
def test_an_mlp_under_autocast_keeps_no_more(level: str) -> None:
    model = nn.Sequential(nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 32)).to(DEVICE)
    converted = copy.deepcopy(model)
    ckpt_kernels.convert(converted, recompute=level)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert kept(converted, random_tensor(256, 32)) <= kept(model, random_tensor(256, 32))


@pytest.mark.parametrize("make", [lambda: nn.RMSNorm(WIDTH), RMS, Bounded])
def test_data_may_be_written_to_between_calls(make: Callable[[], nn.Module]) -> None:
    """Eager torch does not keep an input that requires no gradient."""
    model = nn.Sequential(make(), nn.Linear(WIDTH, WIDTH)).to(DEVICE)
    if DEVICE != "cpu" and isinstance(model[0], nn.RMSNorm):
        pytest.skip("on a GPU torch's own RMSNorm keeps its input")
    ckpt_kernels.convert(model)
    data, loss = rows(), torch.zeros((), device=DEVICE)
    for factor in (1, 2):
        data.mul_(factor)
        loss = loss + model(data).sum()
    loss.backward()
    with torch.inference_mode():
        features = rows() + 0
    model(features).sum().backward()


class Functional(nn.Module):
    """Calls of F.rms_norm with a write to the input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.linear(x)
        hidden += F.rms_norm(hidden, (WIDTH,))
        maps = F.rms_norm(hidden.view(2, 3, 2, -1).transpose(1, 2), (16,)).transpose(1, 2)
        return maps.contiguous().view(-1, WIDTH) + F.rms_norm(x, (WIDTH,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_functional_norms_whose_inputs_are_written_to(dtype: torch.dtype) -> None:
    model, converted = twins(Functional)
    given = random_tensor(6, WIDTH, dtype=dtype)
    ckpt_kernels.convert(converted.to(dtype))
    outcomes = []
    for module in (converted, model.to(dtype)):
        try:
            outcomes.append(results_of(module, given))
        except RuntimeError:
            outcomes.append({})
    # If eager torch keeps the input, the write is an error: in float32, and on GPUs, where rms_norm is one op.
    assert bool(outcomes[1]) == (dtype == torch.bfloat16 and DEVICE != "cuda")
    assert bool(outcomes[0]) or not outcomes[1]
    assert not outcomes[1] or close(*outcomes, 0.05 if dtype == torch.bfloat16 else 1e-4)


def test_a_group_norm_of_vectors_keeps_no_more() -> None:
    class OfVectors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return F.group_norm(self.linear(x), 2)

    model = OfVectors().to(DEVICE)
    eager = kept(model, random_tensor(64, 8))
    ckpt_kernels.convert(model)
    assert kept(model, random_tensor(64, 8)) <= eager

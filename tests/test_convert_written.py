"""Hand-written modules, which `convert` recognises by their function: saved bytes and the report."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ckpt_kernels

from .conftest import DEVICE
from .conversion import INNER, WIDTH, close, kept, random_tensor, reason_of, replacement_of, results_of, twins


class SwiGLU(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        value, gate = h.chunk(2, dim=-1)
        return F.silu(gate) * value


class StarReLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.tensor(0.9)), nn.Parameter(torch.tensor(-0.4))

    def forward(self, h: Tensor) -> Tensor:
        return self.scale * F.relu(h) ** 2 + self.bias


class Written(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, h: Tensor) -> Tensor:
        return self.function(h)


def _halves(how: str) -> Callable[[Tensor], Tensor]:
    def gate(h: Tensor) -> Tensor:
        n = h.shape[-1] // 2
        if how == "split":
            a, b = h.split(n, -1)
        elif how == "slices":
            a, b = h[..., :n], h[..., n:]
        elif how == "tensor_split":
            a, b = torch.tensor_split(h, 2, dim=-1)
        elif how == "unbind":
            a, b = h.unflatten(-1, (2, n)).unbind(-2)
        else:
            a, b = h.chunk(2, dim=h.dim() - 1)
        return F.silu(a) * b

    return gate


# The module by name, and the bound of the saved bytes at "output" as a fraction of eager torch's.
FOUND: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "SwiGLU": (SwiGLU, 0.5),
    "nn.GLU": (nn.GLU, 0.67),
    "F.glu": (lambda: Written(F.glu), 0.67),
    "silu written": (lambda: Written(lambda h: h * torch.sigmoid(h)), 0.5),
    "relu().square()": (lambda: Written(lambda h: F.relu(h).square()), 0.5),
    "relu() ** 2": (lambda: Written(lambda h: F.relu(h) ** 2), 0.5),
    "gelu by erf": (lambda: Written(lambda h: h * 0.5 * (1.0 + torch.erf(h / math.sqrt(2.0)))), 0.55),
    "leaky relu": (lambda: nn.LeakyReLU(0.3), 0.5),
    "relu6": (nn.ReLU6, 0.5),
    "hardtanh": (lambda: nn.Hardtanh(-0.5, 0.7), 0.5),
    "hardtanh from 0 to 6": (lambda: Written(lambda h: F.hardtanh(h, 0.0, 6.0)), 0.5),
    "hardswish by relu6": (lambda: Written(lambda h: h * F.relu6(h + 3) / 6), 0.5),
    "softplus with beta": (lambda: nn.Softplus(2.0), 0.5),
    "elu with alpha": (lambda: nn.ELU(0.5), 0.5),
    "prelu": (nn.PReLU, 0.5),
    "star relu": (StarReLU, 0.67),
    "F.normalize": (lambda: Normalized(), 0.51),
    **{f"halves by {how}": (lambda how=how: Written(_halves(how)), 0.5) for how in
       ("split", "slices", "tensor_split", "unbind", "chunk of dim")},
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_pointwise_modules_keep_less(name: str) -> None:
    make, share = FOUND[name]
    out = INNER if any(word in name for word in ("GLU", "glu", "halves")) else 2 * INNER
    model, twin = twins(lambda: nn.Sequential(nn.Linear(WIDTH, 2 * INNER), make(), nn.Linear(out, WIDTH)))
    levels = {}
    for level in ("block", "output", "all"):
        ckpt_kernels.convert(model, recompute=level)
        assert close(results_of(model, random_tensor(64, WIDTH)), results_of(twin, random_tensor(64, WIDTH)), 1e-4)
        levels[level] = kept(model, random_tensor(64, WIDTH)) - 64 * WIDTH * 4
    eager = kept(twin, random_tensor(64, WIDTH)) - 64 * WIDTH * 4
    assert levels["output"] <= (share + 0.01) * eager
    assert levels["block"] <= 1.01 * eager and levels["all"] <= levels["output"]


def test_a_gate_of_tanh_and_sigmoid_keeps_no_more_at_any_level() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, h: Tensor) -> Tensor:
            return self.out(torch.tanh(self.a(h)) * torch.sigmoid(self.b(h)))

    model, twin = twins(Gate)
    for level in ("block", "output", "all"):
        ckpt_kernels.convert(model, recompute=level)
        assert close(results_of(model, random_tensor(64, WIDTH)), results_of(twin, random_tensor(64, WIDTH)), 1e-4)
        assert kept(model, random_tensor(64, WIDTH)) <= kept(twin, random_tensor(64, WIDTH))


class ChannelNorm(nn.Module):
    """A layer norm over channels; `shape` is the shape of the weight and the bias."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(shape)), nn.Parameter(torch.rand(shape))

    def forward(self, h: Tensor) -> Tensor:
        mean = h.mean(1, keepdim=True)
        var = (h - mean).pow(2).mean(1, keepdim=True)
        return self.weight * ((h - mean) / torch.sqrt(var + 1e-6)) + self.bias


class ChannelNormOfVectors(ChannelNorm):
    def forward(self, h: Tensor) -> Tensor:
        mean = h.mean(1, keepdim=True)
        var = (h - mean).pow(2).mean(1, keepdim=True)
        return self.weight[:, None, None] * ((h - mean) / torch.sqrt(var + 1e-6)) + self.bias[:, None, None]


class Normalized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(2 * INNER))

    def forward(self, h: Tensor) -> Tensor:
        return F.normalize(h, dim=-1) * math.sqrt(2 * INNER) * self.gamma


class NormalizedMaps(nn.Module):
    """The norm of Wan's autoencoder."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale, self.gamma, self.bias = width**0.5, nn.Parameter(torch.rand(width, 1, 1) + 0.5), 0.0

    def forward(self, h: Tensor) -> Tensor:
        wide = h.dtype in (torch.float16, torch.bfloat16) or any(kind in str(h.dtype) for kind in ("float8_",))
        return F.normalize(h.float() if wide else h, dim=1).to(h.dtype) * self.scale * self.gamma + self.bias


class InFloat32(nn.LayerNorm):
    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h.float()).to(h.dtype)


class WithoutParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.normalized_shape, self.eps = (WIDTH,), 1e-6

    def forward(self, h: Tensor) -> Tensor:
        return F.layer_norm(h.float(), self.normalized_shape, None, None, self.eps).to(h.dtype)


@pytest.mark.parametrize(
    ("make", "found", "shape"),
    (
        (lambda: ChannelNormOfVectors((WIDTH,)), "layer_norm (channels first)", (2, WIDTH, 5, 6)),
        (lambda: ChannelNorm((WIDTH, 1, 1)), "layer_norm (channels first)", (2, WIDTH, 5, 6)),
        (lambda: ChannelNorm((1, WIDTH, 1, 1)), "layer_norm (channels first)", (2, WIDTH, 5, 6)),
        (lambda: InFloat32(WIDTH), "layer_norm", (4, 7, WIDTH)),
        (WithoutParameters, "layer_norm", (4, 7, WIDTH)),
        (lambda: NormalizedMaps(WIDTH), "rms_norm (channels first)", (2, WIDTH, 5, 6)),
    ),
    ids=("vector", "(C, 1, 1)", "(1, C, 1, 1)", "super().forward", "without parameters", "F.normalize"),
)
def test_hand_written_norms_are_recognised(make: Callable[[], nn.Module], found: str, shape: tuple[int, ...]) -> None:
    model, twin = twins(make)
    assert replacement_of(ckpt_kernels.convert(model), "") == found
    assert close(results_of(model, random_tensor(*shape)), results_of(twin, random_tensor(*shape)), 1e-4)
    last = random_tensor(*shape)
    if len(shape) == 4:
        last = last.to(memory_format=torch.channels_last)
    assert (
        model(random_tensor(*shape)).stride() == twin(random_tensor(*shape)).stride()
        and model(last).stride() == twin(last).stride()
    )
    narrow = random_tensor(*shape, dtype=torch.bfloat16)
    for module in (model, twin):
        # torch's layer norm rejects bfloat16 weights with a float32 input.
        module.to(torch.float32 if isinstance(module, InFloat32) else torch.bfloat16)
    torch.testing.assert_close(model(narrow).float(), twin(narrow).float(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e-9, 1e4])
def test_points_of_zeros_are_normalized_as_in_eager(scale: float) -> None:
    model, twin = twins(lambda: NormalizedMaps(WIDTH))
    ckpt_kernels.convert(model)
    given = random_tensor(2, WIDTH, 3, 4) * torch.where(torch.arange(4, device=DEVICE) > 1, 1.0, scale)
    outputs, gradients = [], []
    for module in (model, twin):
        leaf = given.clone().requires_grad_()
        outputs.append(module(leaf))
        gradients.append(torch.autograd.grad((outputs[-1] * random_tensor(2, WIDTH, 3, 4)).sum(), leaf)[0])
    torch.testing.assert_close(*outputs)
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-5 * gradients[1].abs().max()


@pytest.mark.skipif(DEVICE == "cuda", reason="torch's rms_norm on GPUs keeps its input, so the write is an error")
def test_a_residual_written_in_place_after_a_norm_in_16_bits() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.RMSNorm(WIDTH)
            self.ff = nn.Linear(WIDTH, WIDTH)

        def forward(self, h: Tensor) -> Tensor:
            h = h + 1
            h += self.ff(self.norm(h))
            return h

    model, twin = twins(Block)
    given = random_tensor(8, WIDTH, dtype=torch.bfloat16)
    ckpt_kernels.convert(model.to(torch.bfloat16))
    assert close(results_of(model, given), results_of(twin.to(torch.bfloat16), given), 0.02)


def test_a_copy_of_a_norms_output_is_discarded() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(WIDTH)
            self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

        def forward(self, h: Tensor) -> Tensor:
            h = self.norm(h)
            return self.attention(h, h, h, need_weights=False)[0]

    model, twin = twins(Attends)
    ckpt_kernels.convert(model)
    assert close(results_of(model, random_tensor(2, 16, WIDTH)), results_of(twin, random_tensor(2, 16, WIDTH)), 1e-4)
    saved = kept(twin, random_tensor(2, 16, WIDTH)) - kept(model, random_tensor(2, 16, WIDTH))
    assert saved >= 2 * 16 * WIDTH * 4


def test_activations_keep_the_strides_of_images() -> None:
    for make in (nn.GELU, nn.SiLU, lambda: Written(F.gelu)):
        model, twin = twins(make)
        ckpt_kernels.convert(model)
        maps = random_tensor(2, 8, 5, 6).to(memory_format=torch.channels_last)
        assert model(maps).stride() == twin(maps).stride() == maps.stride()
        rows = random_tensor(2, 5, 8).transpose(1, 2)
        assert model(rows).transpose(1, 2).view(2, 40).shape == (2, 40)


# The report


def test_the_report_measures_saved_bytes() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, INNER), nn.ReLU(), nn.Linear(INNER, WIDTH), nn.Dropout(0.0)).to(DEVICE)
    report = ckpt_kernels.convert(model, inputs=random_tensor(8, WIDTH))
    before, after = report.kept
    assert before == after and replacement_of(report, "3") is None
    assert report.as_dict()["kept"] == report.kept and report.backend in str(report)
    report = ckpt_kernels.convert(
        nn.Sequential(nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, 4)).to(DEVICE),
        inputs=random_tensor(8, WIDTH),
    )
    assert (
        report.kept[1] < report.kept[0] and f"{report.kept[1]:,}" in str(report) and "<table>" in report._repr_html_()
    )


def test_the_report_explains_unknown_modules() -> None:
    class MyGELU(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return h * torch.rand_like(h)

    class OddNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(WIDTH))

        def forward(self, h: Tensor) -> Tensor:
            return h / h.abs().sum(-1, keepdim=True) * self.weight

    report = ckpt_kernels.convert(nn.Sequential(MyGELU(), OddNorm()))
    assert "rand_like" in reason_of(report, "0") and "abs" in reason_of(report, "1")
    # No internal exception's name appears.
    assert not any(word in str(report) for word in ("Error", "Traceback", "NotTried"))


class ContiguousChannelNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        rows = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return rows.permute(0, 3, 1, 2).contiguous()


@pytest.mark.parametrize(("kind", "shape"), ((ContiguousChannelNorm, (8,)), (ChannelNorm, (8, 1, 1))))
@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last))
def test_norms_over_channels_keep_the_strides_of_their_outputs(
    kind: Callable[[tuple[int, ...]], nn.Module], shape: tuple[int, ...], memory_format: torch.memory_format
) -> None:
    model, maps = nn.Sequential(kind(shape)), random_tensor(2, 8, 5, 6).to(memory_format=memory_format)
    expected = model(maps)
    report = ckpt_kernels.convert(model)
    assert len(report.replaced) == 1
    torch.testing.assert_close(model(maps), expected)
    assert model(maps).stride() == expected.stride()

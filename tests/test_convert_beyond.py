"""Converted modules with inputs beyond those of the trials: other shapes, sizes, settings, errors."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ckpt_kernels

from .conftest import DEVICE
from .conversion import WIDTH, close, kept, random_tensor, results_of, twins
from .test_convert_norms import Norm, RoundsFirst
from .test_convert_tried import found_in, rows
from .test_convert_written import ChannelNorm


def rms(h: Tensor, dim: int = -1) -> Tensor:
    return h * torch.rsqrt(h.pow(2).mean(dim, keepdim=True) + 1e-6)


class Turns(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return F.silu(h.transpose(0, -1))


class SecondNorm(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return rms(h, 2)


class CappedNorm(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return rms(h - F.relu(h - 100))


class Of48Norm(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h * torch.rsqrt(h.pow(2).sum(-1, keepdim=True) / 48 + 1e-6)


class Doubled(nn.LayerNorm):
    def forward(self, h: Tensor) -> Tensor:
        return 2 * super().forward(h)


class Shifted(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return F.silu(h) + 1e-3


class Capped(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return F.silu(h) - F.relu(h - 20.0)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (Turns, (3, 4)),
        (SecondNorm, (2, 3, 4, 8)),
        (CappedNorm, (3, 8)),
        (Of48Norm, (3, 96)),
        (lambda: Doubled(WIDTH), (3, WIDTH)),
        (lambda: ChannelNorm((WIDTH, 1, 1)), (2, WIDTH, WIDTH, 3, 3)),
        (Norm, (3, 4, 1)),
        (lambda: nn.InstanceNorm2d(3, affine=True), (3, 9, 9)),
        (lambda: nn.GLU(1), (2, 6, 8)),
        (Shifted, (3, 8)),
        (Capped, (3, 8)),
    ],
)
def test_inputs_beyond_the_trials_give_the_same_results(make, shape) -> None:
    model, twin = twins(make)
    ckpt_kernels.convert(model)
    given = 200 * random_tensor(*shape)
    torch.testing.assert_close(model(given), twin(given))


@pytest.mark.parametrize(
    "around",
    [lambda: torch.autocast(DEVICE, torch.bfloat16), torch.inference_mode, torch.no_grad],
    ids=["autocast", "inference", "no grad"],
)
def test_conversion_within_a_context_finds_the_same(around) -> None:
    class Fresh(Norm):
        def forward(self, h: Tensor) -> Tensor:
            return rms(h) * self.weight

    class FreshAct(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return F.silu(h)

    with around():
        found = found_in(ckpt_kernels.convert(nn.Sequential(Fresh(), FreshAct())))
    assert found.items() >= {"0": "rms_norm", "1": "bias_act (silu)"}.items()


def test_a_norm_with_two_outputs() -> None:
    class PairNorm(Norm):
        def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
            return rms(h) * self.weight, h

    model = PairNorm().to(DEVICE)
    ckpt_kernels.convert(model)
    assert len(model(rows())) == 2


def test_a_lazy_norm_is_not_tried() -> None:
    class LazyNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.UninitializedParameter()

        def forward(self, h: Tensor) -> Tensor:
            return rms(h) * self.weight

    ckpt_kernels.convert(LazyNorm())


def test_a_norms_setting_that_changes() -> None:
    norm, twin = twins(Norm)
    ckpt_kernels.convert(norm)
    norm.offset = twin.offset = 1.0
    torch.testing.assert_close(norm(rows()), twin(rows()))


class ModulatedWrites(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        h, scale, shift = self.linear(h).chunk(3, -1)
        h = h * 1
        y = self.norm(h) * (1 + scale) + shift
        h += 1
        return y + h


@pytest.mark.skipif(DEVICE == "cuda", reason="torch's rms_norm on GPUs keeps its input, so the write is an error")
def test_a_write_after_a_modulated_norm_in_16_bits() -> None:
    model, twin = twins(ModulatedWrites)
    ckpt_kernels.convert(model.to(torch.bfloat16))
    given = random_tensor(4, WIDTH, dtype=torch.bfloat16)
    assert close(results_of(model, given), results_of(twin.to(torch.bfloat16), given), 0.03)


class Sums(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = RoundsFirst()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.norm(a + b)


def test_a_sum_of_narrow_inputs_and_a_wide_weight() -> None:
    model, twin = twins(Sums)
    ckpt_kernels.convert(model)
    given = random_tensor(3, WIDTH, dtype=torch.bfloat16), random_tensor(3, WIDTH, dtype=torch.bfloat16)
    given = [g.requires_grad_() for g in given]
    assert model(*given).dtype == twin(*given).dtype == torch.float32


class Marked(Tensor):
    seen = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen += 1
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_weight_of_another_class() -> None:
    norm = Norm().to(DEVICE)
    ckpt_kernels.convert(norm)
    norm.weight = nn.Parameter(norm.weight.detach().as_subclass(Marked))
    twin = Norm()
    twin.weight = norm.weight
    assert type(norm(rows())) is type(twin(rows()))


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.BatchNorm1d(WIDTH), (1, WIDTH)),
        (lambda: nn.GroupNorm(2, 8), (2, 4, 5)),
        (lambda: nn.InstanceNorm2d(3), (2, 2, 3, 9, 9)),
        (lambda: nn.GLU(), (2, 5)),
    ],
)
def test_errors_are_torchs(make, shape) -> None:
    model, twin = twins(make)
    ckpt_kernels.convert(model)
    errors = []
    for module in (model, twin):
        with pytest.raises((ValueError, RuntimeError)) as caught:
            module(random_tensor(*shape))
        errors.append((caught.type, str(caught.value), [b.tolist() for b in module.buffers()]))
    assert errors[0] == errors[1]


def test_group_norm_of_rows_keeps_no_more() -> None:
    model, twin = twins(lambda: nn.GroupNorm(2, 8))
    ckpt_kernels.convert(model)
    assert kept(model, random_tensor(64, 8)) <= kept(twin, random_tensor(64, 8))


class Squares(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return F.relu(h).square()


class WritesAfter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(WIDTH, WIDTH), Squares()

    def forward(self, h: Tensor) -> Tensor:
        h = self.linear(h)
        y = self.act(h)
        h += 1
        return y + h


def test_a_write_to_a_tensor_that_eager_does_not_keep() -> None:
    model, twin = twins(WritesAfter)
    ckpt_kernels.convert(model)
    assert close(results_of(model, rows()), results_of(twin, rows()))


def test_a_dropout_that_becomes_in_place() -> None:
    model = nn.Sequential(nn.Dropout(0.5))
    ckpt_kernels.convert(model)
    model[0].inplace = True
    given = rows()
    assert model(given) is given


# pointwise, rest


def test_a_patched_forward_of_an_activation_class_runs(monkeypatch) -> None:
    class Act(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return F.silu(h)

    class MLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.act, self.last = nn.Linear(WIDTH, 64), Act(), nn.Linear(64, WIDTH)

        def forward(self, h: Tensor) -> Tensor:
            return self.last(self.act(self.first(h)))

    model, twin = twins(MLP)
    ckpt_kernels.convert(model)
    monkeypatch.setattr(Act, "forward", lambda self, h: 2 * h)
    torch.testing.assert_close(model(rows()), twin(rows()))


def test_a_patched_forward_of_torchs_activation_runs(monkeypatch) -> None:
    monkeypatch.setattr(nn.GELU, "forward", lambda self, h: h.cumsum(-1))
    model, twin = twins(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()))
    ckpt_kernels.convert(model)
    torch.testing.assert_close(model(rows()), twin(rows()))


def test_an_activation_with_a_parameter() -> None:
    class Swish(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, h: Tensor) -> Tensor:
            return h * torch.sigmoid(self.weight * h)

    model, twin = twins(Swish)
    ckpt_kernels.convert(model)
    assert close(results_of(model, rows()), results_of(twin, rows()))


class OtherSlope(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h * torch.sigmoid(1.01 * h)


def test_a_function_close_to_silu_is_not_silu() -> None:
    model, twin = twins(OtherSlope)
    ckpt_kernels.convert(model)
    torch.testing.assert_close(model(rows()), twin(rows()))

"""Unknown modules whose names suggest a norm, activation, gate or experts: the report lists each with a reason."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import ckpt_kernels

from .conversion import reason_of

WIDTH = 16


class SnakeActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(WIDTH))

    def forward(self, h: Tensor) -> Tensor:
        return h + torch.sin(self.alpha * h) ** 2 / self.alpha


class HighwayGate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.opens = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        opened = torch.sigmoid(self.opens(h))
        return opened * torch.tanh(self.linear(h)) + (1 - opened) * h


class Experts(nn.Module):
    def __init__(self, act: Callable[[], nn.Module] = nn.Softsign) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 8), act(), nn.Linear(8, WIDTH)) for _ in range(2))

    def forward(self, h: Tensor) -> Tensor:
        return self.experts[0](h) + self.experts[1](h)


class Halved(nn.LayerNorm):
    def forward(self, h: Tensor) -> Tensor:
        half = h.half()
        return (half / half.norm(dim=-1, keepdim=True)).type(h.dtype) * self.weight


class CosGate(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        first, second = h.chunk(2, -1)
        return torch.cos(first) * second


class CubedGate(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        first, second = h.chunk(2, dim=-1)
        return first * first * first * second.to(first)


class GateOfTwo(nn.Module):
    def forward(self, h: Tensor, other: Tensor) -> Tensor:
        return torch.cos(h) * other


class PartsActivation(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        first, second = h.chunk(2, -1)
        return torch.cat((torch.relu(first), second), -1)


class Rms(nn.Module):
    eps = 1e-6

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, h: Tensor) -> Tensor:
        return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class PropertyNorm(Rms):
    @property
    def eps(self) -> float:
        return 1e-6

    def forward(self, h: Tensor) -> Tensor:
        return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps) * self.weight


class HeadsNorm(Rms):
    def forward(self, h: Tensor) -> Tensor:
        h = h.transpose(0, -1).transpose(0, -1)
        return h / (1e-6 + h.square().mean(-1, keepdim=True))


class MatrixNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH, WIDTH))

    def forward(self, h: Tensor) -> Tensor:
        return h / h.norm(dim=-1, keepdim=True) @ self.weight


OPTIONS = {"scale": 2.0}


class OptionsNorm(Rms):
    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h) * OPTIONS["scale"]


@pytest.mark.parametrize(
    ("make", "words"),
    (
        (lambda: nn.LeakyReLU(0.3), "computes none of our activations with negative_slope=0.3"),
        (nn.Hardsigmoid, "computes none of our activations"),
        (lambda: nn.LeakyReLU(0.3, inplace=True), "computes none of our activations"),
        (lambda: nn.Hardtanh(-2, 2), "computes none of our activations"),
        (nn.RReLU, "computes none of our activations"),
        (nn.PReLU, "has parameters"),
        (SnakeActivation, "has parameters"),
        (HighwayGate, "looks like a gate"),
        (Experts, "looks like experts"),
        (CosGate, "names cos"),
        (CubedGate, "computes none of our gates"),
        (GateOfTwo, "takes more than one tensor"),
        (PartsActivation, "names cat"),
        (PropertyNorm, "computes eps by a property"),
        (HeadsNorm, "computes what none of our row norms computes"),
        (MatrixNorm, "has other parameters than"),
        (OptionsNorm, "reads an object of type dict, which may change"),
        (lambda: Halved(WIDTH), "names half"),
        (nn.Tanh, "nothing to gain"),
        (lambda: nn.SiLU(inplace=True), "writes over its input"),
    ),
    ids=lambda given: getattr(given, "__name__", None),
)
def test_unknown_modules_have_a_reason(make: Callable[[], nn.Module], words: str) -> None:
    report = ckpt_kernels.convert(nn.Sequential(nn.Linear(WIDTH, WIDTH), make(), nn.Linear(WIDTH, WIDTH)))
    if words in ("nothing to gain", "writes over its input"):  # within an MLP, fusion saves memory
        report = ckpt_kernels.convert(nn.Sequential(make(), nn.Linear(WIDTH, WIDTH)))
        assert words in reason_of(report, "0")
    else:
        assert words in reason_of(report, "1")
    assert not report.replaced and "the reasons are below" in str(report)


def test_converted_modules_have_no_reason() -> None:
    report = ckpt_kernels.convert(nn.Sequential(Experts(nn.GELU), nn.Linear(WIDTH, WIDTH)))
    assert not report.left_alone and "MLP" in str(report)


def test_unselected_modules_have_no_reason() -> None:
    report = ckpt_kernels.convert(nn.Sequential(HighwayGate(), nn.LayerNorm(WIDTH)), include=["1"])
    assert [entry.name for entry in report.replaced] == ["1"] and not report.left_alone


def test_a_model_of_products_has_nothing_to_explain() -> None:
    report = ckpt_kernels.convert(nn.Sequential(nn.Linear(WIDTH, WIDTH)))
    assert not report.left_alone and "it has no norm, activation" in str(report)


class Decides(Rms):
    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h) if (h[0] > 0).all() else h


class Counted(Rms):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, h: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(h)


class Raises(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h.view(-1, 7)


class Draws(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h + torch.rand_like(h)


class Split(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return CosGate.forward(self, h)


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    (
        (Decides, "norm", "names all"),
        (Counted, "input_layernorm", "buffers"),
        (Counted, "ln_1", "buffers"),
        (Raises, "act", "computes with view"),
        (Draws, "activation_fn", "rand_like"),
        (Draws, "gelu2", "rand_like"),
        (Split, "gate", ""),
    ),
)
def test_modules_that_were_tried_are_explained_by_their_name(kind: type[nn.Module], name: str, words: str) -> None:
    model = nn.ModuleDict({name: kind(), "block": nn.ModuleDict({name: kind()}), "other": kind()})
    model["weights"] = nn.ModuleDict({"gate": nn.Linear(WIDTH, 2), "norm": nn.Identity(), "act": nn.Embedding(2, 2)})
    report = ckpt_kernels.convert(model)
    assert not report.replaced
    assert [entry.name for entry in report.left_alone] == [name, f"block.{name}"]
    assert all(words in entry.reason and entry.kind == kind.__name__ for entry in report.left_alone)


class Together(nn.Module):
    """Holds the parts of an MLP, and computes with them."""

    def __init__(self, parts: nn.ModuleDict | None) -> None:
        super().__init__()
        self.parts, self.first, self.act, self.last = parts, nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        first, act, last = ((self.parts or self._modules)[name] for name in ("first", "act", "last"))
        return last(act(first(x)))


def test_a_dict_of_modules_has_no_code_to_report() -> None:
    parts = nn.ModuleDict({"first": nn.Linear(4, 4), "act": nn.GELU(), "last": nn.Linear(4, 4)})
    (left,) = ckpt_kernels.convert(Together(parts)).left_alone
    assert left.kind == "Together" and "one by one" in left.reason


def test_a_parametrization_is_no_norm() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH))
    nn.utils.parametrizations.weight_norm(model[0])
    assert not ckpt_kernels.convert(model).left_alone

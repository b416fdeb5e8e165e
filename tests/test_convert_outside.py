"""What stands around a converted model: names of users, code that asks for its class, layouts, autocast, copies."""

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format

import ckpt_kernels

from .conftest import DEVICE
from .conversion import kept, twins
from .test_convert_composes import close
from .test_convert_rules import WIDTH, run
from .test_convert_rules import x as random
from .test_convert_tried import Gated, found_in, rows

LEVELS = ("block", "output", "all")


def computed(kind: Callable[[], nn.Module], *inputs: Tensor, level: str = "output") -> bool:
    """Whether a converted twin computes, forward and backward, what the model does."""
    torch.manual_seed(0)
    model = kind().to(DEVICE)
    torch.manual_seed(0)
    converted = kind().to(DEVICE)
    ckpt_kernels.convert(converted, recompute=level)
    return close(run(converted, *inputs), run(model, *inputs))


# Names


class Wraps(nn.Module):
    """Names that a converted class might want for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.original, self.found = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("around", torch.ones(WIDTH))
        self.rule = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.found(F.silu(self.original(x))) * self.around + self.rule(x)


@pytest.mark.parametrize("level", LEVELS)
def test_names_of_the_users_are_theirs(level: str) -> None:
    assert computed(Wraps, rows(), level=level)
    model = nn.Sequential(nn.LayerNorm(WIDTH)).to(DEVICE)
    before = set(vars(model[0]))
    ckpt_kernels.convert(model)
    assert set(vars(model[0])) == before
    model[0].original = "theirs"
    model[0](input=rows())
    assert not hasattr(model, "original")


class WithSettings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.settings = nn.LayerNorm(WIDTH), {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return self.__dict__["settings"][name]

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Frozen(nn.Module):
    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("__class__", "late"):
            raise AttributeError(name)
        super().__setattr__(name, value)

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    @property
    def inplace(self) -> bool:
        raise RuntimeError("nobody is to ask")

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.gelu(x))


@pytest.mark.parametrize("kind", [WithSettings, Frozen])
def test_attributes_that_run_code_are_not_asked_for(kind: type[nn.Module]) -> None:
    model = kind().to(DEVICE)
    expected = model(rows())
    ckpt_kernels.convert(model)
    torch.testing.assert_close(model(rows()), expected)


# Classes


class Scaled(nn.Module):
    def __init_subclass__(cls, scale: float = 1.0) -> None:
        cls.scale = scale


class ByArgument(Scaled, scale=3.0):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.gelu(x)) * self.scale


class ByAnnotations(ByArgument):
    factor: float = 2.0

    def forward(self, x: Tensor) -> Tensor:
        for name in type(self).__annotations__:
            x = x * getattr(self, name)
        return self.norm(F.gelu(x)) * len(type(self).__bases__)


class BySuper(ByArgument):
    def forward(self, x: Tensor) -> Tensor:
        return super(type(self), self).forward(F.gelu(x))


REGISTRY: dict[type, float] = {}


class ByRegistry(ByArgument):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.gelu(x)) * REGISTRY[type(self)]


REGISTRY[ByRegistry] = 2.0


@pytest.mark.parametrize("kind", [ByArgument, ByAnnotations, BySuper, ByRegistry])
@pytest.mark.parametrize("level", ["block", "output"])
def test_code_that_asks_for_its_class_sees_its_class(kind: type[nn.Module], level: str) -> None:
    assert computed(kind, rows(), level=level)


def test_what_holds_a_forward_across_revert_and_another_class_goes_on() -> None:
    model = nn.Sequential(nn.LayerNorm(WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)).to(DEVICE)
    ckpt_kernels.convert(model)
    held = model[0].forward
    expected = held(rows())
    model[0].forward = lambda input: held(input)
    ckpt_kernels.revert(model)
    assert torch.equal(model[0](rows()), expected)

    class Doubled(nn.LayerNorm):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * input

    model = nn.Sequential(nn.LayerNorm(WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)).to(DEVICE)
    ckpt_kernels.convert(model)
    model[0].__class__ = Doubled
    torch.testing.assert_close(model(rows()), model[2](F.gelu(2 * rows())))


class Reduced(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.norm = width, nn.LayerNorm(width)

    def __reduce__(self) -> tuple:
        return Reduced, (self.width,)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.norm(x))


class Restored(nn.LayerNorm):
    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = {}
        nn.Module.__init__(self)
        self.__dict__.update(state)


@pytest.mark.parametrize("make", [lambda: Reduced(WIDTH), lambda: nn.Sequential(Restored(WIDTH), nn.GELU())])
def test_copies_of_modules_with_ways_of_their_own(make: Callable[[], nn.Module]) -> None:
    model = make().to(DEVICE)
    ckpt_kernels.convert(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        # Reduced makes its parameters anew.
        other.to(DEVICE)
        torch.testing.assert_close(other(rows()), model(rows()))
        ckpt_kernels.revert(other)
        ckpt_kernels.convert(other)


class RMS(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(width) + 0.5), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def test_what_is_unpickled_where_its_code_has_changed_runs_that(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(RMS())
    ckpt_kernels.convert(model)
    saved = io.BytesIO()
    torch.save(model, saved)
    monkeypatch.setattr(RMS, "forward", lambda self, x: 5 * x)
    saved.seek(0)
    assert torch.equal(torch.load(saved, weights_only=False)(rows()), 5 * rows())


class Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        hidden = self.first(x)
        return self.last(hidden * torch.sigmoid(SLOPE * hidden)) * factor


SLOPE = 1.702


def test_methods_and_numbers_that_change_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    model, converted = twins(Steps)
    assert found_in(ckpt_kernels.convert(converted, recompute="block")) == {"": "MLP"}
    monkeypatch.setattr(Steps.forward, "__defaults__", (5.0,))
    assert close(run(converted, rows()), run(model, rows()))
    monkeypatch.setitem(globals(), "SLOPE", 0.5)
    assert close(run(converted, rows()), run(model, rows()))
    assert found_in(ckpt_kernels.convert(converted, recompute="block")) == {}
    assert close(run(converted, rows()), run(model, rows()))


# Transforms that no name in a method tells of


class Energy:
    def of(self, x: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.grad(lambda row: row.tanh().sum()))(x)


class HoldsObject(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.energy = nn.LayerNorm(WIDTH), Energy()

    def forward(self, x: Tensor) -> Tensor:
        return self.energy.of(self.norm(x))


class HoldsFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.slope = nn.LayerNorm(WIDTH), torch.func.grad(lambda x: x.tanh().sum())

    def forward(self, x: Tensor) -> Tensor:
        return self.slope(self.norm(x))


@pytest.mark.parametrize("kind", [HoldsObject, HoldsFunction])
def test_transforms_that_a_module_holds(kind: type[nn.Module]) -> None:
    model, converted = twins(kind)
    ckpt_kernels.convert(converted)
    with torch.no_grad():
        expected = model(rows())
    torch.testing.assert_close(converted(rows()), expected)


# What a trial must not miss


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
def test_what_differs_beyond_what_is_tried(kind: type[nn.Module]) -> None:
    x = torch.cat((random(2, 600, WIDTH), 1000 * random(2, 600, WIDTH)))
    assert computed(kind, x)


class Bounded(nn.Module):
    """A norm whose parameters are exchanged for others after it was converted."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(WIDTH)), nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        centered = x - x.mean(-1, keepdim=True)
        return centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + 1e-5) * self.weight + self.bias


@pytest.mark.parametrize("shape,dtype", [((1, 1, WIDTH), None), ((WIDTH,), torch.float64), ((1,), None)])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_parameters_that_are_exchanged(name: str, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
    model = nn.Sequential(Bounded()).to(DEVICE)
    assert found_in(ckpt_kernels.convert(model)) == {"0": "layer_norm"}
    setattr(model[0], name, nn.Parameter(torch.rand(shape, dtype=dtype, device=DEVICE)))
    found = model(rows())
    ckpt_kernels.revert(model)
    expected = model(rows())
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("make", [lambda: nn.LayerNorm(8), lambda: nn.BatchNorm1d(8), lambda: nn.GroupNorm(2, 8)])
def test_dtypes_that_torch_refuses_are_refused(make: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(make())
    ckpt_kernels.convert(model)
    with pytest.raises(RuntimeError):
        model(torch.rand(4, 8, 8, dtype=torch.float64))


def test_what_never_computes_is_not_said_to_be_replaced() -> None:
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
def test_outputs_of_norms_lie_as_torchs_do(make: Callable, shape: tuple[int, ...], order: tuple[int, ...]) -> None:
    """`order` is that of the dimensions in memory."""
    torch.manual_seed(0)
    model = nn.Sequential(make()).to(DEVICE)
    converted = copy.deepcopy(model)
    ckpt_kernels.convert(converted)
    inner = random(*[shape[d] for d in order])
    x = inner.permute([order.index(d) for d in range(len(order))])
    for input in (x, x[:, :, :, :], x[1:]):
        expected, found = model(input), converted(input)
        if isinstance(model[0], nn.GroupNorm) and DEVICE == "cuda":
            # There torch's are contiguous whatever the input is; ours keep its memory format, as on the CPU.
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
    whole = random(2, 8, 64, 64)

    def saved(model: nn.Module) -> int:
        part = whole[..., :4, :4].detach().requires_grad_(requires_grad)
        return ckpt_kernels.memory.saved_bytes(model, part)

    assert saved(converted) <= max(saved(model) * 1.25, 2048)


# Autocast, and what is not kept


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
    assert close(run(converted, rows()), run(model, rows()), 0.02)


@pytest.mark.parametrize("level", ["output", "all"])
def test_an_mlp_under_autocast_keeps_no_more(level: str) -> None:
    model = nn.Sequential(nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 32)).to(DEVICE)
    converted = copy.deepcopy(model)
    ckpt_kernels.convert(converted, recompute=level)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert kept(converted, random(256, 32)) <= kept(model, random(256, 32))


@pytest.mark.parametrize("make", [lambda: nn.RMSNorm(WIDTH), RMS, Bounded])
def test_data_that_is_written_to_between_calls(make: Callable[[], nn.Module]) -> None:
    """Eager torch keeps nothing of an input that wants no gradient."""
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
    """F.rms_norm and F.group_norm, and writes to their inputs."""

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
    given = random(6, WIDTH, dtype=dtype)
    ckpt_kernels.convert(converted.to(dtype))
    outcomes = []
    for each in (converted, model.to(dtype)):
        try:
            outcomes.append(run(each, given))
        except RuntimeError:
            outcomes.append({})
    # Where eager torch keeps the input, it refuses the write: in float32, and on GPUs, whose rms_norm is one operation.
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
    eager = kept(model, random(64, 8))
    ckpt_kernels.convert(model)
    assert kept(model, random(64, 8)) <= eager

"""Fused call sites fall back to the user's code if a part of the expression is not as the conversion found it."""

import importlib
import linecache
import typing

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import ckpt_kernels

from .conversion import WIDTH, close, kept, random_tensor, reason_of, results_of, twins
from .test_convert_tried import RMS, rows


class MLP(nn.Module):
    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.first, self.act, self.drop, self.last = (
            nn.Linear(WIDTH, 64),
            nn.GELU(),
            nn.Dropout(p),
            nn.Linear(64, WIDTH),
        )
        self.p = p

    def forward(self, h: Tensor) -> Tensor:
        return self.last(self.drop(self.act(self.first(h))))


class FMLP(MLP):
    def forward(self, h: Tensor) -> Tensor:
        return self.last(F.dropout(self.act(self.first(h)), self.p, self.training))


def test_weights_of_another_dtype_are_torchs_error() -> None:
    for model in twins(MLP):
        model.to(torch.bfloat16)
        ckpt_kernels.convert(model)
        with pytest.raises(RuntimeError, match="dtype"):
            model(rows())


def test_a_frozen_gate_keeps_no_more() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.b.requires_grad_(False)

        def forward(self, h: Tensor) -> Tensor:
            return F.silu(self.a(h)) * self.b(h)

    from ckpt_kernels import memory

    model, twin = twins(Gate)
    ckpt_kernels.convert(model)
    assert memory.saved_bytes(model, random_tensor(64, WIDTH)) <= memory.saved_bytes(twin, random_tensor(64, WIDTH))


def test_a_last_layer_of_another_width_is_torchs_error() -> None:
    for model in twins(MLP):
        model.last = nn.Linear(63, WIDTH)
        ckpt_kernels.convert(model)
        with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):
            model(rows())


def test_a_probability_out_of_range_is_torchs_error() -> None:
    model = FMLP()
    ckpt_kernels.convert(model)
    model.p = 1.5
    with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1"):
        model(rows())


@pytest.mark.parametrize("kind", [MLP, FMLP])
def test_no_dropout_in_evaluation(kind) -> None:
    model, twin = twins(kind)
    ckpt_kernels.convert(model)
    torch.testing.assert_close(model.eval()(rows()), twin.eval()(rows()))


class AddNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.norm(a + b)


@pytest.mark.parametrize(
    "other",
    [random_tensor(6, WIDTH).double(), random_tensor(WIDTH), random_tensor(1, WIDTH)],
    ids=["dtype", "row", "one"],
)
def test_sums_of_operands_of_other_shape_or_dtype(other) -> None:
    model, twin = twins(AddNorm)
    ckpt_kernels.convert(model)
    if other.dtype == torch.float64:
        model.double(), twin.double()
    assert close(results_of(model, rows(), other), results_of(twin, rows(), other))


class Modulated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)

    def forward(self, h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return self.norm(h) * (1 + scale) + shift


@pytest.mark.parametrize(
    ("shape", "lead"),
    [
        (shape, lead)
        for shape in ((1, 1, WIDTH), (3, 1, WIDTH), (3, 5, WIDTH), (1, 5, WIDTH))
        for lead in ((3, 5), (1, 5), (3, 1))
        if all(a in (1, b) for a, b in zip(shape, lead, strict=False))
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_modulations_of_any_shape_and_dtype(shape, dtype, lead) -> None:
    model, twin = twins(Modulated)
    ckpt_kernels.convert(model)
    given = random_tensor(*lead, WIDTH), random_tensor(*shape).to(dtype), random_tensor(*shape).to(dtype) + 1
    ours, theirs = results_of(model, *given), results_of(twin, *given)
    assert all(ours[k].dtype == theirs[k].dtype for k in theirs) and close(ours, theirs)


def test_nested_tensors_take_the_eager_path() -> None:
    model, twin = twins(nn.GELU)
    ckpt_kernels.convert(model)
    given = torch.nested.nested_tensor([random_tensor(3, WIDTH), random_tensor(5, WIDTH)], layout=torch.jagged)
    torch.testing.assert_close(model(given).values(), twin(given).values())


def test_transforms_around() -> None:
    model, twin = twins(
        lambda: nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))
    )
    ckpt_kernels.convert(model, recompute="block")
    for f in (
        lambda m: torch.func.grad(lambda h: m(h).sum())(rows()),
        lambda m: torch.func.vmap(m)(rows()),
        lambda m: torch.func.jvp(m, (rows(),), (rows(),))[1],
        lambda m: torch.func.hessian(lambda h: m(h).sum())(random_tensor(2, WIDTH)),
    ):
        torch.testing.assert_close(f(model), f(twin), rtol=1e-4, atol=1e-4)


def test_forward_mode_derivatives_equal_eager() -> None:
    model, twin = twins(lambda: nn.Sequential(nn.LayerNorm(WIDTH), nn.GELU()))
    ckpt_kernels.convert(model)
    fwAD = torch.autograd.forward_ad
    found = []
    for module in (model, twin):
        with fwAD.dual_level():
            found.append(fwAD.unpack_dual(module(fwAD.make_dual(rows(), rows()))).tangent)
    torch.testing.assert_close(*found)


class Dispatched(Tensor):
    """A tensor subclass that records the ops it is passed to."""

    seen: typing.ClassVar[list[str]] = []

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func.overloadpacket.__name__)
        raw = torch.utils._pytree.tree_map_only(cls, lambda t: t.raw, args)
        return func(*raw, **(kwargs or {}))

    @staticmethod
    def __new__(cls, raw):
        made = Tensor._make_wrapper_subclass(cls, raw.shape, dtype=raw.dtype, device=raw.device)
        made.raw = raw
        return made


def test_a_dispatching_subclass_sees_torchs_ops() -> None:
    model, twin = twins(nn.GELU)
    ckpt_kernels.convert(model)
    torch.testing.assert_close(model(Dispatched(rows())), twin(rows()))
    assert "gelu" in Dispatched.seen


def test_a_forward_set_on_an_activation_runs() -> None:
    model, twin = twins(lambda: MLP(0.0))
    ckpt_kernels.convert(model)
    for module in (model, twin):
        module.act.forward = lambda h: h * 2
    torch.testing.assert_close(model(rows()), twin(rows()))


def test_a_forward_set_on_a_linear_layer_runs() -> None:
    model, twin = twins(lambda: MLP(0.0))
    ckpt_kernels.convert(model)
    for module in (model, twin):
        module.first.forward = lambda h: torch.cat((h, h), -1)
    torch.testing.assert_close(model(rows()), twin(rows()))


def test_a_linear_layer_with_its_own_call_runs() -> None:
    class Twice(nn.Linear):
        def __call__(self, h: Tensor) -> Tensor:
            return 2 * super().__call__(h)

    def make() -> nn.Module:
        model = MLP(0.0)
        model.first = Twice(WIDTH, 64)
        return model

    model, twin = twins(make)
    ckpt_kernels.convert(model)
    torch.testing.assert_close(model(rows()), twin(rows()))


class Flows(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.act, self.last = nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        return getattr(self, self.how)(h)

    def after(self, h: Tensor) -> Tensor:
        y = self.first(h)
        y = self.act(y)
        z = self.last(y)
        return z + y.mean()

    def own(self, h: Tensor) -> Tensor:
        y = self.act(self.first(h))
        z = self.last(y)
        y = y + 1
        return z + y.mean()

    def nested(self, h: Tensor) -> Tensor:
        y = h
        if self.training:
            y = self.act(self.first(h))
            z = self.last(y)
        else:
            z = h
        return z + y.mean()

    def loop(self, h: Tensor) -> Tensor:
        y = h
        for _ in range(2):
            h = h + y.mean()
            y = self.act(self.first(h))
            h = self.last(y)
        return h

    def columns(self, h: Tensor) -> Tensor:
        a, b = h.view(4, 2, WIDTH // 2, -1).chunk(2, 1)
        return F.silu(a) * b

    def caught(self, h: Tensor) -> Tensor:
        try:
            y = self.first(h)
            y = self.act(y[..., None])
            y = self.last(y)
        except RuntimeError:
            pass
        return y

    def two(self, h: Tensor) -> Tensor:
        y = self.first(h)
        z = y + 1
        return y * torch.sigmoid(z)

    def rebound(self, h: Tensor) -> Tensor:
        self = self.parent[0]
        return self.last(self.act(self.first(h)))


@pytest.mark.parametrize("how", ["after", "own", "nested", "loop", "columns", "caught", "two", "rebound"])
def test_control_flow_keeps_the_results(how) -> None:
    model, twin = twins(lambda: Flows(how))
    for module in (model, twin):
        torch.manual_seed(3)
        module.parent = [Flows("after")]
    ckpt_kernels.convert(model)
    given = random_tensor(6, WIDTH) if how != "columns" else random_tensor(4, 2, WIDTH // 2, 4)
    torch.testing.assert_close(model(given), twin(given), rtol=1e-4, atol=1e-5)


def test_an_edited_source_file_is_not_used(tmp_path) -> None:
    file = tmp_path / "edited.py"
    lines = ("from torch import nn", "import torch.nn.functional as F", "class Edited(nn.Module):")
    lines += ("    def forward(self, h):", "        return F.gelu(h) + 1", "")
    text = "\n".join(lines)
    file.write_text(text)
    names: dict = {"__name__": "edited"}
    exec(compile(text, str(file), "exec"), names)
    file.write_text(text.replace("+ 1", "+ 2"))
    linecache.checkcache()
    model = names["Edited"]()
    expected = model(rows())
    ckpt_kernels.convert(model)
    torch.testing.assert_close(model(rows()), expected)


class Property(nn.Module):
    """A property returns another module than the instance's `__dict__` holds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.other = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH), nn.ReLU()
        self.__dict__["act"] = nn.GELU()

    @property
    def act(self) -> nn.Module:
        return self.other

    def forward(self, h: Tensor) -> Tensor:
        return self.last(self.act(self.first(h)))


class OwnGetattr(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.act = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH), nn.GELU()
        self.loads = 0

    def __getattr__(self, name: str):
        if name == "first":
            self.__dict__["loads"] += 1
        return super().__getattr__(name)

    def forward(self, h: Tensor) -> Tensor:
        return self.last(self.act(self.first(h)))


@pytest.mark.parametrize("kind", [Property, OwnGetattr])
def test_attributes_with_own_loads_are_read_as_before(kind) -> None:
    model, twin = twins(kind)
    ckpt_kernels.convert(model)
    for module in (model, twin):
        module.loads = 0
    torch.testing.assert_close(model(rows()), twin(rows()))
    assert model.loads == twin.loads


def test_a_patched_forward_of_a_part_runs(monkeypatch) -> None:
    model, twin = twins(lambda: nn.Sequential(nn.LayerNorm(WIDTH), nn.GELU()))
    ckpt_kernels.convert(model)
    monkeypatch.setattr(nn.LayerNorm, "forward", lambda self, h: 2 * h)
    torch.testing.assert_close(model(rows()), twin(rows()))


def test_a_patched_forward_of_a_norm_runs(monkeypatch) -> None:
    model, twin = twins(lambda: nn.LayerNorm(WIDTH))
    ckpt_kernels.convert(model)
    monkeypatch.setattr(nn.LayerNorm, "forward", lambda self, h: 2 * h)
    torch.testing.assert_close(model(rows()), twin(rows()))


def test_super_of_the_instances_class() -> None:
    class Old(nn.LayerNorm):
        def forward(self, h: Tensor) -> Tensor:
            return super(self.__class__, self).forward(h)

    model, twin = twins(lambda: Old(WIDTH))
    ckpt_kernels.convert(model)
    torch.testing.assert_close(model(rows()), twin(rows()))


def test_a_later_parametrization_runs_once() -> None:
    made = []

    class Counted(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            made.append(weight)
            return weight * 1.5

    norm = RMS()
    ckpt_kernels.convert(norm)
    parametrize.register_parametrization(norm, "weight", Counted())
    made.clear()
    norm(rows())
    assert len(made) == 1


def test_channel_norm_of_two_dimensions() -> None:
    from .test_convert_written import ChannelNorm

    model, twin = twins(lambda: ChannelNorm((WIDTH,)))
    ckpt_kernels.convert(model)
    torch.testing.assert_close(model(rows()), twin(rows()))


@pytest.mark.parametrize("kind", ["InBfloat16", "RoundsFirst", "Norm"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_in_16_bits_round_as_before(kind, dtype) -> None:
    norms = importlib.import_module("tests.test_convert_norms")
    model, twin = twins(getattr(norms, kind))
    ckpt_kernels.convert(model.to(dtype))
    given = random_tensor(64, WIDTH, dtype=dtype)
    ours, theirs = model(given), twin.to(dtype)(given)
    assert (ours != theirs).float().mean() < 0.01


class SiLUWithAFlag(nn.Module):
    """An activation that is no formula, because the flag `inplace` has no constant value."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.up, self.down, self.inplace = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), inplace

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x), inplace=self.inplace))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_silu_with_a_flag(inplace: bool) -> None:
    model, eager = twins(lambda: SiLUWithAFlag(inplace))
    x = random_tensor(64, WIDTH).requires_grad_()
    report = ckpt_kernels.convert(model, recompute="all")
    assert [entry.by for entry in report.replaced] == ["silu"]
    assert close(results_of(model, x), results_of(eager, x))
    # Out of place the product runs again, too: beside the input only the bias is kept.
    assert inplace or kept(model, x) <= x.nbytes + 2 * model.up.bias.nbytes


class OwnWeight(nn.Module):
    """A block with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.gelu(self.norm(x)), self.weight) + self.linear(x)


@pytest.mark.parametrize("recompute", ["block", "output", "all", "layer"])
@pytest.mark.parametrize("around", [nn.Sequential, lambda module: module], ids=["in a model", "the model"])
@pytest.mark.parametrize("kind", [OwnWeight, lambda: nn.LayerNorm(WIDTH), lambda: nn.Linear(WIDTH, WIDTH)])
def test_a_parametrization_can_be_removed_from_a_converted_model(kind, around, recompute: str) -> None:
    torch.manual_seed(0)
    module, x = kind(), random_tensor(4, WIDTH)
    nn.utils.parametrizations.weight_norm(module, "weight", dim=0)
    expected = module(x)
    model = around(module)
    ckpt_kernels.convert(model, recompute=recompute)
    torch.testing.assert_close(model(x), expected)
    nn.utils.parametrize.remove_parametrizations(module, "weight")
    torch.testing.assert_close(model(x), expected)


def test_the_report_names_a_parametrization() -> None:
    nn.utils.parametrizations.weight_norm(module := OwnWeight(), "weight", dim=0)
    assert reason_of(ckpt_kernels.convert(nn.Sequential(module)), "0") == "its parameters are parametrized"

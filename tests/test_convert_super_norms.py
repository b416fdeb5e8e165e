"""Subclasses of torch's norms that call `super().forward`."""

import pickle
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckpt_kernels
from ckpt_kernels.convert.code.scope import UNKNOWN, Scope
from ckpt_kernels.convert.code.source import tree_of
from ckpt_kernels.convert.operands import has_steps_of

from .conftest import DEVICE
from .conversion import WIDTH, close, kept, random_tensor, reason_of, replacement_of, results_of, twins


class GroupNorm32(nn.GroupNorm):
    """As in many diffusion models."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type(x.dtype)


class BatchNorm32(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x.float())
        return y.to(x.dtype)


class InstanceNorm32(nn.InstanceNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super(InstanceNorm32, self).forward(x.float()).type(x.dtype)  # noqa: UP008


class ScaledLayerNorm(nn.LayerNorm):
    """Two results of the norm are used, so that a trial as a whole finds no norm."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + 0.5 * y.tanh()


# By name: the norm, what it computes with, and the kept bytes at "output" as a fraction of eager torch's.
NORMS: dict[str, tuple[Callable[[], nn.Module], str, float]] = {
    "group": (lambda: GroupNorm32(4, WIDTH), "group_norm", 0.52),
    "batch": (lambda: BatchNorm32(WIDTH), "batch_norm", 0.52),
    "instance": (lambda: InstanceNorm32(WIDTH, affine=True), "instance_norm", 0.53),
    "layer": (lambda: ScaledLayerNorm(8), "layer_norm", 1.0),
}


def between(norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1), norm, nn.Conv2d(WIDTH, WIDTH, 1))


@pytest.mark.parametrize("name", NORMS)
def test_the_norm_with_forward_is_fused(name: str) -> None:
    make, by, share = NORMS[name]
    model, twin = twins(lambda: between(make()))
    x = random_tensor(4, WIDTH, 8, 8)
    eager = kept(twin, x) - x.nbytes
    for level, bound in (("block", 1.0), ("output", share), ("all", share)):
        report = ckpt_kernels.convert(model, recompute=level)
        assert replacement_of(report, "1") == by and reason_of(report, "1") is None
        assert close(results_of(model, x), results_of(twin, x))
        assert kept(model, x) - x.nbytes <= (bound + 0.01) * eager
    assert isinstance(pickle.loads(pickle.dumps(model))[1], type(twin[1]))


def test_running_statistics_move_as_often() -> None:
    model, twin = twins(lambda: BatchNorm32(WIDTH))
    ckpt_kernels.convert(model, inputs=random_tensor(4, WIDTH, 8, 8))
    for each in (model, twin):
        results_of(each, random_tensor(4, WIDTH, 8, 8))
    for ours, theirs in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_16_bits_are_kept_in_16_bits() -> None:
    model, twin = twins(lambda: between(GroupNorm32(4, WIDTH)))
    for each in (model, twin):
        each.bfloat16()
        each[1].float()
    x = random_tensor(4, WIDTH, 8, 8, dtype=torch.bfloat16)
    eager = kept(twin, x) - x.nbytes
    ckpt_kernels.convert(model)
    # Of the float32 copy of the norm's input, and the output in 16 bits, only the input in 16 bits is kept.
    assert kept(model, x) - x.nbytes <= 0.35 * eager
    assert close(results_of(model, x), results_of(twin, x), tolerance=2**-7)


def test_a_patched_norm_runs_as_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = twins(lambda: between(GroupNorm32(4, WIDTH)))
    ckpt_kernels.convert(model)
    x = random_tensor(4, WIDTH, 8, 8)
    calls: list[Any] = []
    original = nn.GroupNorm.forward

    def forward(self: nn.GroupNorm, input: Tensor) -> Tensor:
        calls.append(input.dtype)
        return 2 * original(self, input)

    expected = model(x)
    with monkeypatch.context() as patch:
        patch.setattr(nn.GroupNorm, "forward", forward)
        patched = model[1](model[0](x))
    torch.testing.assert_close(patched, 2 * model[1](model[0](x)))
    assert calls == [torch.float32]
    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "group_norm", lambda input, *args: 0 * input)
        assert not model[1](model[0](x)).any()
    with monkeypatch.context() as patch:
        # No method is bound.
        patch.setattr(nn.GroupNorm, "forward", staticmethod(lambda input: 0 * input))
        assert not model[1](model[0](x)).any()
    torch.testing.assert_close(model(x), expected)


class Doubled(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Mixed(GroupNorm32, Doubled):
    """In which the `super()` of GroupNorm32 is no norm of torch."""


class ByName(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(input=x)


def test_a_call_by_name_stays_as_written() -> None:
    model, twin = twins(lambda: between(ByName(4, WIDTH)))
    report = ckpt_kernels.convert(model)
    assert replacement_of(report, "1") is None and reason_of(report, "1")
    x = random_tensor(4, WIDTH, 8, 8)
    assert close(results_of(model, x), results_of(twin, x))


def test_super_is_that_of_the_module_s_class() -> None:
    model, twin = twins(lambda: nn.Sequential(between(Mixed(4, WIDTH)), between(GroupNorm32(4, WIDTH))))
    x = random_tensor(4, WIDTH, 8, 8)
    report = ckpt_kernels.convert(model)
    assert replacement_of(report, "0.1") is None and replacement_of(report, "1.1") == "group_norm"
    assert close(results_of(model, x), results_of(twin, x))


def called(self: nn.Module) -> nn.Module:
    return self


class Lookups(Doubled):
    """Methods of one statement each, which looks `forward` up."""

    def plain(self) -> Any:
        return super().forward

    def of_a_class(self) -> Any:
        return super(Lookups, self).forward  # noqa: UP008

    def of_a_base(self) -> Any:
        return super(Doubled, self).forward

    def of_a_later_base(self) -> Any:
        return super(nn.GroupNorm, self).forward

    def inherited(self) -> Any:
        return super().reset_parameters

    def of_another_object(self, other: Any) -> Any:
        return super(Lookups, other).forward

    def of_a_class_alone(self) -> Any:
        return super(Lookups).forward

    def of_no_base(self) -> Any:
        return super(nn.LayerNorm, self).forward

    def of_a_rebound_object(self) -> Any:
        return super().forward if (self := nn.GroupNorm(1, 1)) else None  # noqa: F841

    def by_a_function(self) -> Any:
        return called(self).forward

    def by_the_class(self) -> Any:
        return __class__().forward


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("plain", Doubled.forward),
        ("of_a_class", Doubled.forward),
        ("of_a_base", nn.GroupNorm.forward),
        ("of_a_later_base", nn.Module.forward),
        ("inherited", nn.GroupNorm.reset_parameters),
        *((f"of_{kind}", UNKNOWN) for kind in ("another_object", "a_class_alone", "no_base", "a_rebound_object")),
        *((f"by_{kind}", UNKNOWN) for kind in ("a_function", "the_class")),
    ],
)
def test_what_super_finds(method: str, expected: Any) -> None:
    function: types.FunctionType = vars(Lookups)[method]
    tree: Any = tree_of(function)
    value = tree.body[-1].value
    found = Scope(function, tree, Lookups(4, WIDTH)).value(getattr(value, "body", value))
    assert found is expected
    if expected is not UNKNOWN:
        assert function(Lookups(4, WIDTH)).__func__ is expected


def test_other_inputs_and_settings_run_as_written() -> None:
    model, twin = twins(lambda: GroupNorm32(4, WIDTH))
    ckpt_kernels.convert(model)
    for x in (random_tensor(4, WIDTH), random_tensor(4, WIDTH, 3).double(), random_tensor(4, WIDTH, 2, 2, 2)):
        torch.testing.assert_close(model(x), twin(x), rtol=1e-5, atol=1e-6)
    # Torch refuses one value for each group.
    alone = [nn.Sequential(GroupNorm32(WIDTH, WIDTH)) for _ in range(2)]
    ckpt_kernels.convert(alone[0])
    messages = set()
    for each in alone:
        with pytest.raises(ValueError, match="Expected more than 1 value") as error:
            each(random_tensor(1, WIDTH, 1))
        messages.add(str(error.value))
    assert len(messages) == 1
    for each in (model, twin):
        each.eps = 0.5
    x = random_tensor(4, WIDTH, 8, 8)
    torch.testing.assert_close(model(x), twin(x), rtol=1e-5, atol=1e-6)
    for each in (model, twin):
        nn.utils.parametrize.register_parametrization(each, "weight", Doubling())
    torch.testing.assert_close(model(x), twin(x), rtol=1e-5, atol=1e-6)
    for each in (model, twin):
        with pytest.raises(RuntimeError, match="equal to the number of channels"):
            each(random_tensor(4, 2 * WIDTH, 3))


class Doubling(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class CountedEps(GroupNorm32):
    reads = 0

    @property
    def eps(self) -> float:
        CountedEps.reads += 1
        return 1e-5

    @eps.setter
    def eps(self, value: float) -> None:
        """The norm's constructor sets a value, which the getter ignores."""


def test_a_property_is_read_as_often_as_written() -> None:
    model = between(CountedEps(4, WIDTH)).to(DEVICE)
    ckpt_kernels.convert(model)
    CountedEps.reads = 0
    model(random_tensor(4, WIDTH, 8, 8))
    assert CountedEps.reads == 1


def test_compiled() -> None:
    model, twin = twins(lambda: between(GroupNorm32(4, WIDTH)))
    ckpt_kernels.convert(model)
    x = random_tensor(4, WIDTH, 8, 8)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), twin(x), rtol=1e-4, atol=1e-5)


class DoubledNorm(nn.InstanceNorm2d):
    """Overrides a step of torch's forward."""

    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        return 2 * super()._apply_instance_norm(input)


class DoubledSuper(DoubledNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type(x.dtype)


class Unbatched(nn.InstanceNorm2d):
    def _handle_no_batch_input(self, input: Tensor) -> Tensor:
        return super()._handle_no_batch_input(input) + 1


class OursSuper(ckpt_kernels.nn.InstanceNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type(x.dtype)


STEPS = {
    "a step": lambda: DoubledNorm(WIDTH),
    "a step, and super": lambda: DoubledSuper(WIDTH),
    "the step for one image": lambda: Unbatched(WIDTH),
    "our norm": lambda: ckpt_kernels.nn.InstanceNorm2d(WIDTH, activation="relu"),
    "our norm, and super": lambda: OursSuper(WIDTH, activation="relu"),
}


@pytest.mark.parametrize("recompute", ["block", "output", "all", "layer"])
@pytest.mark.parametrize("name", STEPS)
def test_a_subclass_that_overrides_a_step_of_the_forward(name: str, recompute: Any) -> None:
    model, twin = twins(lambda: nn.Sequential(STEPS[name]()))
    report = ckpt_kernels.convert(model, recompute=recompute)
    assert replacement_of(report, "0") is None
    x = random_tensor(WIDTH, 8, 8)
    assert close(results_of(twin, x), results_of(model, x))


@pytest.mark.parametrize("on_class", [False, True])
def test_a_step_that_is_overridden_later(on_class: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Norm(nn.InstanceNorm2d):
        """A class whose methods may be replaced."""

    model, twin = twins(lambda: nn.Sequential(Norm(WIDTH), nn.ReLU()))
    report = ckpt_kernels.convert(model)
    assert replacement_of(report, "0") is not None

    def doubled(input: Tensor) -> Tensor:
        return 2 * nn.InstanceNorm2d._apply_instance_norm(twin[0], input)

    for norm in (model[0], twin[0]):
        if on_class:
            monkeypatch.setattr(type(norm), "_apply_instance_norm", lambda self, input: doubled(input))
        else:
            norm._apply_instance_norm = doubled
    x = random_tensor(2, WIDTH, 8, 8)
    assert close(results_of(twin, x), results_of(model, x))


def test_a_step_for_one_image_that_an_instance_overrides() -> None:
    model, twin = twins(lambda: nn.Sequential(nn.InstanceNorm2d(WIDTH), nn.ReLU()))
    assert replacement_of(ckpt_kernels.convert(model), "0") is not None
    for norm in (model[0], twin[0]):
        norm._handle_no_batch_input = lambda input: 2 * nn.InstanceNorm2d._handle_no_batch_input(twin[0], input)
    x = random_tensor(WIDTH, 8, 8)
    assert close(results_of(twin, x), results_of(model, x))


def test_a_step_whose_code_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_steps_of(nn.InstanceNorm2d, nn.InstanceNorm1d)
    monkeypatch.setattr(nn.InstanceNorm2d._apply_instance_norm, "__code__", (lambda self, input: input).__code__)
    assert not has_steps_of(nn.InstanceNorm2d, nn.InstanceNorm1d)

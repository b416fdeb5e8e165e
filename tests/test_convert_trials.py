"""The trials that recognise norms and activations: the results hold for no other settings, parameters or shapes."""

import copy
import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ckpt_kernels
from ckpt_kernels.convert.code.settings import as_setting, bare_module, has_settings, is_plain

from .conftest import DEVICE
from .conversion import WIDTH, close, random_tensor, reason_of, replacement_of, results_of


def converted(module: nn.Module) -> nn.Module:
    """A converted copy of a model of one layer."""
    model = nn.Sequential(copy.deepcopy(module)).to(DEVICE)
    ckpt_kernels.convert(model)
    return model


class Chosen(nn.Module):
    """An activation that the type of a setting selects."""

    def __init__(self, setting: Any) -> None:
        super().__init__()
        self.setting = setting

    def forward(self, x: Tensor) -> Tensor:
        if self.setting is True or self.setting is False or self.setting == [1]:
            return F.silu(x)
        return F.gelu(x)


class ChosenNorm(Chosen):
    def __init__(self, setting: Any) -> None:
        super().__init__(setting)
        self.weight = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return normed * (1 + self.weight) if self.setting is True or self.setting is False else normed * self.weight


@pytest.mark.parametrize("kind", [Chosen, ChosenNorm])
@pytest.mark.parametrize("settings", [(True, 1, 1.0), (0, False), ((1,), [1]), ([1], (1,))])
def test_equal_settings_of_other_types_have_trials_of_their_own(kind: type[nn.Module], settings: tuple) -> None:
    x = random_tensor(6, WIDTH)
    for setting in settings:
        module = kind(setting).to(DEVICE)
        assert close(results_of(converted(module), x), results_of(nn.Sequential(module), x)), setting
        # A trial of the class is kept for good, but not shared with modules that are still converted.
        gc.collect()


class Optional(nn.Module):
    """A layer norm, an RMS norm or a silu whose parameters may be None."""

    def __init__(self, names: str, absent: str) -> None:
        super().__init__()
        self.names = names
        for name in names.split():
            self.register_parameter(name, None if name in absent else nn.Parameter(torch.rand(WIDTH)))


class OptionalLayerNorm(Optional):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (WIDTH,), self.weight, self.bias, 1e-5)


class OptionalRMSNorm(Optional):
    def forward(self, x: Tensor) -> Tensor:
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        normed = normed if self.weight is None else normed * self.weight
        return normed if self.bias is None else normed + self.bias


class OptionalSwish(Optional):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x) if self.beta is None else x * torch.sigmoid(self.beta * x)


OPTIONAL = [
    *((kind, absent, "weight bias") for kind in (OptionalLayerNorm, OptionalRMSNorm) for absent in ("", "bias")),
    (OptionalRMSNorm, "weight bias", "weight bias"),
    (OptionalSwish, "beta", "beta"),
]


@pytest.mark.parametrize(("kind", "absent", "names"), OPTIONAL)
def test_parameters_may_become_none_or_cease_to_be(kind: type[Optional], absent: str, names: str) -> None:
    x = random_tensor(6, WIDTH)
    original = nn.Sequential(kind(names, absent), nn.Linear(WIDTH, WIDTH), kind(names, absent)).to(DEVICE)
    model = copy.deepcopy(original)
    ckpt_kernels.convert(model)
    for name in names.split():
        parameter = nn.Parameter(torch.full((WIDTH,), 3.0, device=DEVICE)) if name in absent else None
        for module in (*original[::2], *model[::2]):
            setattr(module, name, parameter if parameter is None else nn.Parameter(parameter.detach().clone()))
        assert close(results_of(original, x), results_of(model, x)), name


class OfFunction(nn.Module):
    """An RMS norm with a function of the weight, or of the size of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-2, 2, WIDTH))

    def normed(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Itself(OfFunction):
    def forward(self, x: Tensor) -> Tensor:
        return self.normed(x) * self.weight


class Magnitude(OfFunction):
    def forward(self, x: Tensor) -> Tensor:
        return self.normed(x) * (self.weight**2) ** 0.5


class Bounded(OfFunction):
    def forward(self, x: Tensor) -> Tensor:
        return self.normed(x) * self.weight / torch.sqrt(1 + 1e-8 * self.weight * self.weight)


class Divided(OfFunction):
    def forward(self, x: Tensor) -> Tensor:
        return self.normed(x) * self.weight.pow(2) / self.weight


class ShiftedMagnitude(OfFunction):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.linspace(-2, 2, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        centered = x - x.mean(-1, keepdim=True)
        return self.normed(centered) * self.weight + torch.sqrt(self.bias**2)


class Batch(OfFunction):
    def forward(self, x: Tensor) -> Tensor:
        return self.normed(x) * self.weight * (x.shape[0] - 1)


class Tokens(OfFunction):
    def forward(self, x: Tensor) -> Tensor:
        return self.normed(x) * self.weight * x.size(1) / 60


class Maps(OfFunction):
    def forward(self, x: Tensor) -> Tensor:
        normed = x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)
        return normed * self.weight[:, None, None] * x.shape[3] / 5


FUNCTIONS = [Magnitude, Bounded, Divided, ShiftedMagnitude, Batch, Tokens, Maps]


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_functions_of_parameters_and_sizes_are_not_taken_for_the_parameter(kind: type[nn.Module]) -> None:
    report = ckpt_kernels.convert(nn.Sequential(kind()))
    assert replacement_of(report, "0") is None
    assert replacement_of(ckpt_kernels.convert(nn.Sequential(Itself())), "0") == "rms_norm"


def test_no_finalizer_of_a_norm_runs() -> None:
    finalized = []

    class FinalizedNorm(Itself):
        def __del__(self) -> None:
            finalized.append(self)

    model = nn.Sequential(FinalizedNorm())
    report = ckpt_kernels.convert(model)
    assert not finalized and "has a finalizer" in reason_of(report, "0")
    del FinalizedNorm.__del__


class ThirdSize(OfFunction):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / x.shape[2] + 1e-6) * self.weight


class Unpacked(OfFunction):
    def forward(self, x: Tensor) -> Tensor:
        _, _, width = x.shape
        return F.layer_norm(x, (width,), self.weight, None, 1e-5)


@pytest.mark.parametrize("kind", [Itself, ThirdSize, Unpacked])
@pytest.mark.parametrize("lead", [(), (6,), (2, 3), (2, 3, 5), (2, 3, 2, 5), (2, 3, 1, 2, 5)])
def test_norms_serve_the_numbers_of_dimensions_that_were_tried(kind: type[nn.Module], lead: tuple[int, ...]) -> None:
    x = random_tensor(*lead, WIDTH)
    module = kind().to(DEVICE)
    model = converted(module)
    try:
        expected = results_of(nn.Sequential(module), x)
    except (IndexError, ValueError) as error:
        with pytest.raises(type(error)):
            model(x)
        return
    assert close(expected, results_of(model, x))
    is_tried = x.dim() == 3 or (kind is Itself and 2 <= x.dim() <= 5)
    assert is_tried == ("row_norm" in type(model(x).grad_fn).__name__)


class Number(int):
    """A number with operators of its own."""


@pytest.mark.parametrize("value", [None, True, 1, 0.5, "name", torch.float16, torch.Size([2]), (1, 2), [1, 2], ()])
def test_settings_of_plain_types(value: Any) -> None:
    module = nn.Module()
    module.value = value
    settings = (("value", as_setting(value)),)
    assert is_plain(value) and has_settings(module, settings)
    stand_in = bare_module(nn.Module, settings)
    assert type(stand_in.value) is type(value) and stand_in.value == value
    hash(settings)


@pytest.mark.parametrize("value", [Number(1), (True,), (1, 0.5), [None], ((1,),), {}, object(), torch.ones(())])
def test_settings_of_other_types(value: Any) -> None:
    assert not is_plain(value)


@pytest.mark.parametrize(
    ("before", "now"), [(1, 1.0), (1, True), ((1,), [1]), ([1], (1,)), (0.5, 0.25), (1, Number(1))]
)
def test_a_setting_of_another_value_or_type_is_noticed(before: Any, now: Any) -> None:
    module = nn.Module()
    module.value = now
    assert not has_settings(module, (("value", as_setting(before)),))
    assert not has_settings(nn.Module(), (("value", as_setting(before)),))

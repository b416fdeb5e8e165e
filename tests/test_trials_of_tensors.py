"""The operations at which a trial ends, whatever has been found in the source before."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor, nn

from ckpt_kernels.convert.code.snapshots import NotTriable
from ckpt_kernels.convert.rules.trial import CHANNELS, GATES, ROWS, InputRefused, result_of, takes_one_argument

INPUT = torch.arange(24.0).view(2, 3, 4) - 12
REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "a value": (lambda x: x * x.mean(-1)[0, 0].item(), "decides by the values"),
    "a cosine": (lambda x: x.cos(), "computes with cos, which no fused function does"),
    "the first half": (lambda x: x[..., :2], "computes with a slice"),
    "the second half": (lambda x: x[..., 2:], "computes with a slice"),
    "every second element": (lambda x: x[..., ::2], "computes with a slice"),
    "a bound from below": (lambda x: x.clamp_min(0.5), "clamps the norm from below"),
    "the mean of all": (lambda x: x - x.mean(), "reduces over other dimensions"),
    "the mean of columns": (lambda x: x - x.mean(0), "reduces over other dimensions"),
    "the mean of maps": (lambda x: x - x.mean((-1, 0)), "reduces over other dimensions"),
    "the variance of columns": (lambda x: x.var(0), "reduces over other dimensions"),
    "a device": (lambda x: x.to("cpu"), "casts to more than a dtype"),
    "a device by name": (lambda x: x.to(device="cpu", dtype=torch.float64), "casts to more than a dtype"),
    "a layout": (lambda x: x.to(torch.float64, memory_format=torch.preserve_format), "casts to more than a dtype"),
    "the name of a type": (lambda x: x * len(x.type()), "reads the type of its input"),
    "a pair": (lambda x: (x, x), "returns something else than a tensor"),
    "a parameter": (nn.Parameter, "returns something else than a tensor"),
}
ALLOWED: dict[str, Callable[[Tensor], Tensor]] = {
    "a view of all": lambda x: x[:, :, :].clone(),
    "a tiny bound": lambda x: x / x.mean(-1, keepdim=True).clamp_min(1e-12),
    "casts": lambda x: x.to(torch.float64).to(dtype=torch.float32).type(torch.float64).to(x),
}


@pytest.mark.parametrize("name", REFUSED)
def test_trials_end_at_other_operations(name: str) -> None:
    function, why = REFUSED[name]
    with pytest.raises(NotTriable, match=why) as raised:
        result_of(function, INPUT, CHANNELS | {"index", "select"}, (-1,))
    assert not isinstance(raised.value, InputRefused)


@pytest.mark.parametrize("name", ALLOWED)
def test_trials_of_allowed_operations(name: str) -> None:
    function = ALLOWED[name]
    assert torch.equal(result_of(function, INPUT, CHANNELS, (-1,)), function(INPUT))


def test_gates_may_take_parts_and_clamp() -> None:
    for function in (lambda x: x[..., ::2], lambda x: x.clamp_min(0.5)):
        assert torch.equal(result_of(function, INPUT, GATES, of_parts=True), function(INPUT))


def test_an_input_that_fails_is_refused() -> None:
    with pytest.raises(InputRefused, match=r"fails on a tensor of \(2, 3, 4\)"):
        result_of(lambda x: x.view(7), INPUT, CHANNELS, (-1,))
    # Torch takes a weight of another dtype on some devices only.
    for weight in (torch.ones(4).double(), torch.ones(4).bfloat16()):
        with pytest.raises(InputRefused, match="an input and a weight of two dtypes"):
            result_of(lambda x, weight=weight: TF.rms_norm(x, (4,), weight=weight), INPUT, ROWS, (-1,))
    weight = torch.ones(4)
    assert torch.equal(
        result_of(lambda x: TF.rms_norm(x, (4,), weight), INPUT, ROWS, (-1,)), TF.rms_norm(INPUT, (4,), weight)
    )


def test_functions_that_take_one_argument() -> None:
    functions = {
        "one": lambda self, x: x,
        "one and a default": lambda self, x, scale=1.0: x,
        "one and any": lambda self, x, *others, **named: x,
        "two": lambda self, x, y: x,
        "none": lambda self: None,
        "one by name": lambda self, *, x: x,
    }
    assert [name for name, function in functions.items() if takes_one_argument(function)] == [*functions][:3]

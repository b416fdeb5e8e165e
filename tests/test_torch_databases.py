"""Every sample and every error of torch's databases, for the functions and modules here of the same name.

The tests compare results, first and second gradients, changed buffers, dtypes, strides, types of errors, and reprs.
`ON_PURPOSE` lists deliberate differences with reasons.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ckpt_kernels import functional
from ckpt_kernels import nn as modules

from .conftest import DEVICE, DTYPES, serving, unserved
from .databases import (
    FUNCTIONS,
    MODULE_INFOS,
    MODULES,
    NAMESAKES,
    OPS,
    Sample,
    function_samples,
    in_float64,
    in_layouts,
    made,
    module_samples,
)
from .test_contract_numbers import ROUNDINGS, ulp

# torch's and our function or module by name, and the dtypes of torch's samples.
CASES = {
    **{name: (op.op, FUNCTIONS[name], op.dtypes) for name, op in OPS.items()},
    **{name: (info.module_cls, MODULES[name], info.dtypes) for name, info in MODULE_INFOS.items()},
}
# Names, the result that differs, a pattern of the difference, and the reason.
ON_PURPOSE = (
    (
        ("nn.functional.elu", "nn.functional.softplus", "nn.functional.hardtanh", "ELU", "LeakyReLU", "Softplus"),
        "outcome",
        r"is ValueError\(.activation is \w+\(\w+=.* at its default settings",
        "Activations have names without settings, so settings other than torch's defaults are an error.",
    ),
    *(
        (
            ("nn.functional.hardtanh",),
            key,
            r"is AssertionError\(.max_val",
            "The settings here are those of a module, which rejects two equal limits, with another error.",
        )
        for key in ("outcome", "error")
    ),
    (
        ("nn.functional.hardtanh", "nn.functional.relu6"),
        "gradient of argument 0",
        r"errs by [-.\de]+$",  # in float64
        "At NaN torch's gradient is 0 or the incoming gradient, depending on the position in a vector; ours is 0.",
    ),
    (
        ("nn.functional.gelu",),
        "error",
        r"is ValueError\(.activation is GELU",
        "An unknown activation is a ValueError, as for any other wrong name here; torch raises a RuntimeError.",
    ),
    (
        ("nn.functional.glu", "GLU"),
        "gradient of argument 0",
        "has strides",
        "The gradient has the input's strides; torch's is always contiguous.",
    ),
    (
        ("RMSNorm",),
        "gradient of argument 0",
        "has strides",
        "The gradient is contiguous, as a layer norm's; for channels-last inputs torch's has grad_output's strides.",
    ),
)


def listed_difference(name: str, key: str, how: str) -> tuple | None:
    """The entry of `ON_PURPOSE` for this difference, if there is one."""
    return next((e for e in ON_PURPOSE if name in e[0] and key == e[1] and re.match(e[2], how)), None)


def samples(name: str, dtype: torch.dtype) -> list[Sample]:
    if name in OPS:
        return list(function_samples(name, dtype))
    return [sample for training in (True, False) for sample in module_samples(name, dtype, training)]


def outcome(call: Callable[[], Any]) -> Any:
    """The result of the call, or the exception that it raises."""
    try:
        return call()
    except Exception as error:
        return error


def same_strides(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same strides in dimensions of more than one element."""
    pairs = zip(one.shape, one.stride(), other.stride(), strict=True)
    return one.numel() == 0 or all(a == b for size, a, b in pairs if size > 1)


def root_mean_square(values: Tensor) -> float:
    return values.square().mean().sqrt().item() if values.numel() else 0.0


def too_wrong(ours: list[Tensor], theirs: list[Tensor], truth: list[Tensor], summed: float) -> str | None:
    """The reason if the draws of one result break the contract: at most 1.5 times torch's error plus one unit.

    The unit is relative to the result, or, for a mean, to the magnitude of the terms, `summed`.
    """
    dtype = theirs[0].dtype
    found, eager, true = (torch.stack(draws).double() for draws in (ours, theirs, truth))
    # Where torch's result is not finite, ours may be finite if the truth is.
    if not (found.isfinite() | ~eager.isfinite()).all() or (found.isfinite() & ~true.isfinite()).any():
        return "is not finite elsewhere"
    counted = found.isfinite()
    found, eager, true = found[counted], torch.where(eager.isfinite(), eager, true)[counted], true[counted]
    error, scale = root_mean_square(found - true), root_mean_square(true)
    if not dtype.is_floating_point:
        return None if error == 0 else "is another"
    if dtype == torch.float64:
        # The truth has the same precision, so about a hundred roundings of the result's magnitude are allowed.
        return f"errs by {error:.1e}" if error > 2e-14 * (1 + scale) else None
    allowed = 1.5 * root_mean_square(eager - true) + ulp(max(scale, summed), dtype)
    return f"errs by {error:.1e}, where {allowed:.1e} is allowed" if error > allowed else None


def faults(name: str, sample: Sample, backends: Iterable[str], twice: bool = True) -> Iterator[tuple[str, str, str]]:
    """The differences from torch: the backend, the name of the result, and a description."""
    eager, mine, _ = CASES[name]
    theirs, truth = sample.run(eager, 0, twice), sample.with_tensors(in_float64).run(eager, 0, twice)
    for place, backend in enumerate(backends):
        # Second gradients are those of the composition on every backend, so one backend is enough.
        second = twice and place == 0
        with serving(backend):
            ours = outcome(lambda second=second: sample.run(mine, 0, second))
        if isinstance(ours, Exception):
            yield backend, "outcome", f"is {ours!r}"
            continue
        doubtful = {}
        for key, expected in theirs.items():
            if key.startswith("second") and not second:
                continue
            found = ours[key]
            if (found.dtype, found.shape) != (expected.dtype, expected.shape):
                yield backend, key, f"is {found.dtype} {found.shape} instead of {expected.dtype} {expected.shape}"
                continue
            if not key.startswith("second") and not same_strides(found, expected):
                yield backend, key, f"has strides {found.stride()} instead of {expected.stride()}"
            if too_wrong([found], [expected], [truth[key]], _summed(sample, key)):
                doubtful[key] = found.numel()
        if doubtful:
            yield from _after_many_draws(name, sample, backend, doubtful)


def _after_many_draws(
    name: str, sample: Sample, backend: str, doubtful: dict[str, int]
) -> Iterator[tuple[str, str, str]]:
    """The differences that remain over many draws, since the error of a few numbers is random."""
    eager, mine, _ = CASES[name]
    twice = any(key.startswith("second") for key in doubtful)
    ours, theirs, packed, truth = [], [], [], []
    for seed in range(max(2 * ROUNDINGS // min(doubtful.values()), 10)):
        draw = sample.redrawn(seed)
        theirs.append(draw.run(eager, seed, twice))
        packed.append(draw.in_layout(_packed).run(eager, seed, twice))
        truth.append(draw.with_tensors(in_float64).run(eager, seed, twice))
        with serving(backend):
            ours.append(draw.run(mine, seed, twice))
    for key in doubtful:
        found, true = ([results[key] for results in runs] for runs in (ours, truth))
        # torch may be more exact for strided tensors than for contiguous ones; either error is a valid bound.
        whys = [too_wrong(found, [r[key] for r in runs], true, _summed(sample, key)) for runs in (theirs, packed)]
        if all(whys):
            yield backend, key, whys[0]


def _packed(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().requires_grad_(tensor.requires_grad)


def _summed(sample: Sample, key: str) -> float:
    """The magnitude of the terms of running statistics, which may cancel; torch's CPU code sums them in float64."""
    return root_mean_square(sample.arguments[0].detach().double()) if key.endswith("afterwards") else 0.0


@pytest.mark.parametrize("name", CASES)
def test_samples_give_torchs_results(name: str) -> None:
    found, purposes = [], set()
    for dtype in DTYPES:
        if dtype not in CASES[name][2]:
            continue
        backends = [backend for backend in ("native", "reference") if not unserved(backend, dtype, "cpu")]
        listed = samples(name, dtype)
        for layout, sample in in_layouts(listed) if dtype == torch.float32 else (("", sample) for sample in listed):
            for backend, key, why in faults(name, sample, backends, twice=not layout):
                purpose = listed_difference(name, key, why)
                if purpose:
                    purposes.add(purpose)
                else:
                    found.append(f"{dtype} {backend} {layout}: {key} {why}: {sample}")
    assert not found, "\n".join(found)
    # Every entry of `ON_PURPOSE` must be needed.
    assert purposes == {entry for entry in ON_PURPOSE if name in entry[0] and entry[1] != "error"}


@pytest.mark.parametrize("name", CASES)
def test_triton_gives_torchs_results_for_some_samples(name: str) -> None:
    reason = unserved("triton", torch.float32, "cpu")
    if reason:
        pytest.skip(f"triton on cpu: {reason}")
    eager, mine, _ = CASES[name]
    small = [sample for sample in samples(name, torch.float32) if 0 < sample.arguments[0].numel() <= 128]
    for sample in small[:: max(len(small) // 3, 1)]:
        theirs = sample.run(eager, 0, False)
        with serving("triton"):
            ours = outcome(lambda sample=sample: sample.run(mine, 0, False))
        if listed_difference(name, "outcome", f"is {ours!r}"):
            continue
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-4, equal_nan=True)
            assert same_strides(ours[key], value), key


ERRORS = [
    *(
        (name, error.sample_input)
        for name, op in OPS.items()
        if op.error_inputs_func
        for error in op.error_inputs("cpu")
    ),
    *(
        (name, error.module_error_input)
        for name, info in MODULE_INFOS.items()
        if info.module_error_inputs_func
        for error in info.module_error_inputs_func(info, "cpu", torch.float32, False, True)
    ),
]


@pytest.mark.parametrize("name,given", ERRORS, ids=[f"{name}-{place}" for place, (name, _) in enumerate(ERRORS)])
def test_errors_have_torchs_types(name: str, given: Any) -> None:
    def call(fn: Callable[..., Any]) -> Any:
        if name in OPS:
            return fn(given.input, *given.args, **given.kwargs)
        module = made(fn, (given.constructor_input.args, given.constructor_input.kwargs))
        call = given.forward_input
        return call and module(*call.args, **call.kwargs)

    eager, mine, _ = CASES[name]
    theirs, ours = (outcome(lambda fn=fn: call(fn)) for fn in (eager, mine))
    assert isinstance(theirs, Exception)
    assert type(ours) is type(theirs) or listed_difference(name, "error", f"is {ours!r}"), (ours, theirs)


@pytest.mark.parametrize("name", NAMESAKES)
def test_reprs_are_torchs(name: str) -> None:
    theirs, ours, _ = CASES[name]
    for sample in module_samples(name, torch.float32, True):
        assert repr(made(ours, sample.made_by)) == repr(made(theirs, sample.made_by))


def test_a_layer_norm_of_one_element_has_no_gradient(backend: str) -> None:
    """For any eps, although a factor 1 / sqrt(eps) makes the two terms that cancel large."""
    x = torch.randn(7, 1, device=DEVICE, requires_grad=True)
    weight = torch.randn(1, device=DEVICE, requires_grad=True)
    bias = torch.randn(1, device=DEVICE)
    output = functional.layer_norm(x, (1,), weight, bias)
    assert torch.equal(output, bias.expand(7, 1))
    for gradient in torch.autograd.grad(output, (x, weight), torch.randn_like(output)):
        assert not gradient.any()
    output, residual_out = functional.add_layer_norm(x, x.detach(), (1,), weight, bias)
    (gradient,) = torch.autograd.grad((output, residual_out), x, (torch.randn_like(output), torch.ones_like(output)))
    assert torch.equal(gradient, torch.ones_like(x))


@pytest.mark.parametrize("shape", [(0, 3, 5), (4, 3, 0)], ids=str)
def test_an_empty_batch_does_not_update_running_statistics(shape: tuple[int, ...]) -> None:
    for kind in ("BatchNorm1d", "InstanceNorm1d"):
        norm = getattr(modules, kind)(3, affine=True, track_running_stats=True).to(DEVICE)
        norm.running_mean.fill_(2), norm.running_var.fill_(3)
        x = torch.randn(shape, device=DEVICE, requires_grad=True)
        (gradient,) = torch.autograd.grad(norm(x).sum(), norm.weight, create_graph=True)
        assert not gradient.any() and gradient.requires_grad
        assert norm.running_mean.eq(2).all() and norm.running_var.eq(3).all()
        assert norm.num_batches_tracked == 1 if kind == "BatchNorm1d" else True


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("eps", [1e-5, 0.0, -1e-9])
def test_eps_is_an_error_if_torch_rejects_it(eps: float, training: bool) -> None:
    x, mean, var = torch.randn(4, 6, 5, device=DEVICE), torch.zeros(6, device=DEVICE), torch.ones(6, device=DEVICE)

    def called(place: Any) -> dict[str, type]:
        calls = {
            "batch_norm": lambda: place.batch_norm(x, mean, var, None, None, training, 0.1, eps),
            "instance_norm": lambda: place.instance_norm(x, mean, var, None, None, training, 0.1, eps),
            "group_norm": lambda: place.group_norm(x, 2, None, None, eps),
            "layer_norm": lambda: place.layer_norm(x, (5,), None, None, eps),
            "rms_norm": lambda: place.rms_norm(x, (5,), None, eps),
        }
        return {name: type(outcome(call)) for name, call in calls.items()}

    expected = called(nn.functional)
    if eps == 0 and not training:
        # torch before 2.13 rejects this eps.
        expected["batch_norm"] = Tensor
    assert called(functional) == expected

"""Wrong arguments: each of every function and module raises an error that names it and says what was expected."""

import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from ckpt_kernels import backends, convert, functional, memory, nn, offload, recompute
from ckpt_kernels.activations import Activation
from ckpt_kernels.check import check

# Tensors and arrays of several elements are no scalars of any kind, and their repr may be large.
SEVERAL = (torch.tensor([0.5, 0.25]), numpy.array([0.5, 0.25]), torch.nn.UninitializedParameter())
# For each kind of argument, values of other kinds. None is one wherever the annotation does not allow it.
WRONG: dict[Any, tuple[Any, ...]] = {
    float: ("0.5", (0.5,), 1j, torch.tensor(1j), 10**400, object(), *SEVERAL),
    int: ("8", 8.0, (8.0,), True, object(), *SEVERAL),
    bool: ("False", 1, 0.0, object(), numpy.True_, torch.tensor(True), *SEVERAL),
    str: ("nonsense", "", 3, ("gelu",), object(), *SEVERAL),
    Activation: (
        "nonsense",
        "",
        3,
        torch.nn.LeakyReLU(0.3),
        lambda x: x,
        type("Own", (torch.nn.GELU,), {})(),
        *SEVERAL,
    ),
    Tensor: (3, "x", numpy.zeros((4, 8)), torch.zeros(4, 8, dtype=torch.int64), SEVERAL[-1]),
}


def wrong_values(annotation: Any) -> list[Any]:
    """Values that an argument of this annotation does not take."""
    members = typing.get_args(annotation) or (annotation,)
    if annotation is Activation:
        values = WRONG[Activation]
    else:
        values = next((WRONG[kind] for kind in WRONG if kind in members), ())
    return [*values, *([] if types.NoneType in members or not values else [None])]


def faults(call: Callable[..., Any], names: dict[str, Any], called: dict[str, str] | None = None) -> list[str]:
    """Wrong arguments that are accepted, or whose error does not name them."""
    found = []
    for name, annotation in names.items():
        for value in wrong_values(annotation):
            given = f"{name}={type(value).__name__}"
            try:
                call(**{name: value})
                found.append(f"{given} is accepted")
            except (TypeError, ValueError, RuntimeError) as error:
                if (called or {}).get(name, name) not in str(error) or "expected" not in str(error):
                    found.append(f"{given}: {type(error).__name__}: {error}")
    return found


ROWS, ROW, IMAGES = torch.randn(4, 8), torch.randn(8), torch.randn(2, 4, 3, 3)
CHANNELS = torch.rand(4) + 0.5
NORM = {"normalized_shape": 8, "weight": ROW}
HEADS = {"cos": ROWS, "sin": ROWS, "norm": "rms"}
CALLS: dict[str, dict[str, Any]] = {
    "layer_norm": {"input": ROWS, **NORM},
    "rms_norm": {"input": ROWS, **NORM},
    "add_layer_norm": {"input": ROWS, "residual": ROWS, **NORM},
    "add_rms_norm": {"input": ROWS, "residual": ROWS, **NORM},
    "gated_rms_norm": {"input": ROWS, "gate": ROWS, **NORM},
    "modulated_layer_norm": {"input": ROWS, "scale": ROW, "shift": ROW, **NORM},
    "modulated_rms_norm": {"input": ROWS, "scale": ROW, "shift": ROW, **NORM},
    "batch_norm": {"input": IMAGES, "running_mean": CHANNELS, "running_var": CHANNELS, "weight": CHANNELS},
    "group_norm": {"input": IMAGES, "num_groups": 2, "weight": CHANNELS},
    "instance_norm": {"input": IMAGES, "running_mean": CHANNELS, "running_var": CHANNELS, "weight": CHANNELS},
    "glu": {"gate": ROWS, "value": ROWS},
    "packed_glu": {"input": ROWS},
    "bias_act": {"input": ROWS},
    "dyt": {"input": ROWS, "alpha": torch.ones(1)},
    "rotary": {"input": ROWS, "weight": ROW, **HEADS},
    "rotary_qk": {"query": ROWS, "key": ROWS, "query_weight": ROW, "key_weight": ROW, **HEADS},
    "norm_linear": {"input": ROWS, "normalized_shape": 8, "norm_weight": ROW, "norm_bias": None, "weight": ROWS},
    "act_linear": {"input": ROWS, "weight": ROWS},
    "mlp": {"input": ROWS, "weight1": ROWS, "bias1": None, "weight2": ROWS.T, "bias2": None},
    "gated_mlp": {"input": ROWS, "gate_weight": ROWS, "value_weight": ROWS, "weight": ROWS.T},
    "linear_cross_entropy": {"input": ROWS, "weight": ROWS, "target": torch.arange(4)},
}
# `rotary_qk` names arguments as `rotary` does, and a target may be of integers.
CALLED = {f"{of}{what}": what[1:] or "input" for of in ("query", "key") for what in ("", "_weight", "_bias")}


@pytest.mark.parametrize("name", functional.__all__)
def test_functions_name_a_wrong_argument(name: str) -> None:
    function, given = getattr(functional, name), CALLS[name]
    function(**given)
    names = {p.name: p.annotation for p in inspect.signature(function).parameters.values() if p.name != "options"}
    if name == "linear_cross_entropy":
        names["target"] = None
        with pytest.raises(TypeError, match="target is int; expected a tensor"):
            function(**given | {"target": 3})
    called = CALLED if name == "rotary_qk" else None
    assert not faults(lambda **changed: function(**given | changed), names, called)


ARGUMENTS: dict[str, tuple[Any, ...]] = {
    **{name: (8,) for name in nn.__all__},
    **{name: (8, 16) for name in ("NormLinear", "ActLinear", "MLP", "GatedMLP")},
    "GroupNorm": (2, 4),
    "GLU": (),
}


@pytest.mark.parametrize("name", nn.__all__)
def test_modules_name_a_wrong_argument(name: str) -> None:
    """All but the arguments that torch's own constructors take, and check or not."""
    module = getattr(nn, name)
    torchs = [base for base in module.__mro__ if base.__module__.startswith("torch.nn.modules")]
    theirs = inspect.signature(torchs[0].__init__).parameters
    ours = inspect.signature(module.__init__).parameters
    positional = list(zip((p for p in ours if p != "self"), ARGUMENTS[name], strict=False))
    given = {} if "args" in ours else dict(positional)
    args = ARGUMENTS[name] if "args" in ours else ()
    names = {p.name: p.annotation for p in ours.values() if p.name not in (*theirs, "self", "device", "dtype")}
    assert not faults(lambda **changed: module(*args, **given | changed), names)


MODEL = torch.nn.Linear(3, 3)
INPUT = torch.randn(2, 3)
OTHERS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "include": (lambda: convert(MODEL, include=3), TypeError, "include is int; expected names or classes"),
    "exclude": (lambda: convert(MODEL, exclude=3), TypeError, "exclude is int; expected names or classes"),
    "module": (lambda: recompute.DiscardOutputs(3), TypeError, "module is int; expected a torch.nn.Module"),
    "parameters_of": (
        lambda: memory.saved_bytes(torch.relu, INPUT, parameters_of=3),
        TypeError,
        "parameters_of is int; expected a torch.nn.Module or None",
    ),
    "allocations": (lambda: memory.allocations(3), TypeError, "fn is int; expected a function"),
    "device": (lambda: memory.peak_bytes(lambda: 0, "meta"), ValueError, "device is meta; expected the CPU or a CUDA"),
    "meta": (
        lambda: memory.report(torch.nn.Linear(3, 3, device="meta"), INPUT.to("meta")),
        ValueError,
        "model is on meta; expected the CPU or a CUDA device",
    ),
    "other": (
        lambda: memory.report_beside(MODEL, 3, ("a", "b"), (INPUT,), {}),
        TypeError,
        "other is int; expected a torch.nn.Module",
    ),
    "kept_bytes": (lambda: memory.kept_bytes(3, INPUT), TypeError, "model is int; expected a torch.nn.Module"),
    "depth": (lambda: memory.Report(0, 0, 0, 0, [], []).table("1"), TypeError, "depth is '1'; expected a whole number"),
    "backend": (
        lambda: backends.why_not("x", "cpu", torch.float32),
        ValueError,
        "name is 'x'; expected one of triton, native, reference",
    ),
    "least": (lambda: offload.offload(MODEL, "*", least=True), TypeError, "least is True; expected a whole number"),
    "rotary_dim": (lambda: nn.Rotary(8, rotary_dim=10), ValueError, "rotary_dim 10; expected an even number"),
    **{
        f"shape of {name}": (lambda n=name: getattr(nn, n)(8.0), TypeError, "normalized_shape is 8.0; expected a")
        for name in ("LayerNorm", "RMSNorm", "AddLayerNorm", "AddRMSNorm", "GatedRMSNorm", "ModulatedLayerNorm")
    },
    "negative shape": (lambda: nn.LayerNorm(-1), ValueError, "normalized_shape is -1; expected"),
    "layout": (
        lambda: nn.GatedMLP(8, 16, layout="interleaved"),
        ValueError,
        "layout is 'interleaved' and packed is Fal",
    ),
    "norm": (lambda: nn.Rotary(8, norm="none"), ValueError, "norm is 'none'; expected one of rms, layer"),
    "checked": (lambda: check(3, (INPUT,)), TypeError, "model is int; expected a torch.nn.Module"),
    "biases": (
        lambda: functional.norm_linear(ROWS, 8, None, None, [ROWS], 3),
        TypeError,
        "bias is int; expected a sequence",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_calls_name_a_wrong_argument(name: str) -> None:
    call, error, text = OTHERS[name]
    with pytest.raises(error) as raised:
        call()
    assert text in str(raised.value)


def test_numbers_of_groups_may_be_symbols() -> None:
    compiled = torch.compile(lambda groups: functional.group_norm(IMAGES, groups), backend="eager", fullgraph=True)
    for groups in (2, 4, 1):
        torch.testing.assert_close(compiled(groups), functional.group_norm(IMAGES, groups))


def test_numbers_of_other_libraries_are_numbers() -> None:
    expected = functional.layer_norm(ROWS, 8, eps=0.25)
    for eps in (numpy.float32(0.25), torch.tensor(0.25), numpy.array(0.25)):
        assert torch.equal(functional.layer_norm(ROWS, numpy.int64(8), eps=eps), expected)

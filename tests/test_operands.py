"""The native ops check every tensor before they read or write it; errors name the argument.

The arguments of a call have passed the checks in Python. But users' hooks may unpack other tensors in a backward pass,
and the dtype and the memory of a parameter may change while the graph keeps the parameter.
"""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn

import ckpt_kernels.nn as ours
from ckpt_kernels import functional, thin, use_backend
from ckpt_kernels.backends import native
from ckpt_kernels.thin import direct

from .conftest import DEVICE, unserved

pytestmark = pytest.mark.skipif(
    native.why_not(DEVICE, torch.float32) is not None, reason="the native backend is not here"
)

ROWS, COLUMNS, SAMPLES = 6, 8, 2  # as channels: planes of SAMPLES * 3 channels, of COLUMNS elements


def many(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


def matrix() -> Tensor:
    return many(ROWS, COLUMNS)


def heads() -> Tensor:
    """Rows in three dimensions."""
    return many(3, 2, 1, COLUMNS)


def _tables() -> dict[str, Tensor]:
    return {"cos": many(3, 1, 1, COLUMNS), "sin": many(1, 2, 1, COLUMNS // 2)}


_ROTARY = {"rotary_dim": COLUMNS, "start": 0, "interleaved": False, "interleaved_output": True, "norm": 2, "eps": 1e-5}
_ROTARY |= {"weight_offset": 0.0, "cast_before_weight": False}


def seed() -> Tensor:
    return torch.zeros(1, dtype=torch.int64, device=DEVICE)


def _channels(*names: str) -> dict[str, Tensor]:
    return {name: many(3) for name in names}


def _row_norm(**more: Tensor) -> dict[str, object]:
    block = {"input": matrix(), "weight": many(COLUMNS), "bias": many(COLUMNS), "mean": many(ROWS), "rstd": many(ROWS)}
    numbers = {"eps": 1e-5, "pre_activation": 0, "activation": 1, "weight_offset": 0.0, "cast_before_weight": False}
    return block | numbers | {"dropout_p": 0.0, "gate_before_norm": False, "given_statistics": False} | more


def _row_norm_gradients() -> dict[str, Tensor]:
    gradients = {name: matrix() for name in ("grad_output", "grad_input", "output")}
    return gradients | {"grad_weight": many(COLUMNS), "grad_bias": many(COLUMNS)}


_GATE = {"activation": 1, "limit": 7.0, "offset": 1.0}
_PIECES = {"planes": True, "samples": SAMPLES, "piece_rows": COLUMNS, "activation": 1, "by_output": False}
_SETS = {"groups": 0, "count": 16.0, "eps": 1e-5, "fixed": False, "given_statistics": False}


def _pieces() -> Tensor:
    return many(SAMPLES, 1, 3)


def _map_norm(*maps: str) -> dict[str, object]:
    numbers = {"eps": 1e-5, "activation": 1, "weight_offset": 0.0, "cast_before_weight": False}
    pixels = {"mean": many(SAMPLES * COLUMNS), "rstd": many(SAMPLES * COLUMNS), "given_statistics": False}
    return {name: many(SAMPLES, 3, COLUMNS) for name in maps} | _channels("weight", "bias") | pixels | numbers


# Each op with all its tensors; variants of a block with other tensors are separate calls.
CALLS: dict[str, tuple[str, Callable[[], dict[str, object]]]] = {
    "residual": (
        "row_norm_forward",
        lambda: _row_norm(residual=matrix(), residual_out=matrix(), output=matrix(), seed=seed(), dropout_p=0.5),
    ),
    "gate": ("row_norm_forward", lambda: _row_norm(gate=matrix(), output=matrix())),
    "levels": (
        "row_norm_forward",
        lambda: _row_norm(input=many(3, 2, 1, COLUMNS).transpose(0, 1), output=matrix()),
    ),
    "residual backward": (
        "row_norm_backward",
        lambda: _row_norm(
            grad_residual_out=matrix(),
            grad_residual=matrix(),
            seed=seed(),
            **_row_norm_gradients() | {"dropout_p": 0.5},
        ),
    ),
    "gate backward": (
        "row_norm_backward",
        lambda: _row_norm(gate=matrix(), grad_gate=matrix(), **_row_norm_gradients() | {"output": None}),
    ),
    "glu": ("glu_forward", lambda: {"gate": matrix(), "value": matrix(), "output": matrix()} | _GATE),
    "glu backward": (
        "glu_backward",
        lambda: (
            {name: matrix() for name in ("grad_output", "gate", "value", "grad_gate", "grad_value", "output")} | _GATE
        ),
    ),
    "bias_act": (
        "bias_act_forward",
        lambda: (
            {"input": matrix(), "bias": many(COLUMNS), "seed": seed(), "output": matrix()}
            | {"activation": 1, "dropout_p": 0.5}
        ),
    ),
    "bias_act backward": (
        "bias_act_backward",
        lambda: (
            {name: matrix() for name in ("grad_output", "input", "grad_input", "output")}
            | {"bias": many(COLUMNS), "grad_bias": many(COLUMNS), "seed": seed(), "activation": 1, "dropout_p": 0.5}
        ),
    ),
    "dyt": (
        "dyt_forward",
        lambda: (
            {"input": matrix(), "output": matrix()} | {"alpha": many(1), "weight": many(COLUMNS), "bias": many(COLUMNS)}
        ),
    ),
    "dyt backward": (
        "dyt_backward",
        lambda: (
            {name: matrix() for name in ("grad_output", "input", "grad_input")}
            | {"alpha": many(1), "grad_alpha": many(1)}
            | {name: many(COLUMNS) for name in ("weight", "grad_weight", "grad_bias")}
        ),
    ),
    "rotary": (
        "rotary_forward",
        lambda: (
            {"input": heads(), "output": heads(), "weight": many(COLUMNS), "bias": many(COLUMNS)} | _tables() | _ROTARY
        ),
    ),
    "rotary backward": (
        "rotary_backward",
        lambda: (
            {name: heads() for name in ("grad_output", "input", "grad_input")}
            | {name: many(COLUMNS) for name in ("weight", "grad_weight", "grad_bias")}
            | _tables()
            | _ROTARY
        ),
    ),
    "moments": ("channel_moments", lambda: {"input": matrix(), "mean": _pieces(), "squares": _pieces()} | _PIECES),
    "forward": (
        "channel_forward",
        lambda: {"input": matrix(), "residual": matrix(), "coefficients": many(3, 1, 3), "output": matrix()} | _PIECES,
    ),
    "sums": (
        "channel_sums",
        lambda: (
            {name: matrix() for name in ("grad_output", "input", "other")}
            | {"coefficients": many(3, 1, 3), "first": _pieces(), "second": _pieces()}
            | _PIECES
        ),
    ),
    "backward": (
        "channel_backward",
        lambda: (
            {name: matrix() for name in ("grad_output", "input", "other", "grad_input", "grad_residual")}
            | {"coefficients": many(6, 1, 3)}
            | _PIECES
        ),
    ),
}
if DEVICE == "cpu":
    CALLS |= {
        "statistics": (
            "channel_statistics",
            lambda: (
                {"means": _pieces(), "squares": _pieces(), **_channels("mean", "var")}
                | {"groups": 0, "size": COLUMNS, "piece_rows": COLUMNS}
            ),
        ),
        "coefficients": (
            "channel_coefficients",
            lambda: _channels("mean", "weight", "bias") | {"var": many(3).abs(), "coefficients": many(3, 1, 3)} | _SETS,
        ),
        "backward coefficients": (
            "channel_backward_coefficients",
            lambda: (
                {"first": _pieces(), "second": _pieces(), "var": many(3).abs(), "coefficients": many(6, 1, 3)}
                | _channels("weight", "grad_weight", "grad_bias")
                | _SETS
            ),
        ),
        "whole": (
            "channel_norm_forward",
            lambda: (
                {name: matrix() for name in ("input", "residual", "output")}
                | _channels("weight", "bias", "mean", "var")
                | _PIECES
                | _SETS
            ),
        ),
        "whole backward": (
            "channel_norm_backward",
            lambda: (
                {name: matrix() for name in ("grad_output", "input", "other", "grad_input", "grad_residual")}
                | _channels("weight", "bias", "mean", "grad_weight", "grad_bias")
                | {"var": many(3).abs()}
                | _PIECES
                | _SETS
            ),
        ),
        "map": ("map_norm_forward", lambda: _map_norm("input", "output")),
        "map backward": (
            "map_norm_backward",
            lambda: _map_norm("input", "grad_output", "grad_input") | _channels("grad_weight", "grad_bias"),
        ),
    }

# Arguments that an op converts from any floating-point dtype.
_CONVERTED = ("alpha", "weight", "bias", "cos", "sin")


def _arguments(name: str, operands: dict[str, object]) -> list[object]:
    op = getattr(torch.ops.ckpt_kernels_native, CALLS[name][0]).default
    return [operands.get(argument.name) for argument in op._schema.arguments]


def _run(name: str, operands: dict[str, object]) -> None:
    getattr(torch.ops.ckpt_kernels_native, CALLS[name][0])(*_arguments(name, operands))


def _freed(tensor: Tensor) -> Tensor:
    """A part of a larger, freed storage, like a parameter that FSDP has sharded again."""
    whole = tensor.new_empty(tensor.numel() + 64)
    part = whole[64:].view(tensor.shape)
    whole.untyped_storage().resize_(0)
    return part


def _of_another_dtype(name: str, argument: str, tensor: Tensor) -> list[Tensor]:
    """The tensor in wrong dtypes. If the first operand changes, the error names other operands."""
    if argument in _CONVERTED:
        return [tensor.long()]
    # A bfloat16 input also has float32 moments, so bfloat16 is no error there.
    dtypes = (
        (torch.float64, torch.int32) if (name, argument) == ("moments", "input") else (torch.bfloat16, torch.float64)
    )
    return [tensor.to(dtype) for dtype in dtypes]


def _cases(name: str) -> list[str]:
    return [argument for argument, value in CALLS[name][1]().items() if isinstance(value, Tensor)]


@pytest.mark.parametrize(("name", "argument"), [(name, argument) for name in CALLS for argument in _cases(name)])
def test_each_tensor_is_checked(name: str, argument: str) -> None:
    _run(name, CALLS[name][1]())
    operands = CALLS[name][1]()
    given = operands[argument]
    wrong = [(t, "dtype") for t in _of_another_dtype(name, argument, given)] + [(_freed(given), "is not allocated yet")]
    if given.numel() > 1:
        wrong.append((given.flatten()[:-1], "expected|is no|has not"))
    if DEVICE == "cuda":
        wrong.append((given.cpu(), "device|CPU"))
    by_plan = direct.direct(CALLS[name][0]) if DEVICE == "cpu" and direct.is_available else None
    for tensor, said in wrong:
        with pytest.raises(RuntimeError, match=said):
            _run(name, operands | {argument: tensor})
        if by_plan is not None:
            assert by_plan(*_arguments(name, operands | {argument: tensor})) is False


@pytest.mark.skipif(DEVICE != "cpu", reason="some ops are the CPU's alone")
def test_every_native_op_is_tested() -> None:
    declared = {schema.partition("(")[0] for schema in native._SCHEMAS}
    assert {op for op, _ in CALLS.values()} == declared - {"cpu_isa"}


def test_errors_name_the_argument() -> None:
    operands = CALLS["residual"][1]()
    with pytest.raises(RuntimeError, match="mean has dtype float64; expected float32"):
        _run("residual", operands | {"mean": operands["mean"].double()})
    with pytest.raises(RuntimeError, match="weight has elements, but its data is not allocated yet"):
        _run("residual", operands | {"weight": _freed(operands["weight"])})
    with pytest.raises(RuntimeError, match="output has dtype float32; expected bfloat16"):
        _run("residual", operands | {name: operands[name].bfloat16() for name in ("input", "residual")})


def test_interleaved_gate_and_value_need_interleaved_gradients() -> None:
    packed, grad = many(ROWS, 2 * COLUMNS), many(ROWS, 2 * COLUMNS)
    operands = {"grad_output": matrix(), "gate": packed[:, ::2], "value": packed[:, 1::2], **_GATE}
    _run("glu backward", operands | {"grad_gate": grad[:, ::2], "grad_value": grad[:, 1::2]})
    with pytest.raises(RuntimeError, match="take turns"):
        _run("glu backward", operands | {"grad_gate": grad[:, ::2], "grad_value": many(ROWS, 2 * COLUMNS)[:, ::2]})


BLOCKS = {
    "layer_norm": lambda x: functional.layer_norm(x, COLUMNS, activation="gelu"),
    "rms_norm": lambda x: functional.rms_norm(x, COLUMNS),
    "bias_act": lambda x: functional.bias_act(x, activation="gelu"),
    "relu": lambda x: functional.bias_act(x, activation="relu"),
    "packed_glu": lambda x: functional.packed_glu(x),
    "glu": lambda x: functional.glu(x, x),
    "dyt": lambda x: functional.dyt(x, torch.ones(1, device=DEVICE)),
    "rotary": lambda x: functional.rotary(x, x.detach(), x.detach(), norm="rms"),
    "group_norm": lambda x: functional.group_norm(x, 2),
    "batch_norm": lambda x: functional.batch_norm(x, None, None, training=True),
}


def _native() -> AbstractContextManager[None]:
    """On CUDA the native backend, because Triton's kernels read any dtype."""
    return contextlib.nullcontext() if DEVICE == "cpu" else use_backend("native")


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_hooks_that_unpack_another_dtype(name: str, dtype: torch.dtype) -> None:
    """The first pass takes the full path, the second a plan."""
    x = matrix().requires_grad_()
    for _ in range(2):
        with _native(), torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), lambda t: t.to(dtype)):
            y = BLOCKS[name](x)
        with _native(), pytest.raises(RuntimeError, match=r"has dtype|cannot serve torch\.float64 on cuda"):
            torch.autograd.grad(y, x, torch.ones_like(y))


NORMS = {
    "layer_norm": lambda: (ours.LayerNorm(COLUMNS), nn.LayerNorm(COLUMNS)),
    "rms_norm": lambda: (ours.RMSNorm(COLUMNS), nn.RMSNorm(COLUMNS)),
    "batch_norm": lambda: (ours.BatchNorm1d(COLUMNS), nn.BatchNorm1d(COLUMNS)),
    "group_norm": lambda: (ours.GroupNorm(2, COLUMNS), nn.GroupNorm(2, COLUMNS)),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("wide_first", [True, False])
def test_a_module_may_change_its_dtype_before_the_backward_pass(name: str, wide_first: bool) -> None:
    """Weights and input then differ in dtype: the gradients are those with the weights in the new dtype."""
    if wide_first and DEVICE == "cuda":
        pytest.skip("CUDA kernels do not compute in float64")
    first, second = (torch.float64, torch.float32) if wide_first else (torch.float32, torch.bfloat16)
    norm, theirs = (module.to(DEVICE) for module in NORMS[name]())
    for module in (norm, theirs):
        nn.init.constant_(module.weight, 1.5)
    data, grad = many(ROWS, COLUMNS).to(first), many(ROWS, COLUMNS).to(first)
    for _ in range(2):
        norm.to(first)
        x, expected = (data.detach().requires_grad_() for _ in range(2))
        y = norm(x)
        norm.to(second)
        y.backward(grad)
        theirs.to(first)(expected).backward(grad)
        torch.testing.assert_close(x.grad, expected.grad, rtol=1e-4, atol=1e-5)
        # Autograd casts the weight's gradient to the dtype that the weight had in the forward pass.
        torch.testing.assert_close(norm.weight.grad.to(first), theirs.weight.grad, rtol=1e-2, atol=1e-2)
        norm.zero_grad()
        theirs.zero_grad()


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_freed_memory_is_an_error(backend: str) -> None:
    """As in torch, before and between the passes; a weight without memory is not treated as None."""
    if unserved(backend, torch.float32):
        pytest.skip(f"{backend} is not here")
    with use_backend(backend):
        _freed_memory_is_an_error()


def _freed_memory_is_an_error() -> None:
    x, weight, bias = matrix(), many(COLUMNS), many(COLUMNS)
    for name in ("weight", "bias", "input"):
        for free in (_freed, lambda t: t.clone()):
            given = {"input": x, "weight": weight, "bias": bias}
            given[name] = free(given[name])
            given[name].untyped_storage().resize_(0)
            for _ in range(2):
                functional.layer_norm(x, COLUMNS, weight, bias)
                with pytest.raises(RuntimeError, match=f"{name} has elements, but its data is not allocated yet"):
                    functional.layer_norm(given["input"], COLUMNS, given["weight"], given["bias"])
    for _ in range(2):
        kept = weight.clone().requires_grad_()
        y = functional.layer_norm(x.clone().requires_grad_(), COLUMNS, kept)
        kept.untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match="weight has elements, but its data is not allocated yet"):
            y.sum().backward()


def test_a_plan_rejects_freed_memory() -> None:
    assert not thin.direct.is_plain(_freed(torch.randn(8)))
    assert not thin.direct.is_plain(_freed(torch.randn(8)).view(2, 4))
    if direct.is_available:
        assert thin.direct.is_plain(torch.randn(72)[64:])

"""Rotary functions of queries and keys, which trials recognise, and calls that are left to the function."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor, nn

import ckpt_kernels
from ckpt_kernels.convert.rotations.forms import Rotation
from ckpt_kernels.convert.rotations.recognition import rotation_of
from ckpt_kernels.memory import saved_bytes

from .conftest import DEVICE
from .conversion import twins

HEADS, KEYS, TOKENS, COLUMNS = 4, 2, 6, 16


def rotate_half(x: Tensor) -> Tensor:
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)


def rotate_every_two(x: Tensor) -> Tensor:
    return torch.stack((-x[:, :, :, 1::2], x[:, :, :, ::2]), dim=-1).flatten(-2)


def halves(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def in_float32(q, k, cos, sin):
    dtype = q.dtype
    cos, sin = cos.unsqueeze(1).float(), sin.unsqueeze(1).float()
    q, k = q.float(), k.float()
    return (q * cos + rotate_half(q) * sin).to(dtype), (k * cos + rotate_half(k) * sin).to(dtype)


def a_leading_part(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    size = cos.shape[-1]
    q_turned = torch.cat((q[..., :size] * cos + rotate_half(q[..., :size]) * sin, q[..., size:]), -1)
    return q_turned, torch.cat((k[..., :size] * cos + rotate_half(k[..., :size]) * sin, k[..., size:]), -1)


def the_last_part(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    size = cos.shape[-1]
    q_turned = torch.cat((q[..., :-size], q[..., -size:] * cos + rotate_half(q[..., -size:]) * sin), -1)
    return q_turned, torch.cat((k[..., :-size], k[..., -size:] * cos + rotate_half(k[..., -size:]) * sin), -1)


def to_halves(q, k, cos, sin):
    cos = cos[..., : cos.shape[-1] // 2].unsqueeze(1)
    sin = sin[..., : sin.shape[-1] // 2].unsqueeze(1)
    q1, q2, k1, k2 = q[..., ::2], q[..., 1::2], k[..., ::2], k[..., 1::2]
    return torch.cat((q1 * cos - q2 * sin, q2 * cos + q1 * sin), -1), torch.cat(
        (k1 * cos - k2 * sin, k2 * cos + k1 * sin), -1
    )


def turned_back(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    half = q.shape[-1] // 2
    q_turned = q * cos + torch.cat((q[..., half:], -q[..., :half]), -1) * sin
    return q_turned, k * cos + torch.cat((k[..., half:], -k[..., :half]), -1) * sin


def half_tables(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    q1, q2 = torch.chunk(q, 2, dim=-1)
    k1, k2 = torch.chunk(k, 2, dim=-1)
    return torch.cat((q1 * cos - q2 * sin, q2 * cos + q1 * sin), -1), torch.cat(
        (k1 * cos - k2 * sin, k2 * cos + k1 * sin), -1
    )


def one(x, sin, cos):
    sin = torch.repeat_interleave(sin[:, :, None, :], 2, 3)
    cos = torch.repeat_interleave(cos[:, :, None, :], 2, 3)
    return x * cos + rotate_every_two(x) * sin


# Functions with the columns of their tables.
FORMS: dict[str, tuple[Callable[..., Any], int]] = {
    "halves": (halves, COLUMNS),
    "in float32": (in_float32, COLUMNS),
    "a part": (a_leading_part, COLUMNS // 2),
    "the last part": (the_last_part, COLUMNS // 2),
    "neighbours to halves": (to_halves, COLUMNS),
    "turned back": (turned_back, COLUMNS),
    "half tables": (half_tables, COLUMNS // 2),
}


def turn(q, k, cos, sin):
    """A placeholder, which the tests replace by one of the functions."""
    raise NotImplementedError


def turn_one(x, sin, cos):
    raise NotImplementedError


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        width = HEADS * COLUMNS
        self.q, self.k, self.v = (
            nn.Linear(width, width),
            nn.Linear(width, KEYS * COLUMNS),
            nn.Linear(width, KEYS * COLUMNS),
        )
        self.q_norm, self.k_norm = nn.RMSNorm(COLUMNS), nn.RMSNorm(COLUMNS)

    def forward(self, x, cos, sin):
        q = self.q_norm(self.q(x).unflatten(-1, (HEADS, COLUMNS))).transpose(1, 2)
        k = self.k_norm(self.k(x).unflatten(-1, (KEYS, COLUMNS))).transpose(1, 2)
        v = self.v(x).unflatten(-1, (KEYS, COLUMNS)).transpose(1, 2)
        q, k = turn(q, k, cos, sin)
        return TF.scaled_dot_product_attention(q, k, v, enable_gqa=True), q, k


class OneByOne(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(HEADS * COLUMNS, HEADS * COLUMNS)

    def forward(self, x, cos, sin):
        return (turn_one(self.q(x).unflatten(-1, (HEADS, COLUMNS)), sin, cos),)


class ByMethod(OneByOne):
    """Rotates in a method that names no child of the module."""

    def rotated(self, q, tables):
        return turn_one(q, *tables)

    def forward(self, x, cos, sin):
        return (self.rotated(self.q(x).unflatten(-1, (HEADS, COLUMNS)), (sin, cos)),)


class Importing(ByMethod):
    def rotated(self, q, tables):
        from tests.test_convert_rotations import one

        return one(q, *tables)


class Defining(ByMethod):
    def rotated(self, q, tables):
        def turned(x, sin, cos):
            cos, sin = cos[:, :, None], sin[:, :, None]
            left, right = x.chunk(2, -1)
            return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)

        return turned(q, *tables)


def results(model: nn.Module, x: Tensor, *tables: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    x = x.clone().requires_grad_()
    outputs = model(x, *tables)
    loss = sum((o.double() * torch.arange(o.shape[-1], device=DEVICE)).sum() for o in outputs)
    return list(outputs), list(torch.autograd.grad(loss, [x, *model.parameters()]))


def operands(columns: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    tables = [torch.randn(2, TOKENS, columns, dtype=dtype, device=DEVICE) for _ in range(2)]
    return torch.randn(2, TOKENS, HEADS * COLUMNS, dtype=dtype, device=DEVICE), *tables


def assert_same(model: nn.Module, twin: nn.Module, given: tuple[Tensor, ...]) -> None:
    (outputs, grads), (expected, expected_grads) = results(twin, *given), results(model, *given)
    assert [o.stride() for o in outputs] == [e.stride() for e in expected]
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-4)


def rotary_entry(report: Any) -> str:
    return next((entry.by for entry in report.replaced if "rotary" in entry.by), "")


@pytest.mark.parametrize("level", ["output", "layer"])
@pytest.mark.parametrize("name", FORMS)
def test_rotary_functions_are_fused(name: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, columns = FORMS[name]
    monkeypatch.setitem(globals(), "turn", function)
    model, twin = twins(Attention)
    assert rotary_entry(ckpt_kernels.convert(twin, recompute=level)) == "rotary"
    given = operands(columns)
    assert_same(model, twin, given)
    # Only the norm's input of each head is kept, and the negated table of a rotation in the other direction. On CUDA
    # torch's RMSNorm keeps no more.
    given[0].requires_grad_()
    fewer = 2 * (HEADS + KEYS) * given[0][..., :COLUMNS].nbytes if DEVICE == "cpu" else 0
    assert saved_bytes(twin, *given) <= saved_bytes(model, *given) - fewer + given[2].nbytes * (name == "turned back")


@pytest.mark.parametrize("made", [OneByOne, ByMethod, Importing, Defining])
def test_a_rotation_of_queries_alone(made: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "turn_one", one)
    model, twin = twins(made)
    assert rotary_entry(ckpt_kernels.convert(twin)) == "rotary"
    assert_same(model, twin, operands(COLUMNS // 2))


def test_results_have_the_functions_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """With float32 tables, results of bfloat16 heads are float32."""
    monkeypatch.setitem(globals(), "turn", halves)
    model, twin = twins(lambda: Attention().bfloat16())
    ckpt_kernels.convert(twin)
    x, *tables = operands(COLUMNS, torch.bfloat16)
    found, expected = twin(x, *tables), model(x, *tables)
    truth = model.double()(*(t.double() for t in (x, *tables)))
    model.bfloat16()
    for f, e, t in zip(found, expected, truth, strict=True):
        assert f.dtype == e.dtype
        assert (f - t).abs().max() <= 1.5 * (e - t).abs().max() + 2**-8 * t.abs().max()
    # Attention rejects queries with another dtype than the values'.
    with pytest.raises(RuntimeError, match="dtype"):
        model(x, *(table.float() for table in tables))
    with pytest.raises(RuntimeError, match="dtype"):
        twin(x, *(table.float() for table in tables))


def test_tables_of_a_wrong_shape_are_the_functions_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "turn", halves)
    model, twin = twins(Attention)
    ckpt_kernels.convert(twin)
    x, cos, sin = operands(COLUMNS)
    for bad in (
        (cos[..., :8], sin[..., :8]),
        (cos[:, :3], sin[:, :3]),
        (cos.double(), sin),
        (cos, sin.double()),
        (cos, sin[..., :8]),
    ):
        try:
            expected: Any = model(x, *bad)
        except RuntimeError as error:
            with pytest.raises(type(error)) as raised:
                twin(x, *bad)
            assert str(raised.value) == str(error)
        else:
            torch.testing.assert_close(twin(x, *bad), expected)


def test_heads_without_unit_stride_are_left_to_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(2, 7, COLUMNS, 4, device=DEVICE).permute(0, 3, 1, 2)
    table = torch.randn(2, 7, COLUMNS // 2, device=DEVICE)
    for function in (half_tables, a_leading_part):
        rotation = rotation_of(function)
        assert rotation is not None and rotation.of((q, q, table, table), {}) is None
        assert rotation.of((q.contiguous(), q.contiguous(), table, table), {}) is not None


@pytest.mark.parametrize("level", ["output", "layer"])
def test_layers_compile_without_a_graph_break(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "turn", halves)
    model, twin = twins(lambda: nn.ModuleList([Attention()]))
    ckpt_kernels.convert(twin, recompute=level)
    given = operands(COLUMNS)
    compiled = torch.compile(twin[0], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(results(compiled, *given)[0], results(model[0], *given)[0])


def other(x: Tensor) -> Tensor:
    return torch.cat((x[..., x.shape[-1] // 2 :], -x[..., : x.shape[-1] // 2]), dim=-1)


def test_replaced_functions_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rotary function, or a function that it calls, is replaced after the conversion."""
    monkeypatch.setitem(globals(), "turn", halves)
    model, twin = twins(Attention)
    ckpt_kernels.convert(twin)
    given = operands(COLUMNS)
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "rotate_half", other)
        assert_same(model, twin, given)
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "turn", in_float32)
        assert_same(model, twin, given)
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "turn", lambda q, k, cos, sin: (q, k))
        assert_same(model, twin, given)


def given(columns: int = COLUMNS, entries: int = COLUMNS) -> list[Tensor]:
    shapes = (2, HEADS, TOKENS, columns), (2, KEYS, TOKENS, columns), *((2, TOKENS, entries),) * 2
    return [torch.randn(shape, device=DEVICE) for shape in shapes]


def test_untried_arguments_are_left_to_the_function() -> None:
    """Dtypes, gradients, keywords and sizes that no trial covers."""
    rotation, half = rotation_of(halves), rotation_of(half_tables)
    assert rotation is not None and half is not None
    q, k, cos, sin = given()
    assert rotation.of((q, k, cos, sin), {}) is not None
    assert rotation.of((q, k, cos), {"sin": sin, "unsqueeze_dim": 1}) is not None
    assert rotation.of((q, k.bfloat16(), cos, sin), {}) is None
    assert rotation.of((q, k, cos, sin.clone().requires_grad_()), {}) is None
    assert rotation.of((q, k, cos, None), {}) is None
    assert rotation.of((q, k, cos, sin), {"scale": 2}) is None
    assert rotation.of((q, k, cos, sin), {"q": q}) is None
    assert rotation.of((q, k, cos), {}) is None
    assert rotation.of((q, k, cos, sin, 1, 2), {}) is None
    for dimension in (1.0, True, "1", [1]):
        assert rotation.of((q, k, cos, sin, dimension), {}) is None
    # Half tables for a part of a head, and heads of odd length.
    assert half.of(given(16, 4), {}) is None and half.of(given(16, 8), {}) is not None
    assert rotation.of(given(7, 7), {}) is None


@pytest.mark.parametrize("shapes", [((5, 3, 8), (5, 8)), ((2, 5, 3, 8), (2, 5, 8)), ((2, 3, 5, 8), (5, 8))], ids=str)
def test_other_orders_of_dimensions_are_fused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """Heads of three dimensions, heads after tokens, tables for all samples."""
    heads, table = shapes
    dimension = 1 if heads[-3] == table[-2] else 0
    dimension = 2 if len(table) == 3 else dimension
    rotation = rotation_of(halves)
    assert rotation is not None
    q, (cos, sin) = torch.randn(heads, device=DEVICE), torch.randn(2, *table, device=DEVICE)
    found, expected = rotation.of((q, q, cos, sin, dimension), {}), halves(q, q, cos, sin, dimension)
    assert found is not None
    torch.testing.assert_close(found, expected)


def test_tables_that_require_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "turn", halves)
    model, twin = twins(Attention)
    ckpt_kernels.convert(twin)
    x, *tables = operands(COLUMNS)
    found = []
    for module in (model, twin):
        sources = [t.clone().requires_grad_() for t in tables]
        found.append(torch.autograd.grad(sum(o.sum() for o in module(x, *sources)), sources))
    torch.testing.assert_close(*found)


class Placed(Attention):
    """Passes a setting in the call of the rotary function."""

    dimension = 2

    def forward(self, x, cos, sin):
        q = self.q(x).unflatten(-1, (HEADS, COLUMNS))
        k = self.k(x).unflatten(-1, (KEYS, COLUMNS))
        one = turn(q, k, cos, sin, self.dimension)
        return *one, *turn(q, k, cos, sin, unsqueeze_dim=self.dimension), *turn(q, k, cos, sin, *[self.dimension])


def test_settings_of_calls_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings but those of the calls and the defaults are tried."""
    monkeypatch.setitem(globals(), "turn", halves)
    served: list[bool] = []
    of = Rotation.of
    monkeypatch.setattr(Rotation, "of", lambda *given: served.append((found := of(*given)) is not None) or found)
    model, twin = twins(Placed)
    ckpt_kernels.convert(twin)
    x, cos, sin = operands(COLUMNS)
    for ours, theirs in zip(twin(x, cos, sin), model(x, cos, sin), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert served == [True] * 3
    by_default, by_all = rotation_of(halves, ()), rotation_of(halves)
    assert by_default is not None and by_all is not None
    assert list(by_default.conventions) == [((int, 1),)] and len(by_all.conventions) > 1
    assert (
        by_default.conventions.items() <= by_all.conventions.items()
        and by_default.forms.items() <= by_all.forms.items()
    )

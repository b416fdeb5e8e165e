"""Attention processors: objects that a module calls with itself as an argument, and that rotate queries and keys."""

from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor, nn

import ckpt_kernels
from ckpt_kernels.convert.rotations.recognition import rotation_of
from ckpt_kernels.memory import saved_bytes

from .conftest import DEVICE
from .conversion import twins

HEADS, TOKENS, COLUMNS = 4, 6, 16


def turn(x, tables, complex_tables=False, dimension=2, halves=False):
    """Rotates heads, before or after tokens, by a pair of tables or a table of complex numbers."""
    if not complex_tables:
        cos, sin = tables
        if dimension == 2:
            cos, sin = cos[None, None, :, :], sin[None, None, :, :]
        elif dimension == 1:
            cos, sin = cos[None, :, None, :], sin[None, :, None, :]
        else:
            raise ValueError(f"dimension is {dimension}")
        if halves:
            first, second = x.reshape(*x.shape[:-1], 2, -1).unbind(-2)
            turned = torch.cat([-second, first], dim=-1)
        else:
            first, second = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
            turned = torch.stack([-second, first], dim=-1).flatten(3)
        return (x.float() * cos + turned.float() * sin).to(x.dtype)
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * tables.unsqueeze(2)).flatten(3).type_as(x)


class Imports:
    def __call__(self, attention, x, tables):
        from tests.test_convert_processors import turn as turned_by

        q, k, v = attention.heads(x)
        return TF.scaled_dot_product_attention(
            turned_by(q, tables, dimension=1).transpose(1, 2),
            turned_by(k, tables, dimension=1).transpose(1, 2),
            v.transpose(1, 2),
        )


class Defines:
    def __call__(self, attention, x, tables):
        q, k, v = attention.heads(x)

        def turn(x, cos, sin):
            first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
            cos, sin = cos[..., 0::2].unsqueeze(1), sin[..., 1::2].unsqueeze(1)
            out = torch.empty_like(x)
            out[..., 0::2] = first * cos - second * sin
            out[..., 1::2] = first * sin + second * cos
            return out.type_as(x)

        q, k = turn(q, *tables), turn(k, *tables)
        return TF.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))


class OfComplex:
    def __call__(self, attention, x, tables):
        q, k, v = attention.heads(x)
        tables = torch.complex(*tables)[None, :, ::2]
        q, k = turn(q, tables, complex_tables=True), turn(k, tables, True)
        return TF.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    def __init__(self, processor: Any) -> None:
        super().__init__()
        self.products = nn.Linear(HEADS * COLUMNS, 3 * HEADS * COLUMNS)
        self.norm_q, self.norm_k = nn.RMSNorm(COLUMNS), nn.RMSNorm(COLUMNS)
        self.processor = processor

    def heads(self, x):
        q, k, v = (t.unflatten(-1, (HEADS, COLUMNS)) for t in self.products(x).chunk(3, -1))
        return self.norm_q(q), self.norm_k(k), v

    def forward(self, x, tables):
        return self.processor(self, x, tables)


def operands(dtype: torch.dtype = torch.float32) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    cos, sin = torch.randn(2, TOKENS, COLUMNS, device=DEVICE).unbind(0)
    return torch.randn(2, TOKENS, HEADS * COLUMNS, dtype=dtype, device=DEVICE), (cos, sin)


def step(model: nn.Module, x: Tensor, tables: Any) -> list[Tensor]:
    x = x.clone().requires_grad_()
    output = model(x, tables)
    loss = (output * torch.linspace(-1, 1, output.shape[-1], device=DEVICE)).sum()
    return [output, *torch.autograd.grad(loss, [x, *model.parameters()])]


def rotary_entries(report: Any) -> list[str]:
    return [entry.by for entry in report.replaced if "rotary" in entry.by]


@pytest.mark.parametrize("kind", [Imports, Defines])
def test_rotations_in_a_processor_are_fused(kind: type) -> None:
    model, twin = twins(lambda: Attention(kind()))
    processor = twin.processor
    assert rotary_entries(ckpt_kernels.convert(twin)) == ["2 x rotary"]
    given = operands()
    torch.testing.assert_close(step(twin, *given), step(model, *given), rtol=1e-4, atol=1e-4)
    assert twin.processor is processor and type(processor) is kind and not vars(processor)
    x, tables = given[0].clone().requires_grad_(), given[1]
    # The queries and keys before the rotation are not kept.
    before, after = (saved_bytes(module, x, tables, parameters_of=module) for module in (model, twin))
    assert before - after >= 2 * x.nbytes


def test_rotations_by_complex_tables_are_fused() -> None:
    model, twin = twins(lambda: Attention(OfComplex()))
    assert rotary_entries(ckpt_kernels.convert(twin)) == ["2 x rotary"]
    given = operands()
    torch.testing.assert_close(step(twin, *given), step(model, *given), rtol=1e-4, atol=1e-4)


def test_bfloat16_errors_are_at_most_eagers() -> None:
    for kind in (Imports, Defines, OfComplex):
        model, twin = twins(lambda kind=kind: Attention(kind()).bfloat16())
        ckpt_kernels.convert(twin)
        x, tables = operands(torch.bfloat16)
        found, expected = twin(x, tables), model(x, tables)
        truth = model.double()(x.double(), tuple(t.double() for t in tables))
        assert found.dtype == expected.dtype and found.stride() == expected.stride()
        assert (found - truth).abs().max() <= 1.5 * (expected - truth).abs().max() + 2**-8 * truth.abs().max()


class Turns:
    def __call__(self, attention, x, tables):
        return attention.heads(x)[0] * 2


def test_a_replaced_processor_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a replaced method of the processor's class."""
    model, twin = twins(lambda: Attention(Imports()))
    ckpt_kernels.convert(twin)
    given = operands()
    with monkeypatch.context() as patch:
        patch.setattr(Imports, "__call__", lambda self, attention, x, tables: x * 3)
        assert torch.equal(twin(*given), given[0] * 3)
    with monkeypatch.context() as patch:
        patch.setattr(Imports.__call__, "__code__", Turns.__call__.__code__)
        torch.testing.assert_close(twin(*given), model(*given))
    twin.processor = Turns()
    torch.testing.assert_close(twin(*given), model.heads(given[0])[0] * 2)
    twin.processor = len
    with pytest.raises(TypeError):
        twin(*given)


def test_compiled() -> None:
    model, twin = twins(lambda: Attention(Defines()))
    ckpt_kernels.convert(twin)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    given = operands()
    torch.testing.assert_close(step(compiled, *given)[0], step(model, *given)[0])


def heads() -> Tensor:
    return torch.randn(2, TOKENS, TOKENS, COLUMNS, device=DEVICE)


def test_only_tried_settings_are_fused() -> None:
    rotation = rotation_of(turn)
    assert rotation is not None
    pair = operands()[1]
    x = heads()
    for settings in ({}, {"dimension": 1}, {"halves": True}, {"halves": True, "dimension": 1}):
        found = rotation.of((x, pair), settings)
        assert found is not None
        torch.testing.assert_close(found, turn(x, pair, **settings))
    for bad in ({"dimension": 0}, {"halves": 1}, {"halves": 0.0}, {"dimension": None}, {"complex_tables": True}):
        assert rotation.of((x, pair), bad) is None
    table = torch.complex(*pair)[None, :, ::2]
    torch.testing.assert_close(rotation.of((x, table, True), {}), turn(x, table, True))
    assert rotation.of((x, table), {}) is None
    assert rotation.of((x, table.conj(), True), {}) is None
    assert rotation.of((x, table.real, True), {}) is None
    assert rotation.of((x, (*pair, pair[0])), {}) is None
    assert rotation.of((x, torch.stack(pair)), {}) is None


def decides_by_tables(x, tables):
    cos, sin = tables
    if cos is sin:
        return x
    return turn(x, (cos, sin))


def decides_by_a_sum(x, tables):
    if x.sum() == 0:
        return x
    return turn(x, tables)


def decides_by_another_value(x, tables, flag=False):
    flag = x.shape[0] > 64
    if flag:
        return x
    return turn(x, tables)


def decides_by_a_rest(x, tables, flag=False):
    _, *flag = tables
    if flag:
        return turn(x, tables)
    return x


def writes_to_heads(x, tables):
    x[..., ::2] = turn(x, tables)[..., ::2]
    return x


def writes_to_a_table(x, tables):
    cos, sin = tables
    sin[..., ::2] = cos[..., ::2]
    return turn(x, tables)


def leaves_some(x, tables):
    out = torch.empty_like(x)
    out[..., ::2] = turn(x, tables)[..., ::2]
    return out


def asserts(x, tables):
    assert x.shape[0] < 64
    return turn(x, tables)


def repeats(x, tables):
    while x is None:
        x = turn(x, tables)
    return turn(x, tables)


@pytest.mark.parametrize(
    "function",
    [decides_by_tables, decides_by_a_sum, decides_by_another_value, decides_by_a_rest, writes_to_heads,
     writes_to_a_table, leaves_some, asserts, repeats],
    ids=lambda function: function.__name__,
)  # fmt: skip
def test_other_functions_are_no_rotations(function: Any) -> None:
    assert rotation_of(function) is None


class ReadsAround:
    def __call__(self, attention, x, tables):
        q, k, v = attention.heads(x)
        scale = x.shape[0]

        def turn(x, cos, sin):
            return (x * cos.unsqueeze(1) + x * sin.unsqueeze(1)) * scale

        return turn(q, *tables)


class DefinesTwice:
    def __call__(self, attention, x, tables):
        q, k, v = attention.heads(x)

        def turned(x, tables):
            return turn(x, tables)

        if x.shape[0] > 1:

            def turned(x, tables):
                return x

        return turned(q, tables)


@pytest.mark.parametrize("kind", [ReadsAround, DefinesTwice, Turns])
def test_processors_without_a_rotation_are_left_alone(kind: type) -> None:
    model, twin = twins(lambda: Attention(kind()))
    assert not rotary_entries(ckpt_kernels.convert(twin))
    given = operands()
    torch.testing.assert_close(twin(*given), model(*given))


_installed = False


def is_installed():
    return _installed


class Norm(nn.Module):
    """A norm with a branch for a package that is not installed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(48))

    def forward(self, x):
        if is_installed() and self.weight is not None:
            import not_installed

            return not_installed.norm(x)[0]
        else:
            x = x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + 1e-6)
            return x * self.weight


def test_a_norm_with_a_branch_for_another_package(monkeypatch: pytest.MonkeyPatch) -> None:
    model, twin = twins(lambda: nn.Sequential(Norm()))
    assert [entry.by for entry in ckpt_kernels.convert(twin).replaced][-1].startswith("rms_norm")
    x = torch.randn(4, 48, device=DEVICE)
    torch.testing.assert_close(twin(x), model(x))
    monkeypatch.setitem(globals(), "_installed", True)
    with pytest.raises(ImportError):
        twin(x)
    other = nn.Sequential(Norm())
    assert not any(entry.by.startswith("rms_norm") for entry in ckpt_kernels.convert(other).replaced)

"""Rotary functions that rotate only some sizes or layouts, or that copy their tables: a call is fused only if nothing
distinguishes the results."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ckpt_kernels.convert.rotations.recognition import rotation_of

from .conftest import DEVICE
from .test_convert_rotations import half_tables, in_float32, one, rotate_half

HEADS, TOKENS, COLUMNS = 4, 6, 8


def tables_first(q, k, cos, sin):
    return cos * q + sin * rotate_half(q), cos * k + sin * rotate_half(k)


def heads_first(q, k, cos, sin):
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def by_tokens(x, cos, sin):
    x = x.transpose(1, 2)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return (x * cos + rotate_half(x) * sin).transpose(1, 2)


def viewed_by_heads(q, k, cos, sin):
    cos, sin = cos.view(q.shape[0], 1, q.shape[2], -1), sin.view(q.shape[0], 1, q.shape[2], -1)
    return heads_first(q, k, cos, sin)


def viewed_by_tokens(q, k, cos, sin):
    cos, sin = cos.view(q.shape[1], 1, -1), sin.view(q.shape[1], 1, -1)
    return heads_first(q, k, cos, sin)


def turned_in_four(x):
    a, b, c, d = x.chunk(4, -1)
    return torch.cat((-c, -d, a, b), -1)


def in_four(q, k, cos, sin):
    return q * cos + turned_in_four(q) * sin, k * cos + turned_in_four(k) * sin


def viewed_as_four(x, cos, sin):
    a, b, c, d = x.view(*x.shape[:-1], 4, -1).unbind(-2)
    return x * cos + torch.cat((-c, -d, a, b), -1) * sin


def half_at_most(x, cos, sin):
    half, size = x.shape[-1] // 2, cos.shape[-1]
    part, rest = x[..., :half], x[..., half:]
    turned, stays = part[..., :size], part[..., size:]
    return torch.cat((turned * cos[..., :half] + rotate_half(turned) * sin[..., :half], stays, rest), -1)


def half(x):
    return x[..., : x.shape[-1] // 2]


def twice_the_first(x):
    first = half(half(half(half(half(half(x))))))
    return torch.cat((first * 2, x[..., first.shape[-1] :]), -1)


def many_columns(x, cos, sin):
    """Differs from a rotation from 64 columns on."""
    return twice_the_first(x * cos + rotate_half(x) * sin)


def many_tokens(x, cos, sin):
    """Differs from a rotation from 64 tokens on."""
    across = (x * cos + rotate_half(x) * sin).transpose(-1, -2)
    return torch.cat((twice_the_first(across).transpose(-1, -2),), -1)


def two_of_all(x, cos, sin):
    """Rotates only a batch of two."""
    a, b = x.chunk(2, 0)
    return torch.stack((a * cos + rotate_half(a) * sin, b * cos + rotate_half(b) * sin), 0).flatten(0, 1)


@pytest.mark.parametrize(
    "function",
    [in_four, viewed_as_four, half_at_most, many_columns, many_tokens, two_of_all],
    ids=lambda function: function.__name__,
)
def test_rotations_of_some_sizes_are_not_recognised(function: Callable[..., Any]) -> None:
    assert rotation_of(function) is None


def random_with_order(shape: tuple[int, ...], order: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers; `order` is the order of the dimensions in memory."""
    memory = torch.randn([shape[dim] for dim in order], dtype=dtype, device=DEVICE)
    return memory.permute([order.index(dim) for dim in range(len(shape))])


def both(function: Callable[..., Any], heads: Tensor, cos: Tensor, sin: Tensor) -> tuple[Any, Any]:
    """The results of the function, or None if it raises, and of the fused call, or None if the guard rejects it."""
    rotation = rotation_of(function)
    assert rotation is not None
    ((way, _),) = rotation.conventions.values()
    given = (*(heads,) * way.heads, cos, sin)
    given = tuple(given[way.places.index(place)] for place in range(len(given)))
    try:
        computed = function(*given)
    except RuntimeError:
        computed = None
    found = rotation.of(given, {})
    return (computed, found) if isinstance(found, tuple | None) else ((computed,), (found,))


def strides(tensor: Tensor) -> list[int]:
    """The strides of the dimensions with more than one entry."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


@pytest.mark.parametrize("function", [heads_first, tables_first], ids=lambda function: function.__name__)
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("lead", [(TOKENS,), (2, 1, TOKENS), (1, 1, TOKENS), (2, HEADS, TOKENS)], ids=str)
def test_results_have_the_functions_strides(function: Callable[..., Any], samples: int, lead: tuple[int, ...]) -> None:
    """For each memory layout of heads and tables, the fused call has the function's strides or is not made."""
    lead = lead if len(lead) == 1 else (min(lead[0], samples), *lead[1:])
    fused_calls = 0
    for order in itertools.permutations(range(3)):
        heads = random_with_order((samples, HEADS, TOKENS, COLUMNS), (*order, 3))
        contiguous = torch.randn(2, *lead, COLUMNS, device=DEVICE)
        across = torch.randn(2, *lead[:-1], COLUMNS, TOKENS, device=DEVICE).transpose(-1, -2)
        expanded = torch.randn(2, *(1,) * len(lead), COLUMNS, device=DEVICE).expand(2, *lead, COLUMNS)
        for tables in (contiguous, across, expanded):
            expected, found = both(function, heads, *tables)
            if found is not None:
                fused_calls += 1
                assert list(map(strides, found)) == list(map(strides, expected))
                torch.testing.assert_close(found, expected)
    # Tables that come first in a product decide the strides of the result, unless they are contiguous tables of one
    # sample.
    assert fused_calls == 18 if function is heads_first else fused_calls <= 6


def test_expanded_heads_are_left_to_the_function() -> None:
    heads = torch.randn(2, TOKENS, 1, COLUMNS, device=DEVICE).expand(2, TOKENS, HEADS, COLUMNS)
    assert both(by_tokens, heads, *torch.randn(2, 2, TOKENS, COLUMNS, device=DEVICE))[1] is None
    assert both(by_tokens, heads.clone(), *torch.randn(2, 2, TOKENS, COLUMNS, device=DEVICE))[1] is not None


@pytest.mark.parametrize("function", [viewed_by_heads, viewed_by_tokens], ids=lambda function: function.__name__)
def test_tables_that_are_viewed_by_heads(function: Callable[..., Any]) -> None:
    """With tables of one sample and heads of two, the view gives other numbers or an error, so no call is fused."""
    heads = torch.randn(2, TOKENS, TOKENS, COLUMNS, device=DEVICE)
    lead = (2, TOKENS) if function is viewed_by_heads else (TOKENS,)
    expected, found = both(function, heads, *torch.randn(2, *lead, COLUMNS, device=DEVICE))
    torch.testing.assert_close(found, expected)
    for columns in (COLUMNS, 4):
        tables = torch.randn(2, *(1, *lead[1:]), columns, device=DEVICE)
        assert both(function, heads[..., :columns].contiguous(), *tables)[1] is None


def doubled(q, k, cos, sin):
    cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    return heads_first(q, k, cos, sin)


def cast(q, k, cos, sin):
    return heads_first(q, k, cos.to(q.dtype), sin.to(q.dtype))


def weighted(results: tuple[Tensor, ...]) -> Any:
    return sum((r.double() * torch.arange(COLUMNS, device=DEVICE)).sum() for r in results)


B16, F32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("function", "entries", "dtype", "table", "copies"),
    [
        (doubled, COLUMNS // 2, F32, F32, True),
        (cast, COLUMNS, B16, F32, True),
        (cast, COLUMNS, F32, F32, False),
        (heads_first, COLUMNS, B16, F32, False),
        (in_float32, COLUMNS, B16, B16, True),
        (in_float32, COLUMNS, B16, F32, False),
        (one, COLUMNS // 2, F32, F32, True),
        (half_tables, COLUMNS // 2, F32, F32, False),
    ],
)  # fmt: skip
def test_writes_to_tables_before_the_backward_pass(
    function: Callable[..., Any], entries: int, dtype: torch.dtype, table: torch.dtype, copies: bool
) -> None:
    """If eager torch keeps copies of the tables, a write is allowed; else the error is the same."""
    shape = (2, TOKENS, HEADS, COLUMNS) if function is one else (2, HEADS, TOKENS, COLUMNS)
    heads = torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()
    lead = (TOKENS,) if function in (doubled, cast, heads_first) else (2, TOKENS)
    tables = torch.randn(2, *lead, entries, device=DEVICE).to(table)
    wide = heads.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(weighted(both(function, wide, *tables.double())[0]), wide)
    grads = []
    for place in (0, 1):
        cos, sin = tables.clone()
        results = both(function, heads, cos, sin)[place]
        assert results is not None
        for tensor in (cos, sin):
            tensor.mul_(0.5)
        loss = weighted(results)
        if copies:
            grads += torch.autograd.grad(loss, heads)
        else:
            with pytest.raises(RuntimeError, match="modified by an in"):
                torch.autograd.grad(loss, heads)
    if copies:
        theirs, ours = [(g - truth).abs().max() for g in grads]
        assert ours <= 1.5 * theirs + 4 * torch.finfo(dtype).eps * truth.abs().max()


@pytest.mark.parametrize("dtype", (B16, torch.float16))
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_float32_tables_widen_the_results(dtype: torch.dtype, order: tuple[int, ...]) -> None:
    heads = random_with_order((2, HEADS, TOKENS, COLUMNS), (*order, 3)).to(dtype).requires_grad_()
    tables = torch.randn(2, TOKENS, COLUMNS, device=DEVICE)
    expected, found = both(heads_first, heads, *tables)
    wide = heads.detach().double().requires_grad_()
    truth = both(heads_first, wide, *tables.double())[0]
    for e, f, t in zip(expected, found, truth, strict=True):
        assert f.dtype == e.dtype == F32 and strides(f) == strides(e)
        assert (f - t).abs().max() <= 1.5 * (e - t).abs().max() + torch.finfo(F32).eps * t.abs().max()
    theirs, ours, exact = (
        torch.autograd.grad(weighted(r), h)[0] for r, h in ((expected, heads), (found, heads), (truth, wide))
    )
    assert ours.dtype == dtype and strides(ours) == strides(theirs)
    bound = 1.5 * (theirs - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
    assert (ours - exact).abs().max() <= bound


def of_complex(x, tables):
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * tables.unsqueeze(2)).flatten(3).type_as(x)


def of_copied_complex(x, tables):
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.cat((tables,), -1).unsqueeze(2)).flatten(3).type_as(x)


def of_complex_after_tables(x, tables):
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(tables.unsqueeze(2) * pairs).flatten(3).type_as(x)


def complex_tables(samples: int = 2) -> list[Tensor]:
    """Complex tables that are contiguous, transposed, and expanded."""
    contiguous, across, sample = (
        torch.randn(shape, dtype=torch.complex64, device=DEVICE)
        for shape in ((samples, TOKENS, COLUMNS // 2), (samples, COLUMNS // 2, TOKENS), (1, 1, COLUMNS // 2))
    )
    return [contiguous, across.transpose(-1, -2), sample.expand(samples, TOKENS, -1)]


@pytest.mark.parametrize(
    "function", [of_complex, of_copied_complex, of_complex_after_tables], ids=lambda function: function.__name__
)
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_complex_tables_give_the_functions_strides(function: Callable[..., Any], order: tuple[int, ...]) -> None:
    rotation = rotation_of(function)
    assert rotation is not None
    heads = random_with_order((2, TOKENS, HEADS, COLUMNS), (*order, 3))
    for table in (*complex_tables(), *complex_tables(1)):
        found, expected = rotation.of((heads, table), {}), function(heads, table)
        is_left = function is of_complex_after_tables and not (len(table) == 1 and table.is_contiguous())
        assert found is not None or is_left
        if found is not None:
            assert strides(found) == strides(expected)
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("place", range(3), ids=("contiguous", "across", "expanded"))
def test_writes_to_complex_tables_before_the_backward_pass(place: int) -> None:
    heads = torch.randn(2, TOKENS, HEADS, COLUMNS, device=DEVICE, requires_grad=True)
    table = complex_tables()[place]
    kept, copied = rotation_of(of_complex), rotation_of(of_copied_complex)
    assert kept is not None and copied is not None
    (expected,) = torch.autograd.grad(weighted((of_complex(heads, table),)), heads)
    losses = [weighted((rotation.of((heads, table), {}),)) for rotation in (kept, copied)]
    (table if place < 2 else table[:1, :1]).mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an in"):
        torch.autograd.grad(losses[0], heads)
    torch.testing.assert_close(torch.autograd.grad(losses[1], heads)[0], expected)

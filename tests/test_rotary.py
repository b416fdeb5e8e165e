"""Rotary embeddings: layouts of pairs, partial rotations, tables of any shape and dtype, and the norm before."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ckpt_kernels import functional as F

from .conftest import DEVICE, DTYPES, interprets

LAYOUTS = ("halves", "interleaved")
Operands = dict[str, Tensor]


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def operands(
    lead: tuple[int, ...], columns: int, table: tuple[int, ...], dtype: torch.dtype = torch.float32, norm: bool = False
) -> Operands:
    given = {"input": drawn(*lead, columns, dtype=dtype)}
    given |= {"cos": drawn(*table, seed=1), "sin": drawn(*table, seed=2)}
    return given | ({"weight": drawn(columns, seed=3), "bias": drawn(columns, seed=4)} if norm else {})


def pairs_by_element(columns: int, start: int, turned: int, layout: str) -> list[tuple[int, int]]:
    """The two columns of each pair."""
    if layout == "halves":
        return [(start + k, start + turned // 2 + k) for k in range(turned // 2)]
    return [(start + 2 * k, start + 2 * k + 1) for k in range(turned // 2)]


def truth(given: Operands, **options: Any) -> Tensor:
    """An independent implementation in float64, pair by pair."""
    x, cos, sin = (given[name].double() for name in ("input", "cos", "sin"))
    columns, turned = x.shape[-1], options.get("rotary_dim", cos.shape[-1])
    start, layout = options.get("rotary_start", 0), options.get("layout", "halves")
    output_layout = options.get("output_layout", layout)
    if options.get("norm"):
        x = x - x.mean(-1, keepdim=True) if options["norm"] == "layer" else x
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + options["eps"])
        if "weight" in given:
            x = x * (given["weight"].double() + options.get("weight_offset", 0.0))
        x = x + given["bias"].double() if "bias" in given else x
    sources = pairs_by_element(columns, start, turned, layout)
    targets = pairs_by_element(columns, start, turned, output_layout)
    result = [x[..., column] for column in range(columns)]
    for k, ((i, j), (first, second)) in enumerate(zip(sources, targets, strict=True)):
        entries = (k, k) if cos.shape[-1] != turned else (first - start, second - start)
        (cos1, cos2), (sin1, sin2) = ([table[..., entry] for entry in entries] for table in (cos, sin))
        result[first] = x[..., i] * cos1 - x[..., j] * sin1
        result[second] = x[..., j] * cos2 + x[..., i] * sin2
    return torch.stack(result, -1)


def gradients(output: Tensor, given: Operands) -> list[Tensor]:
    incoming = drawn(*output.shape, dtype=torch.bfloat16, seed=9).to(output.dtype)
    sources = [t for t in given.values() if t.requires_grad]
    return [output.detach(), *torch.autograd.grad(output, sources, incoming)]


def check(given: Operands, tables: bool = False, **options: Any) -> None:
    """Compares output and gradients with the truth. The error is at most one rounding in their dtype and some roundings
    in the dtype of the computation, relative to the largest value."""
    leaves = {name: t.detach().requires_grad_(tables or name not in ("cos", "sin")) for name, t in given.items()}
    found = gradients(F.rotary(**leaves, **options), leaves)
    wide = {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in leaves.items()}
    expected = gradients(truth(wide, **options), wide)
    computed = torch.finfo(torch.float64 if given["input"].dtype == torch.float64 else torch.float32).eps
    for ours, theirs in zip(found, expected, strict=True):
        bound = (torch.finfo(ours.dtype).eps + 64 * computed) * theirs.abs().amax() if theirs.numel() else 0
        if DEVICE == "cuda" and given["input"].shape[-1] == 1:
            # The input's gradient is 0 by a difference of equal terms, of which kernels that fuse multiplication and
            # subtraction leave a rounding.
            bound = bound + 64 * computed
        assert ours.shape == theirs.shape and ((ours.double() - theirs).abs() <= bound).all(), options


# Columns of a head, rotated columns, and the first of these: whole vectors, parts of vectors, and a single pair.
PARTS = {
    "all of 128": (128, 128, 0),
    "all of 96": (96, 96, 0),
    "the first 64 of 80": (80, 64, 0),
    "the last 64 of 192": (192, 64, 128),
    "22 of 41 from the 7th": (41, 22, 6),
    "the only two": (2, 2, 0),
    "none of three": (3, 0, 1),
}


@pytest.mark.parametrize("norm", [None, "rms", "layer"])
@pytest.mark.parametrize("part", PARTS)
def test_every_layout_and_part(part: str, norm: str | None, backend: str) -> None:
    columns, turned, start = PARTS[part]
    if interprets(backend) and columns > 100:
        pytest.skip("the others are enough where kernels are interpreted")
    options = {"rotary_dim": turned, "rotary_start": start, "norm": norm} | ({"eps": 0.1} if norm else {})
    for layout in LAYOUTS:
        for output_layout in LAYOUTS:
            for entries in {turned, turned // 2}:
                given = operands((2, 3), columns, (3, entries), norm=norm is not None)
                check(given, layout=layout, output_layout=output_layout, **options)


@pytest.mark.parametrize("table_dtype", DTYPES, ids=str)
def test_tables_of_another_dtype(table_dtype: torch.dtype, served: tuple[str, torch.dtype]) -> None:
    for layout in LAYOUTS:
        for entries in (24, 12):
            given = operands((2, 5), 30, (5, entries), served[1])
            given |= {name: given[name].to(table_dtype) for name in ("cos", "sin")}
            check(given, layout=layout, rotary_dim=24, rotary_start=2)


def test_tables_of_two_dtypes(backend: str) -> None:
    given = operands((2, 5), 32, (5, 16), torch.bfloat16)
    check(given | {"cos": given["cos"].double(), "sin": given["sin"].half()}, rotary_dim=32)


# Shapes of tables for heads of (2, 3, 4, 5, *): one entry for all, for each position, each sample, each row.
SHAPES = [(), (5,), (4, 1), (3, 1, 5), (1, 4, 5), (2, 1, 1, 1), (1, 1, 4, 1), (2, 3, 4, 5)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tables_are_broadcast(shape: tuple[int, ...], backend: str) -> None:
    given = operands((2, 3, 4, 5), 16, (*shape, 16))
    check(given)
    check(given | {name: given[name].bfloat16() for name in ("cos", "sin")})
    few = {"input": given["input"][0] if len(shape) < 4 else given["input"][0, :, None, 0]}
    if len(shape) < 4:
        check(given | few)
    # Heads in other memory layouts: kernels read rows in the order in memory, and tables accordingly.
    x = given["input"]
    for dims in ((3, 2, 1, 0), (1, 0, 3, 2), (0, 2, 3, 1)):
        order = sorted(range(4), key=dims.__getitem__)
        check(given | {"input": x.permute(*dims, 4).contiguous().permute(*order, 4)})


def test_expanded_and_strided_tables(backend: str) -> None:
    given = operands((2, 3, 4), 16, (4, 16), torch.bfloat16)
    expected = F.rotary(**given)
    wide = {name: torch.cat([given[name], given[name]], -1)[:, :16] for name in ("cos", "sin")}
    every_second = {name: torch.stack([given[name], given[name]], -1)[..., 0] for name in ("cos", "sin")}
    expanded = {name: given[name].expand(2, 3, 4, 16) for name in ("cos", "sin")}
    for tables in (wide, every_second, expanded, wide | {"sin": expanded["sin"]}):
        assert torch.equal(F.rotary(**given | tables), expected)


def test_tables_at_any_address(backend: str) -> None:
    """Wide accesses need aligned addresses and rows of tables, and aligned entries of the pairs' second elements."""
    given = operands((2, 3, 4), 32, (4, 32))
    expected = F.rotary(**given)
    for before, after in ((1, 3), (4, 1), (4, 4)):
        padded = {name: torch.nn.functional.pad(given[name], (before, after)) for name in ("cos", "sin")}
        assert torch.equal(F.rotary(**given | {name: t[:, before:-after] for name, t in padded.items()}), expected)
    check(operands((2, 3, 4), 32, (4, 24)), rotary_start=4)


@pytest.mark.parametrize("norm", [None, "rms"])
def test_heads_of_a_packed_projection(norm: str | None, backend: str) -> None:
    """Queries and keys are read without a copy, and the projection gets their gradients."""
    cos, sin = drawn(5, 8, seed=1), drawn(5, 8, seed=2)
    weight = drawn(16, seed=3) if norm else None

    def run(packed: Tensor) -> list[Tensor]:
        q, k, v = packed.view(2, 5, 3, 4, 16).transpose(1, 3).unbind(2)
        q, k = F.rotary_qk(q, k, cos, sin, weight, weight, rotary_dim=16, norm=norm)
        return [q, k, *torch.autograd.grad((q * k).sum() + v.sum(), packed)]

    def expected(packed: Tensor) -> list[Tensor]:
        q, k, v = packed.view(2, 5, 3, 4, 16).transpose(1, 3).unbind(2)
        if norm:
            q, k = (torch.nn.functional.rms_norm(t, (16,), weight) for t in (q, k))
        (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
        q, k = (torch.cat((a * cos - b * sin, b * cos + a * sin), -1) for a, b in ((q1, q2), (k1, k2)))
        return [q, k, *torch.autograd.grad((q * k).sum() + v.sum(), packed)]

    packed = drawn(2, 5, 3 * 4 * 16).requires_grad_()
    for ours, theirs in zip(run(packed), expected(packed), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("given", [("weight",), ("bias",), ("weight", "bias"), ()], ids=str)
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_norms_with_optional_weight_and_bias(norm: str, given: tuple[str, ...], backend: str) -> None:
    """With a weight, a bias, both, or neither, and with a weight offset."""
    every = operands((3, 7), 48, (7, 24), norm=True)
    some = {name: t for name, t in every.items() if name not in ("weight", "bias") or name in given}
    for layout in LAYOUTS:
        check(some, norm=norm, eps=1e-3, weight_offset=1.0, layout=layout, rotary_dim=48)


def test_weights_of_another_dtype(backend: str) -> None:
    given = operands((3, 7), 48, (7, 24), torch.bfloat16, norm=True)
    check(given, norm="rms", eps=1e-3, rotary_dim=48)
    check(
        given | {"weight": given["weight"].half(), "bias": given["bias"].bfloat16()},
        norm="layer",
        eps=1e-3,
        rotary_dim=48,
    )


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_rounded_before_the_weight(norm: str, backend: str) -> None:
    """Bit for bit: with angles of 0 the result is the norm."""
    given = operands((4, 9), 32, (9, 16), torch.bfloat16)
    cos, sin = torch.ones_like(given["cos"]), torch.zeros_like(given["sin"])
    x = given["input"].requires_grad_()
    weight = torch.linspace(1, 2, 32, device=DEVICE).requires_grad_()
    options = {"norm": norm, "eps": 1e-6, "rotary_dim": 32}
    y = F.rotary(x, cos, sin, weight, cast_before_weight=True, **options)
    wide = x.detach().double()
    wide = wide - wide.mean(-1, keepdim=True) if norm == "layer" else wide
    x_hat = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).bfloat16()
    expected = (x_hat.float() * weight).bfloat16()
    # Triton's interpreter truncates twice, where hardware rounds.
    digits = 2 if interprets(backend) else 0
    assert (y - expected).abs().max() <= digits * 2**-7 * expected.abs().max()
    (found,) = torch.autograd.grad(y.sum(), weight)
    if not interprets(backend):
        torch.testing.assert_close(found, x_hat.double().sum((0, 1)).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("columns", [1, 2, 1030])
def test_short_and_long_heads(columns: int, backend: str) -> None:
    if interprets(backend) and columns > 100:
        pytest.skip("slow where kernels are interpreted")
    turned = columns // 4 * 2
    for norm in (None, "layer"):
        given = operands((2, 3), columns, (3, turned), norm=norm is not None)
        check(given, norm=norm, rotary_start=columns // 3, **({"eps": 0.1} if norm else {}))


def test_gradients_of_tables(backend: str) -> None:
    for layout in LAYOUTS:
        for entries in (16, 8):
            given = operands((2, 3, 4), 20, (3, 1, entries))
            check(given, tables=True, layout=layout, output_layout="halves", rotary_dim=16, rotary_start=2)
    check(operands((2, 3, 4), 20, (4, 20), norm=True), tables=True, norm="rms", eps=0.1)


def test_sums_over_many_rows(backend: str) -> None:
    """More rows than one task or thread processes, and no multiple."""
    if interprets(backend):
        pytest.skip("slow where kernels are interpreted")
    check(operands((3, 131), 24, (131, 12), norm=True), norm="layer", eps=0.1, rotary_dim=24)


@pytest.mark.skipif(DEVICE != "cpu", reason="the test is of the CPU's threads")
@pytest.mark.parametrize("norm", [None, "rms", "layer"])
def test_the_same_bits_on_any_number_of_threads(norm: str | None) -> None:
    given = operands((4, 9, 301), 64, (301, 64), torch.bfloat16, norm=norm is not None)
    given = {name: t.requires_grad_(name not in ("cos", "sin")) for name, t in given.items()}
    given |= {name: given[name].bfloat16() for name in ("cos", "sin")}
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            found.append(gradients(F.rotary(**given, norm=norm, layout="interleaved"), given))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_the_opposite_rotation_restores_the_heads(backend: str) -> None:
    """Rotations keep the norms of heads."""
    angles = torch.outer(torch.arange(6.0), torch.linspace(0.1, 1, 8)).to(DEVICE)
    x = drawn(2, 3, 6, 16)
    for layout in LAYOUTS:
        there = F.rotary(x, angles.cos(), angles.sin(), rotary_dim=16, layout=layout)
        back = F.rotary(there, angles.cos(), -angles.sin(), rotary_dim=16, layout=layout)
        torch.testing.assert_close(back, x)
        torch.testing.assert_close(there.norm(dim=-1), x.norm(dim=-1))


def test_a_compiler_may_not_know_sizes() -> None:
    """Tables of half the columns, for which the two sizes are compared."""
    input, cos, sin = (torch.randn(shape, device=DEVICE) for shape in ((2, 4, 6), (4, 3), (4, 3)))

    def call(input: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return F.rotary(input, cos, sin, rotary_dim=6)

    compiled = torch.compile(call, backend="eager", dynamic=True, fullgraph=True)
    torch.testing.assert_close(compiled(input, cos, sin), call(input, cos, sin))

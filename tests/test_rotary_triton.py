"""Triton's rotary kernels, compared with the reference: layouts, partial rotations, tables of both widths, norms."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ckpt_kernels import functional as F
from ckpt_kernels import use_backend
from ckpt_kernels.backends.triton import launch

from .conftest import DEVICE, unserved

pytestmark = pytest.mark.skipif(unserved("triton", torch.float32) is not None, reason="Triton does not serve here")

PLAIN: dict[str, Any] = {}
RMS = {"norm": "rms", "weight_offset": 1.0, "cast_before_weight": True}
LAYER = {"norm": "layer", "eps": 0.1}


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def results(backend: str, grad_output: Tensor, operands: list[Tensor], tables: list[Tensor], **options: Any) -> list:
    leaves = [operand.detach().requires_grad_() for operand in operands]
    with use_backend(backend):
        output = F.rotary(leaves[0], *tables, *leaves[1:], **options)
        return [output, *torch.autograd.grad(output, leaves, grad_output)]


def check(heads: tuple[int, ...], table: tuple[int, ...], dtype: torch.dtype = torch.float32, **options: Any) -> None:
    """Compares the backends for random tables, in which the two entries of a pair differ."""
    operands = [randn(*heads, seed=0, dtype=dtype)]
    if options.get("norm") is not None:
        operands += [randn(heads[-1], seed=seed) for seed in (1, 2)]
    tables = [randn(*table, seed=seed) for seed in (3, 4)]
    grad_output = randn(*heads, seed=5, dtype=dtype)
    found, expected = (results(b, grad_output, operands, tables, **options) for b in ("triton", "reference"))
    # The interpreter truncates to bfloat16 where hardware rounds.
    tolerance = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for ours, theirs in zip(found, expected, strict=True):
        # With one column the input's gradient is a difference of equal terms, of which a GPU leaves a rounding.
        scale = max(theirs.abs().max().item(), float(DEVICE == "cuda" and heads[-1] == 1))
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("norm", [PLAIN, RMS, LAYER], ids=["plain", "rms", "layer"])
@pytest.mark.parametrize("entries", [8, 4])
@pytest.mark.parametrize("output_layout", ["halves", "interleaved"])
@pytest.mark.parametrize("layout", ["halves", "interleaved"])
def test_every_layout(layout: str, output_layout: str, entries: int, norm: dict[str, Any]) -> None:
    check((1, 5, 3, 8), (5, 1, entries), layout=layout, output_layout=output_layout, rotary_dim=8, **norm)


@pytest.mark.parametrize("norm", [PLAIN, RMS, LAYER], ids=["plain", "rms", "layer"])
@pytest.mark.parametrize("layout", ["halves", "interleaved"])
@pytest.mark.parametrize(
    ("columns", "turning", "start"), [(24, 8, 0), (24, 8, 16), (13, 6, 3), (5, 0, 2), (1, 0, 0)], ids=str
)
def test_heads_that_turn_in_part(columns: int, turning: int, start: int, layout: str, norm: dict[str, Any]) -> None:
    check((2, 3, columns), (3, turning), layout=layout, rotary_start=start, **norm)


@pytest.mark.parametrize("norm", [PLAIN, LAYER], ids=["plain", "layer"])
@pytest.mark.parametrize("table", [(2, 1, 5, 1), (1, 3, 1, 1), (2, 3, 5, 7), (1, 1, 1, 1), (7,), (5, 1)], ids=str)
def test_tables_with_expanded_dimensions(table: tuple[int, ...], norm: dict[str, Any]) -> None:
    check((2, 3, 5, 7, 4), (*table, 4), **norm)


@pytest.mark.parametrize("norm", [RMS, LAYER], ids=["rms", "layer"])
def test_heads_that_several_programs_share(norm: dict[str, Any]) -> None:
    """More heads than fill the tiles of the interpreter's processors, and no multiple of a tile."""
    check((3, 101, 64), (101, 64), **norm)


@pytest.mark.parametrize("norm", [PLAIN, RMS], ids=["plain", "rms"])
def test_heads_that_fill_their_tiles_in_bfloat16(norm: dict[str, Any]) -> None:
    check((8, 8, 64), (8, 64), torch.bfloat16, **norm)


def test_longer_heads_than_a_program_holds() -> None:
    check((2, 16386), (2, 16386), layout="interleaved", **RMS)


@pytest.mark.parametrize("sums", [False, True])
def test_every_tile_has_numbers_of_rows_and_warps_that_triton_takes(sums: bool) -> None:
    """Powers of two. The interpreter takes others."""
    for rotated in range(2, 300, 2):
        for passing in range(0, 300, 3):
            tile = launch.heads_tile(rotated, passing, sums)
            assert all(number.bit_count() == 1 for number in (tile.rows, tile.block, tile.warps)), (rotated, passing)


def test_a_warp_has_512_elements_at_least() -> None:
    elements = (1, 2048, 4095, 4096, 10000, 16384, 100000)
    assert [launch._warps(count) for count in elements] == [4, 4, 4, 8, 16, 32, 32]

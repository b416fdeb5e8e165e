"""Memory accesses of the CUDA kernels in their host build, in which a misaligned access is an error."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ckpt_kernels import functional
from ckpt_kernels.catalogue.block import Block

from .blocks import by_block
from .conftest import DEVICE, serving

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the kernels are on the GPU itself")


def _part(tensor: Tensor, begin: int, rest: int) -> Tensor:
    """The same values, as the columns from `begin` of a matrix that has `rest` more columns."""
    wide = tensor.new_zeros((*tensor.shape[:-1], tensor.shape[-1] + rest))
    part = wide[..., begin : begin + tensor.shape[-1]]
    part.copy_(tensor)
    return part


# Accesses of 16 bytes need rows that begin at multiples of 16 bytes, with strides of multiples of 16 bytes.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "aligned": lambda t: _part(t, 8, 16),
    "beginning one element later": lambda t: _part(t, 9, 16),
    "one element further apart": lambda t: _part(t, 0, 1),
    "a dense tensor that begins one element later": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@by_block
def test_wide_accesses_are_aligned_for_any_misaligned_operand(block: Block, layout: str, dtype: torch.dtype) -> None:
    operands = block.operands((2, 3), 24, dtype, DEVICE)
    for odd in (*block.rows, "grad_output"):
        found, expected = (_results(block, operands, odd, layout, name) for name in ("cuda_on_host", "reference"))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=4 * torch.finfo(dtype).eps, atol=16 * torch.finfo(dtype).eps)


def _results(block: Block, operands: dict[str, Tensor], odd: str, layout: str, backend: str) -> list[Tensor]:
    lay = LAYOUTS[layout]
    given = {name: (lay(t.detach()) if name == odd else t.detach()).requires_grad_() for name, t in operands.items()}
    with serving(backend):
        outputs = block.call(**given)
        incoming = [torch.ones_like(y) for y in outputs]
        if odd == "grad_output":
            incoming = [lay(g) for g in incoming]
        return [*outputs, *torch.autograd.grad(outputs, list(given.values()), incoming)]


# Strides of rows in three dimensions: one is no multiple of 16 bytes, or all are.
@pytest.mark.parametrize("strides", [(680, 168, 33, 1), (744, 185, 36, 1), (680, 168, 32, 1)], ids=str)
def test_wide_accesses_of_heads_are_aligned(strides: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, grad_output = (torch.randn(2 * strides[0], generator=generator).as_strided((2, 4, 5, 32), strides) for _ in "xg")

    def run(x: Tensor, grad_output: Tensor) -> tuple[Tensor, ...]:
        x, weight = x.detach().requires_grad_(), torch.linspace(0.5, 1.5, 32, requires_grad=True)
        y = functional.rms_norm(x, 32, weight, activation="silu")
        return y, *torch.autograd.grad(y, (x, weight), grad_output)

    with serving("cuda_on_host"):
        for given in ((x, grad_output.contiguous()), (x.contiguous(), grad_output)):
            for a, b in zip(run(*given), run(x.contiguous(), grad_output.contiguous()), strict=True):
                torch.testing.assert_close(a, b)


# Teams of eight threads, of several warps, and of a whole block of threads, with columns for all or a part of a team.
# More rows than a launch on the host has blocks.
HELD = [(23, 8), (37, 136), (70, 520), (19, 1032), (5, 4096), (3, 8184), (3, 8200), (3, 16384)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), HELD)
@pytest.mark.parametrize("frozen", [False, True])
def test_rows_held_in_registers(rows: int, columns: int, frozen: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, residual, g = (torch.randn(rows, columns, generator=generator) for _ in "xrg")
    given = [(x + 3).to(dtype), residual.to(dtype), x[0].clone(), residual[0].clone()]

    def run(backend: str) -> tuple[Tensor, ...]:
        tensors = [t.detach().requires_grad_(not frozen or t.dim() == 2) for t in given]
        with serving(backend):
            outputs = functional.add_layer_norm(*tensors[:2], columns, *tensors[2:], activation="silu")
            incoming = [g.to(dtype), g.flip(0).to(dtype)]
            wanted = [t for t in tensors if t.requires_grad]
            return *(t.detach() for t in outputs), *torch.autograd.grad(outputs, wanted, incoming)

    tolerance = 16 * torch.finfo(dtype).eps  # a row of eight columns may have a small variance
    for a, b in zip(run("cuda_on_host"), run("reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))

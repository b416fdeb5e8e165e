"""Large results, which are written with streaming stores past the caches if their rows are aligned."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ckpt_kernels import functional as F

from .conftest import DEVICE

# Results in float32 are larger than 16 MiB, from which on they are streamed.
ROWS = 4200
BLOCKS: dict[str, Callable[[Tensor], Tensor]] = {
    "rms_norm": lambda x: F.rms_norm(x, x.shape[1]),
    "add_rms_norm": lambda x: F.add_rms_norm(x, x.detach(), x.shape[1], activation="silu")[0],
    "bias_act": lambda x: F.bias_act(x, activation="silu"),
    "dyt": lambda x: F.dyt(x, x.new_full((1,), 0.7)),
    "rotary": lambda x: F.rotary(x, x.detach()[0, :512], x.detach()[1, :512]),
    "rotary from the second column": lambda x: F.rotary(x, x.detach()[0, :512], x.detach()[1, :512], rotary_start=1),
    "rotary (interleaved)": lambda x: F.rotary(x, x.detach()[0, :512], x.detach()[1, :512], layout="interleaved"),
    "glu": lambda x: F.glu(x, x.detach()),
    "batch_norm": lambda x: F.batch_norm(x, x.detach()[0], x.detach()[1].square(), activation="silu"),
}


@pytest.mark.parametrize("columns", [1001, 1024], ids=["rows at any address", "aligned rows"])
@pytest.mark.parametrize("block", BLOCKS)
def test_large_results_equal_those_of_few_rows(block: str, columns: int) -> None:
    """Bit for bit: the result of a row does not depend on the number of rows."""
    x = torch.randn(ROWS, columns, generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        y = BLOCKS[block](x)
        return y, torch.autograd.grad(y, x, x.detach())[0]

    # Both calls have the first rows, which are the statistics of the batch norm.
    some = torch.cat([torch.arange(40), torch.arange(ROWS - 7, ROWS)]).to(DEVICE)
    for whole, part in zip(run(x), run(x[some]), strict=True):
        assert torch.equal(whole[some], part)

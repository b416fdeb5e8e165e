"""Conditions of long runs: many calls, threads, worker processes, and non-finite values."""

import gc
import pathlib
import threading

import pytest
import torch
from torch import Tensor

from ckpt_kernels import functional, nn
from ckpt_kernels.catalogue.block import Block, Operands
from ckpt_kernels.catalogue.blocks import BLOCKS

from .blocks import by_block, with_gradients
from .conftest import DEVICE, interprets, where

SPECIAL = (float("nan"), float("inf"), -float("inf"), 1e-40, -1e-45, 3e38, -3e38, 0.0)


def resident_bytes() -> int:
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not pathlib.Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_ten_thousand_calls_hold_memory_flat() -> None:
    sets = [(block, block.operands((2, 4), 32, torch.float32, DEVICE)) for block in BLOCKS]

    def run(count: int) -> None:
        for index in range(count):
            block, operands = sets[index % len(sets)]
            outputs = block.call(**operands)
            sources = [operand for operand in operands.values() if operand.requires_grad]
            torch.autograd.grad([y.sum() for y in outputs], sources, allow_unused=True)

    run(2000)
    gc.collect()
    # The list of all objects is large, so it is made before memory is measured.
    tensors = sum(type(o) is Tensor for o in gc.get_objects())
    before = resident_bytes()
    run(10_000)
    gc.collect()
    # A leak of the smallest of these tensors at each call would be twenty times as much.
    assert resident_bytes() - before < 2**19
    assert sum(type(o) is Tensor for o in gc.get_objects()) <= tensors


def test_threads_calling_at_once() -> None:
    jobs = [(block, block.operands((4, 33), 65, torch.bfloat16, DEVICE, seed=i)) for i, block in enumerate(BLOCKS)]
    # Large enough for each thread to use the library's own threads.
    wide = BLOCKS[0].operands((8, 128), 1024, torch.float32, DEVICE)
    jobs.append((BLOCKS[0], wide))
    expected = [with_gradients(block.call, operands) for block, operands in jobs]
    wrong: list[str] = []

    def work(offset: int) -> None:
        for index in range(2 * len(jobs)):
            place = (index + offset) % len(jobs)
            block, operands = jobs[place]
            for name, value in with_gradients(block.call, operands).items():
                if not torch.equal(value, expected[place][name]):
                    wrong.append(f"{block.name}: {name}")

    threads = [threading.Thread(target=work, args=(5 * i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Normalized(torch.utils.data.Dataset):
    """A dataset whose items are gradients that the worker process computes."""

    def __init__(self) -> None:
        self.block = torch.nn.Sequential(nn.LayerNorm(64, activation="gelu"), nn.MLP(64, 128))

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        x = torch.full((4, 64), float(index)).cumsum(1).requires_grad_()
        (gradient,) = torch.autograd.grad(self.block(x).square().sum(), x)
        return gradient


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_blocks_run_in_worker_processes(start: str) -> None:
    torch.manual_seed(0)
    dataset = Normalized()
    # The parent process starts its threads before the fork.
    functional.layer_norm(torch.randn(512, 1024), 1024, activation="silu")
    expected = torch.stack([dataset[index] for index in range(len(dataset))])
    loader = torch.utils.data.DataLoader(dataset, 2, num_workers=2, multiprocessing_context=start, timeout=120)
    torch.testing.assert_close(torch.cat(list(loader)), expected, rtol=1e-5, atol=1e-5)


def stormy(operands: Operands, names: tuple[str, ...], rows: Tensor, seed: int) -> Operands:
    """The operands with a special value in about one of four elements in these rows."""
    generator = torch.Generator().manual_seed(seed)
    found = dict(operands)
    for name in names:
        value = operands[name].detach().clone()
        where = torch.rand(value.shape, generator=generator) < 0.25
        where &= rows.reshape(*rows.shape, *[1] * (value.dim() - rows.dim()))
        kinds = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), value.shape, generator=generator)]
        found[name] = torch.where(where.to(DEVICE), kinds.to(DEVICE).to(value.dtype), value).requires_grad_()
    return found


# One dtype is enough where kernels are interpreted.
@where(lambda storm_dtype, backend: not interprets(backend) or storm_dtype == torch.float32)
@by_block
@pytest.mark.parametrize("storm_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_storm_of_special_numbers_stays_in_its_rows(block: Block, storm_dtype: torch.dtype, backend: str) -> None:
    operands = block.operands((6, 8), 40, storm_dtype, DEVICE)
    if block.function == "batch_norm":
        # The statistics of a channel include all samples, so special values are in whole channels.
        rows = (torch.arange(8) % 3 == 1).expand(6, 8)
        calm = (slice(None), ~rows[0])
    else:
        rows = torch.arange(6) % 3 == 1
        calm = ~rows
    struck = stormy(operands, tuple(block.rows), rows, seed=7)
    before, after = with_gradients(block.call, operands), with_gradients(block.call, struck)
    for name in (*block.rows, "output"):
        for key in (f"grad {name}", f"{name} 0", f"{name} 1"):
            if key in before:
                assert torch.equal(before[key][calm], after[key][calm]), key
    # Rows with NaN have NaN in the output.
    lost = torch.stack([struck[name].isnan().any(-1) for name in block.rows]).any(0)
    assert lost.any() and block.call(**struck)[0].isnan().any(-1)[lost].all()

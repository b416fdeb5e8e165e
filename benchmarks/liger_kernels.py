"""Compiles the Triton kernels of Liger-Kernel with Liger's own launch settings, without a GPU.

Liger's functions run on tensors on torch's meta device, and launches are recorded in place of running. Liger counts one
multiprocessor on a device that it does not know, so a persistent grid has one program: one a multiprocessor, as on a
GPU.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

from ckpt_kernels.backends.triton.launch import Launch, Tile, processors
from ckpt_kernels.catalogue.blocks import BY_NAME
from ckpt_kernels.inspect import Usage
from ckpt_kernels.inspect.kernels import usage
from ckpt_kernels.inspect.variants import Variant

from .peers import PEERS


def liger_kernels(name: str, rows: int, columns: int, arch: str) -> dict[str, list[Usage]]:
    """The kernels of Liger for a block in bfloat16, compiled, by pass; empty if Liger does not have the block.

    Without the sums of partial weight gradients, which Liger leaves to torch.
    """
    call = PEERS["Liger"](name)
    if call is None:
        return {}
    operands = BY_NAME[name].empty_operands((1, rows), columns, torch.bfloat16, "meta")
    with recording() as forward:
        outputs = call(*operands.values())
    with recording() as backward:
        torch.autograd.grad(outputs, list(operands.values()), [torch.empty_like(output) for output in outputs])
    passes = {"forward": forward, "backward": backward}
    return {
        direction: [
            usage(Variant(f"{name} {direction}", one, rows * columns, columns), "bf16", columns, arch, work=True)
            for one in launched
        ]
        for direction, launched in passes.items()
    }


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Record the launches of Triton kernels within, in place of running them."""
    found: list[Launch] = []

    def run(kernel: Any, *given: Any, grid: tuple[int, ...], warmup: bool, **named: Any) -> None:
        found.append(recorded(kernel, grid, given, named))

    with mock.patch.object(JITFunction, "run", run):
        yield found


def recorded(kernel: Any, grid: tuple[int, ...], given: tuple[Any, ...], named: dict[str, Any]) -> Launch:
    """A launch in the terms of `ckpt_kernels.inspect`, with the tile that Liger's constants and options name.

    `inspect` divides the number of programs by the multiprocessors of the meta device, of which Liger counts one.
    """
    bound = kernel.signature.bind(*given, **{name: value for name, value in named.items() if name in kernel.arg_names})
    bound.apply_defaults()
    tile = Tile(bound.arguments.get("BLOCK_ROW", 1), bound.arguments["BLOCK_SIZE"], named["num_warps"], True)
    return Launch(kernel, tile, tuple(bound.arguments.values()), grid[0] * processors(torch.device("meta")))

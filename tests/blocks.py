"""Decorators that run a test for each block or pair of the catalogue, and outputs and gradients of a block by name."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from ckpt_kernels.catalogue.block import Operands
from ckpt_kernels.catalogue.blocks import BLOCKS
from ckpt_kernels.catalogue.linear import PAIRS

by_block = pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
by_pair = pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)


def with_gradients(
    fn: Callable[..., Sequence[Tensor]], operands: Operands, grad_seed: int = 1_000_003
) -> dict[str, Tensor | None]:
    """Outputs ("output 0", ...) and gradients ("grad input", ...) for random incoming gradients."""
    generator = torch.Generator().manual_seed(grad_seed)
    outputs = fn(**operands)
    incoming = [
        torch.randn(y.shape, generator=generator, dtype=torch.float64).bfloat16().to(y.dtype).to(y.device)
        for y in outputs
    ]
    names = [name for name, t in operands.items() if t.requires_grad]
    # The sum of an add norm has no gradient where only the norm's weights have one.
    differentiable, grads = zip(
        *((y, g) for y, g in zip(outputs, incoming, strict=True) if y.requires_grad), strict=True
    )
    found = torch.autograd.grad(differentiable, [operands[name] for name in names], grads, allow_unused=True)
    results = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    return results | {f"grad {name}": g for name, g in zip(names, found, strict=True)}


def in_float64(operands: Operands) -> Operands:
    return {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in operands.items()}

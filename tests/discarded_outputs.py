"""Helpers for the tests of discarded outputs of torch's own ops: models, kept bytes, and gradients to the bit."""

import contextlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor

from ckpt_kernels import functional as F
from ckpt_kernels import recompute

from .conftest import DEVICE

shows_saved = hasattr(torch._C._autograd.SavedTensor, "data")

ROWS, WIDTH = 64, 32
UNIT = ROWS * WIDTH * 4


def random_tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype).to(DEVICE)


@pytest.fixture(name="x")
def rows() -> Tensor:
    return random_tensor(ROWS, WIDTH, seed=1).requires_grad_()


@pytest.fixture(name="image")
def maps() -> Tensor:
    return random_tensor(2, 8, 8, 8, seed=2).requires_grad_()


class Parameters(dict):
    """Parameters, made on first access: matrices "a" to "z", vectors "bias...", convolution weights "conv..."."""

    def __missing__(self, name: str) -> torch.nn.Parameter:
        seed = sum(map(ord, name))
        if name.startswith("bias"):
            made = random_tensor(WIDTH, seed=seed)
        elif name.startswith("conv"):
            made = random_tensor(8, 8, 1, 1, seed=seed) / 3
        elif name.startswith("half"):
            made = random_tensor(WIDTH, WIDTH // 2, seed=seed) / 5
        else:
            made = random_tensor(WIDTH, WIDTH, seed=seed) / 6
        self[name] = torch.nn.Parameter(made)
        return self[name]


class Holder:
    """The object that an outer hook keeps, so that a test sees when the object is freed."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept_bytes(fn: Callable[[], Tensor]) -> int:
    """Bytes of the storages that the autograd graph of `fn()` keeps after the call, without parameters.

    Unlike `memory.saved_bytes` this does not count tensors that were saved and then released during the call.
    """
    holders: list[weakref.ref[Holder]] = []

    def pack(tensor: Tensor) -> Any:
        if isinstance(tensor, torch.nn.Parameter) or isinstance(tensor._base, torch.nn.Parameter):
            return tensor.detach()
        holder = Holder(tensor.detach())
        holders.append(weakref.ref(holder))
        return holder

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: getattr(held, "tensor", held)):
        result = fn()
    held = [holder.tensor.untyped_storage() for reference in holders if (holder := reference()) is not None]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in held}
    del result
    return sum(sizes.values())


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors are equal bit for bit; NaN equals NaN."""
    if a is None or b is None:
        return a is b
    return (
        a.dtype == b.dtype
        and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
        and (torch.equal(a.isnan(), b.isnan()))
    )


def assert_same_bits(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert same_bits(a, b)


def loss_of(y: Tensor | tuple[Tensor, ...]) -> Tensor:
    return sum(t.float().square().sum() for t in (y if isinstance(y, tuple) else (y,)))


def assert_unchanged(fn: Callable[[], Any], sources: Sequence[Tensor], **options: bool) -> None:
    """Asserts that gradients within the context are those without."""
    expected = torch.autograd.grad(loss_of(fn()), sources, allow_unused=True)
    with recompute.discard_outputs(**options):
        y = fn()
    assert_same_bits(torch.autograd.grad(loss_of(y), sources, allow_unused=True), expected)


def normed(t: Tensor) -> Tensor:
    return F.layer_norm(t * 1, WIDTH)


STATISTICS = ROWS * 2 * 4


def assert_same_outcome(fn: Callable[[], Tensor], sources: Sequence[Tensor], **options: bool) -> None:
    """Asserts the same gradients. Where eager torch raises an error, discarded outputs may still be recomputed."""

    def run(around: contextlib.AbstractContextManager) -> Sequence[Tensor | None] | str:
        try:
            with around:
                y = fn()
            return torch.autograd.grad(loss_of(y), sources, allow_unused=True)
        except RuntimeError as error:
            return str(error)

    expected, found = run(contextlib.nullcontext()), run(recompute.discard_outputs(**options))
    if isinstance(expected, str):
        assert found == expected or "modified by an in" in expected
    else:
        assert not isinstance(found, str), found
        assert_same_bits(found, expected)


def model_of_all(x: Tensor, p: Parameters) -> Tensor:
    h = TF.linear(x, p["a"])
    gate = TF.silu(h) * TF.linear(x, p["b"]) * h.sigmoid()
    mixed = F.layer_norm(TF.linear(gate, p["c"]), WIDTH)
    mixed += TF.linear(x, p["d"]).tanh()
    return TF.linear(TF.relu(mixed).square(), p["e"])

"""Discarding the outputs of blocks: bitwise equal gradients, less memory, and any other ops as readers."""

import contextlib
import gc
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ckpt_kernels import functional as F
from ckpt_kernels import recompute
from ckpt_kernels.memory import saved_bytes
from ckpt_kernels.recompute import recipes

from .conftest import DEVICE
from .readers import (
    READERS,
    WIDTH,
    assert_same_bits,
    by_reader,
    gradients,
    loss_of,
    weights,  # noqa: F401, the fixture p
)


class RecordStorage(torch.autograd.Function):
    """Saves its operand, and records the storage of the tensor that it unpacks in the backward pass."""

    @staticmethod
    def forward(ctx, x, seen):
        ctx.seen = seen
        ctx.save_for_backward(x)
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        ctx.seen.append(StorageWeakRef(ctx.saved_tensors[0].untyped_storage()))
        return grad, None


class RecordValue(torch.autograd.Function):
    """Saves its operand, and records the values that it unpacks in the backward pass."""

    @staticmethod
    def forward(ctx, x, noted):
        ctx.noted = noted
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        ctx.noted.append(ctx.saved_tensors[0].clone())
        return grad * ctx.saved_tensors[0].cos(), None


@pytest.mark.parametrize("passes", ["one", "retained", "double"])
@by_reader
def test_gradients_are_the_same_bits(reader: Callable, p: dict, passes: str) -> None:
    if passes == "double" and reader is READERS["attention"]:
        pytest.skip("torch's fused attention has no second derivative")
    expected = gradients(reader, p, contextlib.nullcontext(), passes)
    assert_same_bits(gradients(reader, p, recompute.discard_outputs(), passes), expected)


@by_reader
def test_the_output_is_gone_after_the_forward_pass(reader: Callable, p: dict) -> None:
    x = torch.randn(2, 8, WIDTH, device=DEVICE, requires_grad=True)
    storages = []

    def watched(n: Tensor, p: dict) -> Tensor:
        storages.append(StorageWeakRef(n.untyped_storage()))
        return reader(n, p)

    loss = loss_of(watched, p, x, contextlib.nullcontext())
    # Indexing does not save the output.
    assert storages[0].expired() == (reader is READERS["an index"])
    del loss
    loss = loss_of(watched, p, x, recompute.discard_outputs())
    assert storages[1].expired()
    loss.backward()


BLOCKS: dict[str, Callable[[Tensor, dict], Tensor]] = {
    "layer_norm": lambda x, p: F.layer_norm(x, WIDTH, p["norm"], p["norm"], activation="gelu"),
    "add_rms_norm": lambda x, p: F.add_rms_norm(x, x.sin(), WIDTH, p["norm"], dropout_p=0.2)[0],
    "add_layer_norm": lambda x, p: F.add_layer_norm(x, x.sin(), WIDTH, p["norm"], activation="silu")[0],
    "gated_rms_norm": lambda x, p: F.gated_rms_norm(x, x.sin(), WIDTH, p["norm"]),
    "gated_rms_norm, gate first": lambda x, p: F.gated_rms_norm(x, x.sin(), WIDTH, norm_before_gate=False),
    "modulated_layer_norm": lambda x, p: F.modulated_layer_norm(x, x[:, :1].sin(), x[:, :1], WIDTH),
    "modulated_rms_norm": lambda x, p: F.modulated_rms_norm(x, x[:, :1].sin(), x[:, :1], WIDTH),
    "glu": lambda x, p: F.glu(x, x.sin()),
    "packed_glu": lambda x, p: F.packed_glu(torch.cat((x, x.sin()), -1), layout="interleaved"),
    "bias_act": lambda x, p: F.bias_act(x, p["norm"], activation="gelu", dropout_p=0.2),
    "batch_norm": lambda x, p: F.batch_norm(x.mT, None, None, p["norm"], None, True, activation="silu").mT,
    "batch_norm, eval": lambda x, p: (
        F.batch_norm(x.mT, p["norm"].detach().abs(), p["norm"].detach().abs(), p["norm"], activation="silu").mT
    ),
    "batch_norm, add": lambda x, p: (
        F.batch_norm(x.mT, None, None, None, None, True, activation="relu", residual=x.mT.sin()).mT
    ),
    "group_norm": lambda x, p: F.group_norm(x.mT, 4, p["norm"], activation="silu").mT,
    "instance_norm": lambda x, p: F.instance_norm(x.mT.contiguous(), activation="gelu").mT,
}


@pytest.fixture
def frozen_objects() -> None:
    """Excludes the objects that exist from garbage collections, which take longer than a test otherwise."""
    gc.freeze()


@pytest.mark.usefixtures("frozen_objects")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_every_block_is_recomputed_bitwise(block: Callable, dtype: torch.dtype, p: dict, backend: str) -> None:
    def run(around: contextlib.AbstractContextManager) -> tuple[list, bool]:
        torch.manual_seed(5)
        x = torch.randn(2, 8, WIDTH, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype).requires_grad_()
        with around:
            y = block(x * 1.5, p)
            storage, noted = StorageWeakRef(y.untyped_storage()), []
            z = RecordValue.apply(y, noted)
            del y
            if backend == "triton":
                # Triton's interpreter leaves reference cycles that hold operands.
                gc.collect()
        gone = storage.expired()
        found = torch.autograd.grad(z.float().square().sum(), [x, p["norm"]], allow_unused=True)
        return [z, *found, *noted], gone

    expected, kept = run(contextlib.nullcontext())
    found, gone = run(recompute.discard_outputs())
    assert_same_bits(found, expected)
    assert gone and not kept


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "complex": lambda y: torch.view_as_complex(y.view(2, 8, WIDTH // 2, 2)),
    "conjugate": lambda y: torch.view_as_complex(y.view(2, 8, WIDTH // 2, 2)).conj(),
    "negative": lambda y: torch.view_as_complex(y.view(2, 8, WIDTH // 2, 2)).conj().imag,
}


@pytest.mark.parametrize("maker", ["a block", "torch's op"])
@pytest.mark.parametrize("view", VIEWS)
def test_a_view_that_is_more_than_strides_is_kept(view: str, maker: str, p: dict) -> None:
    """A recipe returns the memory in the output's dtype, without the conjugation or negation of a view."""

    def run(around: contextlib.AbstractContextManager) -> list:
        x = torch.randn(2, 8, WIDTH, generator=torch.Generator().manual_seed(1)).to(DEVICE).requires_grad_()
        with around:
            y = F.rms_norm(x * 1.5, WIDTH, p["norm"])
            z = VIEWS[view](TF.silu(y) if maker == "torch's op" else y).square()
        return list(torch.autograd.grad(z.abs().sum(), [x, p["norm"]]))

    assert_same_bits(run(recompute.discard_outputs()), run(contextlib.nullcontext()))


class Folded(torch.autograd.Function):
    """The same memory as rows, in a tensor that is neither a view of the operand nor holds the operand."""

    @staticmethod
    def forward(ctx, x):
        return torch.ops.aten._unsafe_view(x.detach(), (16, WIDTH))

    @staticmethod
    def backward(ctx, grad):
        return grad.view(2, 8, WIDTH)


@pytest.mark.parametrize("fold", [lambda n: n.view(16, WIDTH), Folded.apply], ids=["a view", "no view"])
def test_an_alias_that_outlives_the_output_is_discarded(fold: Callable[[Tensor], Tensor], p: dict) -> None:
    """The output is identified by the storage, also after the output tensor is freed."""

    def run(around: contextlib.AbstractContextManager) -> tuple[list, bool]:
        x = torch.randn(2, 8, WIDTH, generator=torch.Generator().manual_seed(1)).to(DEVICE).requires_grad_()
        with around:
            n = F.rms_norm(x * 1, WIDTH, p["norm"])
            total, left = n.sum(), fold(n)
            storage = StorageWeakRef(n.untyped_storage())
            del n
            y = TF.linear(left, p["a"])
            del left
        gone = storage.expired()
        return list(torch.autograd.grad(y.sum() + total, [x, p["a"], p["norm"]])), gone

    found, gone = run(recompute.discard_outputs())
    expected, kept = run(contextlib.nullcontext())
    assert gone and not kept
    assert_same_bits(found, expected)


def test_one_recomputation_serves_all_readers(p: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    make = recipes.Recipe._make
    monkeypatch.setattr(recipes.Recipe, "_make", lambda recipe: calls.append(recipe) or make(recipe))
    x = torch.randn(2, 8, WIDTH, device=DEVICE, requires_grad=True)
    loss = loss_of(READERS["q, k and v"], p, x, recompute.discard_outputs())
    for _ in range(2):
        assert not calls
        loss.backward(retain_graph=True)
        assert len(calls) == 1
        calls.pop()


def test_a_recomputed_output_is_freed_after_its_last_reader(p: dict) -> None:
    """Also if a reader does not run in the backward pass."""
    x = torch.randn(2, 8, WIDTH, device=DEVICE, requires_grad=True)
    seen = []

    with recompute.discard_outputs():
        n = F.rms_norm(x * 2, WIDTH, p["norm"])
        watched, other = RecordStorage.apply(n, seen), TF.linear(n, p["a"])
        del n
    # The other reader does not run in this pass, so it does not unpack the output.
    torch.autograd.grad(watched.sum(), x, retain_graph=True)
    assert seen.pop().expired()
    (watched.sum() + other.sum()).backward()
    assert seen.pop().expired()


@pytest.mark.parametrize("retained", [False, True])
def test_a_recomputed_output_is_freed_during_the_pass(retained: bool, p: dict) -> None:
    """The output is freed once the last living reader has unpacked it, not only when the backward pass ends."""
    x = torch.randn(2, 8, WIDTH, device=DEVICE, requires_grad=True)
    seen, expired = [], []

    with recompute.discard_outputs():
        hidden = x * 2
        hidden.register_hook(lambda grad: expired.extend(storage.expired() for storage in seen))
        n = F.rms_norm(hidden, WIDTH, p["norm"])
        loss = RecordStorage.apply(n, seen).sum() + RecordStorage.apply(n, seen).sum()
        unused = TF.linear(n, p["a"])
        del n, hidden
    del unused
    loss.backward(retain_graph=retained)
    assert seen[0].cdata == seen[1].cdata and expired == [True, True]


def test_nothing_outlives_the_graph(p: dict) -> None:
    """Also if an output is alive when the context ends, and without a garbage collection."""
    x = torch.randn(2, 8, WIDTH, device=DEVICE, requires_grad=True)
    gc.collect()
    gc.disable()
    try:
        with recompute.discard_outputs():
            hidden = x * 2
            storage = StorageWeakRef(hidden.untyped_storage())
            n = F.rms_norm(hidden, WIDTH, p["norm"])
            y = TF.linear(n, p["a"])
        del hidden
        y.sum().backward()
        assert storage.expired()
        del n, y
    finally:
        gc.enable()


def test_a_chain_of_blocks_is_recomputed(p: dict) -> None:
    x = torch.randn(64, WIDTH, device=DEVICE, requires_grad=True)

    def chain(x: Tensor) -> Tensor:
        for _ in range(6):
            x = F.bias_act(F.layer_norm(x, WIDTH, p["norm"]), activation="gelu")
        return TF.linear(x, p["a"])

    expected = torch.autograd.grad(chain(x).sum(), [x, p["norm"]])
    discarding = recompute.discard_outputs()(chain)
    assert_same_bits(list(torch.autograd.grad(discarding(x).sum(), [x, p["norm"]])), list(expected))
    statistics = 6 * 2 * 64 * 4
    assert saved_bytes(chain, x) == 13 * x.nbytes + statistics
    # A chain of recipes has a longest length, after which an output is kept: one of these twelve.
    assert saved_bytes(discarding, x) == 2 * x.nbytes + statistics


def test_readers_before_and_after_an_in_place_write(p: dict) -> None:
    """A reader before the write gets the old values in the backward pass; a reader after the write keeps the new."""
    x = torch.randn(4, WIDTH, device=DEVICE, requires_grad=True)
    with recompute.discard_outputs():
        n = F.rms_norm(x * 1, WIDTH, p["norm"])
        before = n.sin()
        n.mul_(2)
        after = n.sin()
    found = torch.autograd.grad(before.sum() + after.sum(), [x, p["norm"]])
    n = F.rms_norm(x * 1, WIDTH, p["norm"])
    expected = torch.autograd.grad(n.sin().sum() + (2 * n).sin().sum(), [x, p["norm"]])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("unseen", [False, True], ids=["in the graph", "under no_grad"])
def test_a_cast_of_a_written_output(unseen: bool, p: dict) -> None:
    """The cast is kept, or recomputed from the written values, not from the block's recomputed output."""

    def run(around: contextlib.AbstractContextManager) -> list:
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1)).to(DEVICE).requires_grad_()
        with around:
            n = F.rms_norm(x * 1, WIDTH, p["norm"])
            with torch.no_grad() if unseen else contextlib.nullcontext():
                n.mul_(2)
            y = n.bfloat16().square()
        return list(torch.autograd.grad(y.float().sum(), [x, p["norm"]]))

    assert_same_bits(run(recompute.discard_outputs()), run(contextlib.nullcontext()))


@pytest.mark.parametrize("which", ["the block's input", "a kept input", "a kept output", "a weight"])
def test_a_write_to_a_kept_tensor_is_an_error(which: str, p: dict) -> None:
    x = torch.randn(4, WIDTH, device=DEVICE, requires_grad=True)
    with recompute.discard_outputs():
        hidden = x * 1
        n = F.rms_norm(hidden, WIDTH, p["norm"])
        read = n.cumsum(-1)
        kept = read.cos().exp()
        y = kept.square()
    with torch.no_grad():
        {"the block's input": hidden, "a kept input": read, "a kept output": kept, "a weight": p["norm"]}[which].mul_(2)
    with pytest.raises(RuntimeError, match=r"modified by an in-?place operation"):
        y.sum().backward()


def test_frozen_parts_and_no_grad(p: dict) -> None:
    x = torch.randn(4, WIDTH, device=DEVICE)

    def model(x: Tensor) -> Tensor:
        frozen = F.rms_norm(x, WIDTH, p["norm"].detach())
        with torch.no_grad():
            scale = F.layer_norm(x, WIDTH, p["norm"])
        return TF.linear(F.layer_norm(TF.linear(frozen, p["a"]) * scale, WIDTH), p["b"])

    expected = torch.autograd.grad(model(x).sum(), [p["a"], p["b"]])
    discarding = recompute.discard_outputs()(model)
    assert_same_bits(list(torch.autograd.grad(discarding(x).sum(), [p["a"], p["b"]])), list(expected))
    with torch.no_grad(), recompute.discard_outputs():
        assert not model(x).requires_grad


def test_a_weights_gradient_after_the_blocks_graph_is_freed(p: dict) -> None:
    """A recipe holds its operands itself, so they outlive the block's graph."""
    x = torch.randn(4, WIDTH, device=DEVICE, requires_grad=True)
    results = []
    for around in (contextlib.nullcontext(), recompute.discard_outputs()):
        with around:
            n = F.rms_norm(x * 1, WIDTH, p["norm"])
            first, second = TF.linear(n, p["a"]), TF.linear(n, p["b"])
        torch.autograd.grad(first.sum(), [x, p["a"]])
        results.append(torch.autograd.grad(second.sum(), [p["b"]])[0])
    assert torch.equal(*results)

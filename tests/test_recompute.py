"""Letting go of blocks' outputs: the same gradients to the last bit, from less memory, in any company."""

import contextlib
import ctypes
import gc
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from ckpt_kernels import functional as F
from ckpt_kernels import nn, recipes, recompute
from ckpt_kernels.memory import saved_bytes

from .conftest import DEVICE
from .interrupts import interrupted_at_every_step

WIDTH = 16


class Sine(torch.autograd.Function):
    """Somebody else's op, which keeps what it reads."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos()


class Watch(torch.autograd.Function):
    """Keeps what it reads, and notes the memory of what it gets back in the backward pass."""

    @staticmethod
    def forward(ctx, x, seen):
        ctx.seen = seen
        ctx.save_for_backward(x)
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        ctx.seen.append(StorageWeakRef(ctx.saved_tensors[0].untyped_storage()))
        return grad, None


class Note(torch.autograd.Function):
    """Keeps what it reads, and notes what it gets back in the backward pass."""

    @staticmethod
    def forward(ctx, x, noted):
        ctx.noted = noted
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        ctx.noted.append(ctx.saved_tensors[0].clone())
        return grad * ctx.saved_tensors[0].cos(), None


@pytest.fixture
def p() -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.nn.Parameter:
        return torch.nn.Parameter((torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(DEVICE))

    return {
        "norm": random(WIDTH),
        "a": random(WIDTH, WIDTH),
        "b": random(WIDTH, WIDTH),
        "c": random(WIDTH, WIDTH),
        "conv": random(WIDTH, WIDTH, 3),
    }


# What reads the output n, (2, 8, WIDTH), of a norm; each keeps n, or a part or a view of it.
READERS: dict[str, Callable[[Tensor, dict[str, Tensor]], Tensor]] = {
    "linear": lambda n, p: TF.linear(n, p["a"]),
    "q, k and v": lambda n, p: TF.linear(n, p["a"]) + TF.linear(n, p["b"]) * TF.linear(n, p["c"]).tanh(),
    "convolution": lambda n, p: TF.conv1d(n.transpose(1, 2), p["conv"]),
    "attention": lambda n, p: TF.scaled_dot_product_attention(*[n.view(2, 8, 4, 4).transpose(1, 2)] * 3),
    "einsum": lambda n, p: torch.einsum("btd,de->bte", n, p["a"]),
    "matmul with itself": lambda n, p: n @ n.transpose(1, 2),
    "a slice": lambda n, p: TF.linear(n[:, 2:5, :8].sin(), p["a"][:, :8]),
    "a gather": lambda n, p: n.gather(1, torch.zeros(2, 3, WIDTH, dtype=torch.long, device=n.device)).square(),
    "an index": lambda n, p: n[:, [0, 0, 3]].pow(3),
    "another's function": lambda n, p: Sine.apply(n),
    "itself in a product": lambda n, p: n * n.exp(),
    "a checkpoint": lambda n, p: checkpoint(
        lambda z: TF.linear(F.rms_norm(z, WIDTH, p["norm"]), p["b"]).tanh(), n, use_reentrant=False
    ),
    "further blocks": lambda n, p: TF.linear(
        F.layer_norm(F.glu(n, F.rms_norm(n, WIDTH, p["norm"])), WIDTH, p["norm"]), p["a"]
    ),
    "a fused mlp": lambda n, p: F.gated_mlp(n, p["a"], p["b"], p["c"]),
    "a fused mlp that recomputes all": lambda n, p: F.mlp(n, p["a"], None, p["b"], None, recompute="all"),
}
by_reader = pytest.mark.parametrize("reader", READERS.values(), ids=READERS)


def loss_of(reader: Callable, p: dict, x: Tensor, around: contextlib.AbstractContextManager) -> Tensor:
    hidden = x * 1.5
    with around:
        return reader(F.rms_norm(hidden, WIDTH, p["norm"], activation="silu"), p).square().sum()


def gradients(reader: Callable, p: dict, around: contextlib.AbstractContextManager, passes: str = "one") -> list:
    x = torch.randn(2, 8, WIDTH, generator=torch.Generator().manual_seed(1)).to(DEVICE).requires_grad_()
    sources = [x, *p.values()]
    loss = loss_of(reader, p, x, around)
    if passes == "retained":
        torch.autograd.grad(loss, sources, retain_graph=True, allow_unused=True)
        torch.autograd.grad(loss, [p["norm"]], retain_graph=True)
    if passes == "double":
        first = torch.autograd.grad(loss, [x, p["norm"]], create_graph=True)
        loss = sum(g.square().sum() for g in first)
    return list(torch.autograd.grad(loss, sources, allow_unused=True))


def assert_same_bits(found: list, expected: list) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


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
    # An index reads it without keeping it.
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
    "batch_norm, eval": lambda x, p: F.batch_norm(x.mT, p["norm"].abs(), p["norm"].abs(), activation="silu").mT,
    "batch_norm, add": lambda x, p: (
        F.batch_norm(x.mT, None, None, None, None, True, activation="relu", residual=x.mT.sin()).mT
    ),
    "group_norm": lambda x, p: F.group_norm(x.mT, 4, p["norm"], activation="silu").mT,
    "instance_norm": lambda x, p: F.instance_norm(x.mT.contiguous(), activation="gelu").mT,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_every_block_is_rebuilt_to_the_bit(block: Callable, dtype: torch.dtype, p: dict, backend: str) -> None:
    def run(around: contextlib.AbstractContextManager) -> tuple[list, bool]:
        torch.manual_seed(5)
        x = torch.randn(2, 8, WIDTH, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype).requires_grad_()
        with around:
            y = block(x * 1.5, p)
            storage, noted = StorageWeakRef(y.untyped_storage()), []
            z = Note.apply(y, noted)
            del y
            if backend == "triton":
                # Its interpreter leaves its operands to the collector.
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
    """A recipe gives the memory in its own dtype, and as it is: not what such a view makes of it."""

    def run(around: contextlib.AbstractContextManager) -> list:
        x = torch.randn(2, 8, WIDTH, generator=torch.Generator().manual_seed(1)).to(DEVICE).requires_grad_()
        with around:
            y = F.rms_norm(x * 1.5, WIDTH, p["norm"])
            z = VIEWS[view](TF.silu(y) if maker == "torch's op" else y).square()
        return list(torch.autograd.grad(z.abs().sum(), [x, p["norm"]]))

    assert_same_bits(run(recompute.discard_outputs()), run(contextlib.nullcontext()))


def test_what_outlives_the_tensor_is_let_go_of(p: dict) -> None:
    """A view has the tensor's memory, by which it is known, also when the tensor itself is gone."""

    def run(around: contextlib.AbstractContextManager) -> tuple[list, bool]:
        x = torch.randn(2, 8, WIDTH, generator=torch.Generator().manual_seed(1)).to(DEVICE).requires_grad_()
        with around:
            n = F.rms_norm(x * 1, WIDTH, p["norm"])
            total, left = n.sum(), n.view(16, WIDTH)
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


def test_one_rebuild_serves_all_readers(p: dict, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_rebuilt_output_is_freed_after_its_last_reader(p: dict) -> None:
    """Also where some reader never asks."""
    x = torch.randn(2, 8, WIDTH, device=DEVICE, requires_grad=True)
    seen = []

    with recompute.discard_outputs():
        n = F.rms_norm(x * 2, WIDTH, p["norm"])
        watched, other = Watch.apply(n, seen), TF.linear(n, p["a"])
        del n
    # The other reader is not run in this pass, and so does not ask.
    torch.autograd.grad(watched.sum(), x, retain_graph=True)
    assert seen.pop().expired()
    (watched.sum() + other.sum()).backward()
    assert seen.pop().expired()


@pytest.mark.parametrize("retained", [False, True])
def test_a_rebuilt_output_is_freed_before_the_pass_goes_on(retained: bool, p: dict) -> None:
    """When the last who asks has it, those who are gone not counted, and not only when the pass ends."""
    x = torch.randn(2, 8, WIDTH, device=DEVICE, requires_grad=True)
    seen, at_the_end = [], []

    with recompute.discard_outputs():
        hidden = x * 2
        hidden.register_hook(lambda grad: at_the_end.extend(storage.expired() for storage in seen))
        n = F.rms_norm(hidden, WIDTH, p["norm"])
        loss = Watch.apply(n, seen).sum() + Watch.apply(n, seen).sum()
        unused = TF.linear(n, p["a"])
        del n, hidden
    del unused
    loss.backward(retain_graph=retained)
    assert seen[0].cdata == seen[1].cdata and at_the_end == [True, True]


def test_nothing_outlives_the_graph(p: dict) -> None:
    """Also where an output is alive when the context ends, and without the garbage collector."""
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


def test_a_chain_is_rebuilt_without_its_middle(p: dict) -> None:
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
    # Of twelve outputs in a row the one after the longest chain is kept.
    assert saved_bytes(discarding, x) == 2 * x.nbytes + statistics


def test_written_in_place(p: dict) -> None:
    """Who read before the write gets what it read; who reads afterwards keeps what there is."""
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
def test_a_cast_of_what_was_written_to(unseen: bool, p: dict) -> None:
    """The cast is made again of what it was made of, or is kept: not of what the block made."""

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
def test_a_write_to_what_is_kept_is_an_error(which: str, p: dict) -> None:
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
    """What the recipe is made from is the recipe's own."""
    x = torch.randn(4, WIDTH, device=DEVICE, requires_grad=True)
    results = []
    for around in (contextlib.nullcontext(), recompute.discard_outputs()):
        with around:
            n = F.rms_norm(x * 1, WIDTH, p["norm"])
            first, second = TF.linear(n, p["a"]), TF.linear(n, p["b"])
        torch.autograd.grad(first.sum(), [x, p["a"]])
        results.append(torch.autograd.grad(second.sum(), [p["b"]])[0])
    assert torch.equal(*results)


@contextlib.contextmanager
def counting_hooks(log: list) -> Iterator[None]:
    def pack(tensor: Tensor) -> Tensor:
        log.append(tuple(tensor.shape))
        return tensor.detach().clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


def test_hooks_around_and_inside(p: dict) -> None:
    reader = READERS["q, k and v"]
    expected = gradients(reader, p, contextlib.nullcontext())
    alone: list = []
    with counting_hooks(alone):
        assert_same_bits(gradients(reader, p, contextlib.nullcontext()), expected)
    around: list = []
    with counting_hooks(around):
        assert_same_bits(gradients(reader, p, recompute.discard_outputs()), expected)
    # All but the norm's output, which each of the three linear layers reads as a matrix, goes to the hooks around.
    assert around.count((16, WIDTH)) == alone.count((16, WIDTH)) - 3
    inside: list = []

    def hooked(n: Tensor, p: dict) -> Tensor:
        with counting_hooks(inside):
            return reader(n, p)

    assert_same_bits(gradients(hooked, p, recompute.discard_outputs()), expected)
    assert inside
    with torch.autograd.graph.save_on_cpu():
        assert_same_bits(gradients(reader, p, recompute.discard_outputs()), expected)
    with recompute.discard_outputs():
        assert_same_bits(gradients(reader, p, recompute.discard_outputs()), expected)


@by_reader
def test_within_a_checkpoint(reader: Callable, p: dict) -> None:
    def loss(around: Callable[[], contextlib.AbstractContextManager]) -> list:
        x = torch.randn(2, 8, WIDTH, generator=torch.Generator().manual_seed(1)).to(DEVICE).requires_grad_()
        y = checkpoint(lambda x: loss_of(reader, p, x, around()), x, use_reentrant=False)
        return list(torch.autograd.grad(y, [x, *p.values()], allow_unused=True))

    assert_same_bits(loss(recompute.discard_outputs), loss(contextlib.nullcontext))


def test_under_autocast_the_casts_are_let_go_too(p: dict) -> None:
    x = torch.randn(64, WIDTH, device=DEVICE, requires_grad=True)

    def model(x: Tensor) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            n = F.rms_norm(x * 1, WIDTH, p["norm"])
            return TF.linear(n, p["a"]) + TF.linear(n, p["b"])

    discarding = recompute.discard_outputs()(model)
    sources = [x, p["a"], p["b"], p["norm"]]
    expected = torch.autograd.grad(model(x).float().sum(), sources)
    assert_same_bits(list(torch.autograd.grad(discarding(x).float().sum(), sources)), list(expected))
    casts_of_weights = 2 * p["a"].nbytes // 2
    statistics = 64 * 4
    assert saved_bytes(discarding, x) == x.nbytes + statistics + casts_of_weights


def test_threads_and_models_side_by_side(p: dict) -> None:
    reader = READERS["further blocks"]
    expected = gradients(reader, p, contextlib.nullcontext())
    results: list = [None] * 6

    def work(index: int) -> None:
        around = recompute.discard_outputs() if index % 3 else contextlib.nullcontext()
        results[index] = gradients(reader, p, around)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        assert_same_bits(result, expected)


def test_a_graph_whose_backward_runs_on_two_threads(p: dict) -> None:
    x = torch.randn(2, 8, WIDTH, device=DEVICE, requires_grad=True)
    with recompute.discard_outputs():
        n = F.rms_norm(x * 1, WIDTH, p["norm"])
        halves = [TF.linear(n, p["a"]).sum(), TF.linear(n, p["b"]).sum()]
        del n
    expected = torch.autograd.grad(sum(halves), [p["a"], p["b"]], retain_graph=True)
    found: list = [None, None]

    def work(index: int) -> None:
        for _ in range(20):
            (found[index],) = torch.autograd.grad(halves[index], [p["ab"[index]]], retain_graph=True)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_same_bits(found, list(expected))


def test_an_exception_leaves_nothing_behind(p: dict) -> None:
    x = torch.randn(4, WIDTH, device=DEVICE, requires_grad=True)
    storages = []
    with contextlib.suppress(KeyError), recompute.discard_outputs():
        n = F.rms_norm(x * 1, WIDTH, p["norm"])
        storages.append(StorageWeakRef(n.untyped_storage()))
        y = TF.linear(n, p["a"])
        raise KeyError("in the middle")
    assert not recompute.is_active() and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    del n, y
    assert storages[0].expired()
    # And a block that fails after it has announced its output.
    with recompute.discard_outputs():
        with pytest.raises(RuntimeError):
            F.rms_norm(x, WIDTH + 1)
        assert F.rms_norm(x, WIDTH).sin().sum().backward() is None


def test_decorator_wrapper_and_reentrance(p: dict) -> None:
    module = torch.nn.Sequential(nn.LayerNorm(WIDTH, activation="gelu"), torch.nn.Linear(WIDTH, WIDTH)).to(DEVICE)
    x = torch.randn(4, WIDTH, device=DEVICE, requires_grad=True)
    plain = saved_bytes(module, x)
    assert saved_bytes(recompute.DiscardOutputs(module), x) == plain - x.nbytes

    @recompute.discard_outputs()
    def forward(x: Tensor, depth: int = 2) -> Tensor:
        return module(x) if depth == 0 else forward(x, depth - 1)

    assert saved_bytes(forward, x) == plain - x.nbytes
    context = recompute.discard_outputs()
    with context, context:
        y = module(x)
    assert torch.equal(y, module(x))


def test_compile_takes_no_notice(p: dict) -> None:
    torch._dynamo.reset()
    x = torch.randn(4, WIDTH, device=DEVICE, requires_grad=True)

    def model(x: Tensor) -> Tensor:
        with recompute.discard_outputs():
            return TF.linear(F.rms_norm(x, WIDTH, p["norm"]), p["a"])

    found = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, model(x))
    found.sum().backward()


def test_compile_recomputes_blocks_by_selective_contexts(p: dict) -> None:
    """What the partitioner then keeps is what discarding keeps; gradients are those of eager code."""
    model = torch.nn.Sequential(nn.LayerNorm(WIDTH, activation="gelu"), torch.nn.Linear(WIDTH, WIDTH)).to(DEVICE)
    x = torch.randn(64, WIDTH, device=DEVICE, requires_grad=True)

    def compiled(fn: Callable) -> Callable:
        torch._dynamo.reset()
        found = torch.compile(fn, fullgraph=True, backend="aot_eager_decomp_partition")
        found(x)
        return found

    statistics = 2 * 64 * 4
    # The input and the output.
    assert saved_bytes(compiled(lambda x: model(x)), x) == 2 * x.nbytes + statistics
    selective = compiled(lambda x: checkpoint(model, x, use_reentrant=False, context_fn=recompute.selective_contexts))
    assert saved_bytes(selective, x) == x.nbytes
    sources = [x, *model.parameters()]
    found = torch.autograd.grad(selective(x).square().sum(), sources)
    torch.testing.assert_close(found, torch.autograd.grad(model(x).square().sum(), sources))


@pytest.mark.parametrize("entered", ["once", "every step"])
def test_a_thousand_steps_hold_memory_flat(entered: str, p: dict) -> None:
    """Nothing is left for the garbage collector, and nothing is left at all."""
    x = torch.randn(4, WIDTH, device=DEVICE, requires_grad=True)
    around = (recompute.discard_outputs(), contextlib.nullcontext())
    outside, inside = around if entered == "once" else reversed(around)
    gc.collect()
    gc.disable()
    try:
        with outside:
            counts = []
            for step in range(1000):
                loss_of(READERS["further blocks"], p, x, inside).backward()
                if step in (10, 999):
                    counts.append(sum(isinstance(o, torch.Tensor | recompute.Recipe) for o in gc.get_objects()))
        assert counts[0] == counts[1]
    finally:
        gc.enable()


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["norm", "gelu", "glu", "add_norm", "linear", "mul", "view", "join", "frozen", "no_grad"]),
        st.integers(0, 7),
        st.integers(0, 7),
    ),
    min_size=3,
    max_size=14,
)


def _random_graph(plan: list, p: dict, x: Tensor) -> Tensor:
    """Branches, joins, views and reuse: each operation reads some of what there is."""
    values = [x * 1.5]
    for name, first, second in plan:
        a, b = values[first % len(values)], values[second % len(values)]
        if name == "norm":
            values.append(F.layer_norm(a, WIDTH, p["norm"], activation="silu"))
        elif name == "gelu":
            values.append(F.bias_act(a, p["norm"], activation="gelu"))
        elif name == "glu":
            values.append(F.glu(a, b))
        elif name == "add_norm":
            values += F.add_rms_norm(a, b, WIDTH, p["norm"])
        elif name == "linear":
            values.append(TF.linear(a, p["a"] if second % 2 else p["b"]))
        elif name == "mul":
            values.append(a * b.tanh())
        elif name == "view":
            values.append(a.transpose(0, 1).reshape(8, 2, WIDTH).flip(0).transpose(0, 1))
        elif name == "join":
            values.append(torch.cat((a[:, :4], b[:, 4:]), 1))
        elif name == "frozen":
            values.append(TF.linear(F.rms_norm(a.detach(), WIDTH, p["norm"].detach()), p["c"]))
        else:
            with torch.no_grad():
                values.append(F.rms_norm(a, WIDTH, p["norm"]))
    return sum(value.sin().sum() for value in values[1:]) + x.sum()


@settings(max_examples=150)
@given(plan=OPERATIONS)
def test_random_graphs(plan: list) -> None:
    p = {"norm": torch.nn.Parameter(torch.linspace(0.5, 1.5, WIDTH, device=DEVICE))}
    generator = torch.Generator().manual_seed(0)
    p |= {k: torch.nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator).to(DEVICE) / 4) for k in "abc"}
    x = torch.randn(2, 8, WIDTH, generator=generator).to(DEVICE).requires_grad_()
    sources = [x, *p.values()]
    expected = torch.autograd.grad(_random_graph(plan, p, x), sources, allow_unused=True)
    with recompute.discard_outputs():
        loss = _random_graph(plan, p, x)
    assert_same_bits(list(torch.autograd.grad(loss, sources, allow_unused=True)), list(expected))
    graph = lambda x: _random_graph(plan, p, x)  # noqa: E731
    assert saved_bytes(recompute.discard_outputs()(graph), x) <= saved_bytes(graph, x)


def test_tensors_without_a_storage_pass_through() -> None:
    sparse = torch.randn(5, 8, device=DEVICE).to_sparse().requires_grad_()
    weight = torch.randn(8, 4, device=DEVICE, requires_grad=True)

    def gradients() -> tuple[torch.Tensor, ...]:
        y = torch.sparse.mm(sparse, weight)
        return torch.autograd.grad(y.sum(), (sparse, weight))

    expected = gradients()
    with recompute.discard_outputs():
        y = torch.sparse.mm(sparse, weight)
    for found, value in zip(torch.autograd.grad(y.sum(), (sparse, weight)), expected, strict=True):
        torch.testing.assert_close(found.to_dense(), value.to_dense())


def test_a_freed_weight_is_an_error() -> None:
    x, weight = torch.randn(6, 8, device=DEVICE, requires_grad=True), torch.ones(8, device=DEVICE, requires_grad=True)
    reader = torch.randn(4, 8, device=DEVICE, requires_grad=True)
    with recompute.discard_outputs():
        y = torch.nn.functional.linear(F.rms_norm(x, 8, weight, activation="silu"), reader)
    weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"a weight needed to compute again, torch.float32 \(8,\), has been freed"):
        y.sum().backward()


def test_a_generator_closed_in_another_thread_ends_its_context(p: dict) -> None:
    def steps() -> Iterator[None]:
        with recompute.discard_outputs():
            yield

    x = torch.randn(8, WIDTH, device=DEVICE, requires_grad=True)

    def kept() -> int:
        return saved_bytes(lambda: TF.linear(F.layer_norm(x, WIDTH), p["a"]))

    plain, generator, found = kept(), steps(), []
    next(generator)
    assert recompute.is_active()

    def close() -> None:
        with recompute.discard_outputs():
            generator.close()
            found.append(recompute.discarding() is not None)
        found.append(torch._C._autograd._top_saved_tensors_default_hooks(True) is None)

    thread = threading.Thread(target=close)
    thread.start()
    thread.join()
    assert found == [True, True]
    assert not recompute.is_active()
    # The first tensor that is saved takes the hooks off.
    y = TF.linear(F.layer_norm(x, WIDTH), p["a"])
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    y.sum().backward()
    assert kept() == plain


def test_an_interrupt_is_heard_while_a_recipe_is_released(p: dict) -> None:
    """It is set by C code that runs as tensors go, as a signal may come: the first Python code after it raises it."""
    interrupt = ctypes.PYFUNCTYPE(None, ctypes.py_object)(("PyErr_SetInterrupt", ctypes.pythonapi))

    class Trigger:
        pass

    x, trigger = torch.randn(8, WIDTH, device=DEVICE, requires_grad=True), Trigger()
    reference = weakref.ref(trigger, interrupt)
    unheard: list[object] = []
    hook, sys.unraisablehook = sys.unraisablehook, unheard.append
    # In a process that was started in the background interrupts are ignored.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with recompute.discard_outputs():
            y = F.layer_norm(x, WIDTH)
            # Lists let go of what is last first.
            held = [TF.linear(y, p["a"]), trigger]
            other = TF.linear(y, p["a"])
            del y, trigger
        with pytest.raises(KeyboardInterrupt):
            held.clear()
            [None for _ in range(2)]
    finally:
        signal.signal(signal.SIGINT, handler)
        sys.unraisablehook = hook
    assert reference() is None and not unheard
    # And the reader that is left is served alone.
    (gradient,) = torch.autograd.grad(other.sum(), x)
    (expected,) = torch.autograd.grad(TF.linear(F.layer_norm(x, WIDTH), p["a"]).sum(), x)
    assert torch.equal(gradient, expected)


def test_an_interrupt_at_any_step_of_a_context_leaves_nothing_behind() -> None:
    def run() -> None:
        with recompute.discard_outputs():
            pass

    for step in interrupted_at_every_step(run):
        torch.ones(1, requires_grad=True).exp()
        assert not recompute.is_active(), f"interrupted at step {step}"
        assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None, f"interrupted at step {step}"
    assert step > 20

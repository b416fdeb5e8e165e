"""Discarding outputs with saved-tensor hooks, checkpoints, autocast, threads, torch.compile and exceptions."""

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from ckpt_kernels import functional as F
from ckpt_kernels import nn, recompute
from ckpt_kernels.memory import saved_bytes
from ckpt_kernels.recompute.recipes import Recipe

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


@contextlib.contextmanager
def counting_hooks(log: list) -> Iterator[None]:
    def pack(tensor: Tensor) -> Tensor:
        log.append(tuple(tensor.shape))
        return tensor.detach().clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


def contiguous_hooks() -> contextlib.AbstractContextManager:
    """Hooks that give tensors back contiguous, as `torch.autograd.graph.save_on_cpu(pin_memory=True)` does."""
    return torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: tensor.detach().clone(memory_format=torch.contiguous_format), lambda tensor: tensor
    )


@pytest.mark.parametrize("dense", ["channels_last", "transposed"])
@pytest.mark.parametrize("block", ["group_norm", "batch_norm", "bias_act", "glu", "torch's own"])
def test_operands_that_hooks_give_back_in_other_strides(block: str, dense: str) -> None:
    x = torch.randn(2, 8, 6, 4, dtype=torch.float64, device=DEVICE)
    x = x.contiguous(memory_format=torch.channels_last) if dense == "channels_last" else x.transpose(2, 3)
    weight = torch.randn(4, 8, 3, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    scale = torch.ones(8, dtype=torch.float64, device=DEVICE, requires_grad=True)
    blocks: dict[str, Callable[[Tensor], Tensor]] = {
        "group_norm": lambda h: F.group_norm(h, 2, scale, scale, activation="silu"),
        "batch_norm": lambda h: F.batch_norm(h, None, None, scale, scale, training=True),
        "bias_act": lambda h: F.bias_act(h, activation="gelu"),
        "glu": lambda h: F.glu(h, h + 1),
        "torch's own": lambda h: (h * 2).sigmoid() * h.cos(),
    }

    def gradients() -> list[Tensor]:
        h = x.detach().requires_grad_()
        return list(torch.autograd.grad(TF.conv2d(blocks[block](h), weight).square().sum(), [h, weight]))

    expected = gradients()
    with contiguous_hooks(), recompute.discard_outputs(products=True):
        found = gradients()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_hooks_around_and_inside(p: dict) -> None:
    reader = READERS["q, k and v"]
    expected = gradients(reader, p, contextlib.nullcontext())
    alone: list = []
    with counting_hooks(alone):
        assert_same_bits(gradients(reader, p, contextlib.nullcontext()), expected)
    around: list = []
    with counting_hooks(around):
        assert_same_bits(gradients(reader, p, recompute.discard_outputs()), expected)
    # The outer hooks pack every saved tensor once, but the norm's output, which each of the three linear layers reads
    # as a matrix. Operands that the recipe shares with the norm are not packed again.
    assert len(around) == len(alone) - 3
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


def test_a_write_to_an_operand_that_hooks_around_keep_is_an_error(p: dict) -> None:
    """The hooks may keep the memory itself, in which the old values are gone."""
    x = torch.randn(8, WIDTH, device=DEVICE, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        with recompute.discard_outputs():
            h = x * 1
            y = TF.linear(h * x.sin(), p["a"])
            with torch.no_grad():
                h.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an in-place operation"):
        torch.autograd.grad(y.sum(), p["a"])


@by_reader
def test_within_a_checkpoint(reader: Callable, p: dict) -> None:
    def loss(around: Callable[[], contextlib.AbstractContextManager]) -> list:
        x = torch.randn(2, 8, WIDTH, generator=torch.Generator().manual_seed(1)).to(DEVICE).requires_grad_()
        y = checkpoint(lambda x: loss_of(reader, p, x, around()), x, use_reentrant=False)
        return list(torch.autograd.grad(y, [x, *p.values()], allow_unused=True))

    assert_same_bits(loss(recompute.discard_outputs), loss(contextlib.nullcontext))


def test_casts_of_autocast_are_discarded_too(p: dict) -> None:
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
    # A block that fails after the announcement of its output leaves nothing behind either.
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


def test_a_context_within_another_leaves_the_outer_one_active() -> None:
    with recompute.discard_outputs():
        outer = recompute.discarding()
        with recompute.discard_outputs(products=True):
            assert recompute.discarding() is outer
        assert recompute.discarding() is outer


def test_compile_ignores_the_context(p: dict) -> None:
    torch._dynamo.reset()
    x = torch.randn(4, WIDTH, device=DEVICE, requires_grad=True)

    def model(x: Tensor) -> Tensor:
        with recompute.discard_outputs():
            return TF.linear(F.rms_norm(x, WIDTH, p["norm"]), p["a"])

    found = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, model(x))
    found.sum().backward()


def test_compile_recomputes_blocks_by_selective_contexts(p: dict) -> None:
    """The partitioner then keeps the same tensors as `discard_outputs`, and gradients are those of eager code."""
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


class WithoutCallbacks:
    """The engine of autograd as compiled autograd shows it."""

    run_backward = torch.autograd.Variable._execution_engine.run_backward

    def queue_callback(self, callback: Callable) -> None:
        raise AssertionError("no callbacks within a compiled backward pass")


def test_a_backward_pass_that_a_compiler_traces_queues_no_callback(p: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled autograd refuses callbacks at the end of the pass. So nothing is shared by readers, and the gradients
    are the same."""
    x = torch.randn(2, 8, WIDTH, device=DEVICE, requires_grad=True)

    def loss() -> Tensor:
        with recompute.discard_outputs():
            return READERS["q, k and v"](F.rms_norm(x, WIDTH, p["norm"], activation="silu"), p).square().sum()

    sources = [x, *p.values()]
    expected = torch.autograd.grad(loss(), sources, allow_unused=True)
    traced = loss()
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        patch.setattr(torch.autograd.Variable, "_execution_engine", WithoutCallbacks())
        found = torch.autograd.grad(traced, sources, allow_unused=True)
    assert_same_bits(found, expected)


@pytest.mark.parametrize("entered", ["once", "every step"])
def test_a_thousand_steps_hold_memory_flat(entered: str, p: dict) -> None:
    """No step leaves tensors or recipes behind, without a garbage collection."""
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
                    counts.append(sum(isinstance(o, torch.Tensor | Recipe) for o in gc.get_objects()))
        assert counts[0] == counts[1]
    finally:
        gc.enable()

"""Discarding the outputs of torch's own ops, in every kind of backward pass, with hooks and checkpoints."""

import contextlib
import gc
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ckpt_kernels import functional as F
from ckpt_kernels import recompute
from ckpt_kernels.recompute import nodes

from .conftest import DEVICE
from .discarded_outputs import (
    STATISTICS,
    UNIT,
    WIDTH,
    Parameters,
    assert_same_bits,
    assert_unchanged,
    kept_bytes,
    loss_of,
    model_of_all,
    normed,
    rows,  # noqa: F401, the fixture x
    shows_saved,
)

pytestmark = pytest.mark.skipif(not shows_saved, reason="this torch does not show what nodes hold")


@pytest.mark.parametrize("options", [{}, {"products": True, "temporaries": True}], ids=["default", "all"])
def test_repeated_partial_and_double_backward_passes(options: dict, x: Tensor) -> None:
    p = Parameters()
    model_of_all(x, p)
    sources = [x, *p.values()]

    def passes(around: contextlib.AbstractContextManager) -> list[Tensor]:
        with around:
            loss = model_of_all(x, p).square().sum()
        found = [*torch.autograd.grad(loss, sources, retain_graph=True)]
        found += torch.autograd.grad(loss, [p["b"]], retain_graph=True)
        first = torch.autograd.grad(loss, sources, create_graph=True)
        return [*found, *torch.autograd.grad(sum(g.square().sum() for g in first), sources)]

    def all_within(around: contextlib.AbstractContextManager) -> list[Tensor]:
        with around:
            loss = model_of_all(x, p).square().sum()
            first = torch.autograd.grad(loss, sources, create_graph=True)
            return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), sources)]

    for run in (passes, all_within):
        assert_same_bits(run(recompute.discard_outputs(**options)), run(contextlib.nullcontext()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backward_within", [False, True])
def test_under_autocast(dtype: torch.dtype, backward_within: bool, x: Tensor) -> None:
    p = Parameters()
    model_of_all(x, p)

    def gradients(around: contextlib.AbstractContextManager) -> tuple[Tensor, ...]:
        with torch.autocast(DEVICE, dtype):
            with around:
                loss = model_of_all(x, p).float().square().mean()
            if backward_within:
                return torch.autograd.grad(loss, [x, *p.values()])
        return torch.autograd.grad(loss, [x, *p.values()])

    assert_same_bits(gradients(recompute.discard_outputs()), gradients(contextlib.nullcontext()))


@pytest.mark.parametrize("options", [{}, {"products": True, "temporaries": True}], ids=["default", "all"])
def test_with_checkpoints(options: dict, x: Tensor) -> None:
    """A checkpoint counts saved tensors, so the count must be the same for operands that were made outside."""
    p = Parameters()

    def outside(around: Callable[[], contextlib.AbstractContextManager]) -> Tensor:
        with around():
            h = x * x.sigmoid()
            h = checkpoint(lambda h: model_of_all(h, p), h, use_reentrant=False)
            return model_of_all(TF.silu(h) * h, p)

    def inside(around: Callable[[], contextlib.AbstractContextManager]) -> Tensor:
        def part(h: Tensor, shortcut: Tensor) -> Tensor:
            with around():
                y = model_of_all(h, p)
                return model_of_all(y * shortcut + shortcut.relu() * shortcut, p)

        h = x * x.sigmoid()
        return checkpoint(part, h, h, use_reentrant=False)

    def both(around: Callable[[], contextlib.AbstractContextManager]) -> Tensor:
        with around():
            return inside(around)

    for run in (outside, inside, both):
        expected = torch.autograd.grad(loss_of(run(contextlib.nullcontext)), [x, *p.values()])
        y = run(lambda: recompute.discard_outputs(**options))
        assert_same_bits(torch.autograd.grad(loss_of(y), [x, *p.values()]), expected)


def test_a_checkpoint_whose_input_is_freed_before_its_backward(x: Tensor) -> None:
    """The saved tensors of a checkpoint must not depend on nodes outside, which are freed before the recomputation."""
    p = Parameters()

    def part(h: Tensor) -> Tensor:
        with recompute.discard_outputs():
            return TF.linear(h, p["a"]).cumsum(-1).sin()

    with recompute.discard_outputs():
        h = x * x.sigmoid()
        y = checkpoint(part, h, use_reentrant=False)
    torch.autograd.grad(h.sum(), [x])
    expected = torch.autograd.grad(part(h.detach()).sum(), [p["a"]])
    assert_same_bits(torch.autograd.grad(y.sum(), [p["a"]]), expected)


def test_tensor_hooks_and_saved_tensor_hooks(x: Tensor) -> None:
    p = Parameters()

    def hooked() -> Tensor:
        h = TF.silu(TF.linear(x, p["a"])) * x
        h.register_hook(lambda grad: grad * 2)
        h.grad_fn.register_hook(lambda *_: None)
        return TF.linear(h, p["b"])

    def indices(tensors: list[Tensor]) -> contextlib.AbstractContextManager:
        def pack(tensor: Tensor) -> Tensor:
            tensors.append(tensor.detach().clone())
            return torch.tensor(len(tensors) - 1)

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda index: tensors[int(index)])

    def others_within() -> Tensor:
        with indices([]):
            h = normed(x) * x.detach()
            s = h.sigmoid()
        return TF.linear(h * s, p["b"]) + (h * 2).sin()

    for call in (hooked, others_within):
        call()
        assert_unchanged(call, [x, *p.values()])
        expected = torch.autograd.grad(loss_of(call()), [x, *p.values()], allow_unused=True)
        for around in (indices([]), torch.autograd.graph.save_on_cpu()):
            with around, recompute.discard_outputs(temporaries=True):
                y = call()
            assert_same_bits(torch.autograd.grad(loss_of(y), [x, *p.values()], allow_unused=True), expected)


def test_a_graph_that_starts_outside_the_context(x: Tensor) -> None:
    p = Parameters()

    def call(around: contextlib.AbstractContextManager) -> Tensor:
        h = TF.silu(x * 1) * x
        n = F.layer_norm(h, WIDTH)
        with around:
            return TF.linear(h, p["a"]) + TF.linear(TF.relu(n) * h.sigmoid(), p["b"])

    expected = torch.autograd.grad(call(contextlib.nullcontext()).sum(), [x, *p.values()])
    assert_same_bits(torch.autograd.grad(call(recompute.discard_outputs()).sum(), [x, *p.values()]), expected)


@pytest.mark.parametrize("options", [{}, {"products": True, "temporaries": True}], ids=["default", "all"])
def test_operands_are_freed_during_the_pass(options: dict, x: Tensor) -> None:
    """No tensor is left while the loss is alive and the context open, without a garbage collection."""
    p = Parameters()
    model_of_all(x, p)
    gc.collect()
    gc.disable()
    try:
        before = live_bytes()
        with recompute.discard_outputs(**options):
            for _ in range(3):
                loss = model_of_all(x, p).sum()
                torch.autograd.grad(loss, [x])
                assert settles_at(before + loss.nbytes)
                del loss
                # A graph without a backward pass.
                model_of_all(x, p)
                assert settles_at(before)
            # A chain of graphs that are cut by detach.
            h = x
            for _ in range(4):
                h = model_of_all(h, p).detach().requires_grad_()
            assert settles_at(before + h.nbytes)
    finally:
        gc.enable()


def settles_at(count: int) -> bool:
    """Whether soon exactly so many bytes are alive. Backward passes on a GPU run in another thread, which frees tensors
    later."""
    for _ in range(100):
        if live_bytes() == count:
            return True
        time.sleep(0.01)
    return False


def live_bytes() -> int:
    """The bytes of the storages of all tensors that are alive in Python, without those that torch.func has wrapped."""
    storages = {}
    for thing in gc.get_objects():
        if type(thing) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(thing):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def test_a_torch_that_hides_saved_tensors_of_nodes(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    p = Parameters()
    monkeypatch.setattr(nodes, "packed", lambda node, name: None)
    assert_unchanged(lambda: model_of_all(x, p), [x])
    call = recompute.discard_outputs()(lambda: TF.linear(normed(x).bfloat16(), p["a"].bfloat16()))
    assert kept_bytes(call) == UNIT + STATISTICS + p["a"].nbytes // 2


def test_results_of_parameters_alone_are_kept(x: Tensor) -> None:
    """A cast of a bias is smaller than the copy of the bias that a recipe would keep."""
    p = Parameters()
    call = lambda: x.bfloat16() * p["bias"].bfloat16()  # noqa: E731
    assert kept_bytes(recompute.discard_outputs()(call)) == kept_bytes(call)


def test_an_error_while_packing_leaves_nothing_behind(x: Tensor) -> None:
    """A checkpoint stops the recomputation by an exception from a pack hook."""
    fails = [False]

    def pack(tensor: Tensor) -> Tensor:
        if fails[0]:
            raise KeyError("stop")
        return tensor.detach()

    h = (x * 1).detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), recompute.discard_outputs():
        fails[0] = True
        with contextlib.suppress(KeyError):
            h.sigmoid()
        with contextlib.suppress(KeyError):
            F.glu(h, h)
        fails[0] = False
        y = (h.sin() * h.sigmoid()).tanh() * h
    expected = (h.sin() * h.sigmoid()).tanh() * h
    assert_same_bits(torch.autograd.grad(loss_of(y), [h]), torch.autograd.grad(loss_of(expected), [h]))

"""Discarding outputs, interrupted: a generator closed elsewhere, Ctrl-C at any step."""

import ctypes
import signal
import sys
import threading
import weakref
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as TF

from ckpt_kernels import functional as F
from ckpt_kernels import recompute
from ckpt_kernels.memory import saved_bytes

from .conftest import DEVICE
from .interrupts import interrupted_at_every_step
from .readers import (
    WIDTH,
    weights,  # noqa: F401, the fixture p
)


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


def test_an_interrupt_is_raised_while_a_recipe_is_released(p: dict) -> None:
    """C code sets the interrupt as tensors are freed, as a signal would; the first Python code after it raises."""
    interrupt = ctypes.PYFUNCTYPE(None, ctypes.py_object)(("PyErr_SetInterrupt", ctypes.pythonapi))

    class Trigger:
        pass

    x, trigger = torch.randn(8, WIDTH, device=DEVICE, requires_grad=True), Trigger()
    reference = weakref.ref(trigger, interrupt)
    swallowed: list[object] = []
    hook, sys.unraisablehook = sys.unraisablehook, swallowed.append
    # A process that was started in the background ignores interrupts.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with recompute.discard_outputs():
            y = F.layer_norm(x, WIDTH)
            # Lists free the last item first.
            held = [TF.linear(y, p["a"]), trigger]
            other = TF.linear(y, p["a"])
            del y, trigger
        with pytest.raises(KeyboardInterrupt):
            held.clear()
            [None for _ in range(2)]
    finally:
        signal.signal(signal.SIGINT, handler)
        sys.unraisablehook = hook
    assert reference() is None and not swallowed
    # The remaining reader still gets its tensor.
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


def test_hooks_that_are_closed_within_a_later_context() -> None:
    """Hooks opened in one layer and closed in another leave the stack of hooks as without contexts."""
    x = torch.ones(2, requires_grad=True)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with recompute.discard_outputs():
        with recompute.discard_outputs():
            hooks.__enter__()
        with recompute.discard_outputs():
            x.exp()
            hooks.__exit__()
    assert not recompute.is_active()
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def test_hooks_that_are_left_open_stay_the_innermost() -> None:
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with recompute.discard_outputs():
        hooks.__enter__()
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) == (hooks.pack_hook, hooks.unpack_hook)
    hooks.__exit__()
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    with recompute.discard_outputs():
        pass
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def test_several_hooks_that_are_left_open_keep_their_order() -> None:
    top = torch._C._autograd._top_saved_tensors_default_hooks
    first, second = (
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor) for _ in range(2)
    )
    with recompute.discard_outputs():
        first.__enter__()
        second.__enter__()
    for hooks in (second, first):
        assert top(True) == (hooks.pack_hook, hooks.unpack_hook)
        hooks.__exit__()
    assert top(True) is None


def test_the_end_of_a_context_removes_the_hooks_of_one_closed_in_another_thread() -> None:
    outer = recompute.discard_outputs()
    outer.__enter__()
    thread = threading.Thread(target=outer.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    with recompute.discard_outputs():
        pass
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def test_where_torch_allows_no_hooks_a_context_keeps_outputs() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    with torch.autograd.graph.disable_saved_tensors_hooks("no hooks here"), recompute.discard_outputs():
        assert not recompute.is_active()
        output = F.layer_norm(x, 8, activation="gelu")
    (found,) = torch.autograd.grad(output.sum(), x)
    (expected,) = torch.autograd.grad(F.layer_norm(x, 8, activation="gelu").sum(), x)
    assert torch.equal(found, expected)


def test_the_same_hooks_are_opened_again_within() -> None:
    top = torch._C._autograd._top_saved_tensors_default_hooks
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with hooks:
        with recompute.discard_outputs():
            hooks.__enter__()
        assert top(True) == (hooks.pack_hook, hooks.unpack_hook)
        hooks.__exit__()
        assert top(True) == (hooks.pack_hook, hooks.unpack_hook)
    assert top(True) is None


def test_hooks_that_are_left_open_within_others() -> None:
    top = torch._C._autograd._top_saved_tensors_default_hooks
    outer, inner = (
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor) for _ in range(2)
    )
    with outer:
        with recompute.discard_outputs():
            inner.__enter__()
        assert top(True) == (inner.pack_hook, inner.unpack_hook)
        inner.__exit__()
        with recompute.discard_outputs():
            pass
        assert top(True) == (outer.pack_hook, outer.unpack_hook)
    assert top(True) is None

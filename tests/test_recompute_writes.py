"""Discarding outputs with writes to a bias, a backward pass in inference mode, and many blocks."""

import contextlib
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor, nn

import ckpt_kernels
from ckpt_kernels import functional as F
from ckpt_kernels import recompute
from ckpt_kernels.memory import saved_bytes
from ckpt_kernels.recompute.active import discarding, thread
from ckpt_kernels.recompute.announcements import Announced
from ckpt_kernels.recompute.announcing import note
from ckpt_kernels.recompute.entries import Entries, Entry
from ckpt_kernels.recompute.layer_boundaries import LayerBoundaries
from ckpt_kernels.recompute.state import State

from .conftest import DEVICE

WIDTH = 32


class Shifted(nn.Module):
    """A bias that changes before the addition and changes back afterwards, as noise on weights does."""

    def __init__(self, write: Callable[[Tensor], None], unwrite: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.bias, self.linear = nn.Parameter(torch.randn(WIDTH)), nn.Linear(WIDTH, WIDTH)
        self.write, self.unwrite = write, unwrite

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.write(self.bias)
        y = F.layer_norm(x, WIDTH) + self.bias
        with torch.no_grad():
            self.unwrite(self.bias)
        return self.linear(y)


def test_recomputation_reads_the_bias_as_added() -> None:
    torch.manual_seed(0)
    module = Shifted(lambda bias: bias.add_(1), lambda bias: bias.sub_(1)).to(DEVICE)
    x = torch.randn(4, WIDTH, device=DEVICE, requires_grad=True)
    (expected,) = torch.autograd.grad(module(x).sin().sum(), module.linear.weight)
    (found,) = torch.autograd.grad(recompute.DiscardOutputs(module)(x).sin().sum(), module.linear.weight)
    assert torch.equal(found, expected)
    # Without a write, the context keeps a copy of the bias in place of the output.
    module.write = module.unwrite = lambda bias: None
    kept = [saved_bytes(call, x) for call in (module, recompute.DiscardOutputs(module))]
    assert kept[0] - kept[1] == x.nbytes - WIDTH * 4


def test_recomputation_does_not_read_other_data_of_the_bias() -> None:
    torch.manual_seed(0)
    module = Shifted(lambda bias: None, lambda bias: setattr(bias, "data", bias.data + 1)).to(DEVICE)
    x, start = torch.randn(4, WIDTH, device=DEVICE, requires_grad=True), module.bias.detach().clone()
    (expected,) = torch.autograd.grad(module(x).sin().sum(), module.linear.weight)
    module.bias.data = start
    (found,) = torch.autograd.grad(recompute.DiscardOutputs(module)(x).sin().sum(), module.linear.weight)
    assert torch.equal(found, expected)


def test_a_module_may_hold_a_sparse_vector() -> None:
    module = nn.Sequential(nn.Linear(WIDTH, WIDTH)).to(DEVICE)
    module.register_parameter("sparse", nn.Parameter(torch.ones(WIDTH).to_sparse()))
    x = torch.randn(4, WIDTH, device=DEVICE, requires_grad=True)
    assert torch.equal(recompute.DiscardOutputs(module)(x), module(x))


def test_a_view_taken_under_no_grad_is_kept() -> None:
    """Eager torch allows writes to what made the view: no gradient of the view goes there."""
    weight, scale = (torch.ones(WIDTH, device=DEVICE, requires_grad=True) for _ in range(2))
    x = torch.randn(4, WIDTH, device=DEVICE, requires_grad=True)
    with recompute.discard_outputs():
        output = F.layer_norm(x, WIDTH, weight)
        with torch.no_grad():
            row = output[0]
        product = row * scale
    expected = row.detach().clone()
    with torch.no_grad():
        weight.mul_(2)
    assert torch.equal(torch.autograd.grad(product.sum(), scale)[0], expected)


def test_a_backward_pass_in_inference_mode() -> None:
    weight = torch.ones(WIDTH, device=DEVICE, requires_grad=True)

    def gradients(around: contextlib.AbstractContextManager) -> Sequence[Tensor]:
        x = torch.ones(8, WIDTH, device=DEVICE, requires_grad=True)
        loss = TF.linear(F.layer_norm(x * 2, WIDTH, weight), torch.ones(3, WIDTH, device=DEVICE)).sin().sum()
        with around:
            return torch.autograd.grad(loss, [x, weight])

    expected = gradients(contextlib.nullcontext())
    with recompute.discard_outputs():
        found = gradients(torch.inference_mode())
    assert all(map(torch.equal, found, expected))


def test_entries_of_freed_outputs_are_removed() -> None:
    """The removals are rare enough that the time stays linear in the number of blocks."""
    weight = torch.ones(WIDTH, device=DEVICE, requires_grad=True)
    with recompute.discard_outputs():
        discarder = recompute.discarding()
        x = torch.ones(2, WIDTH, device=DEVICE, requires_grad=True)
        for _ in range(300):
            F.layer_norm(x, WIDTH, weight)
        assert len(discarder.all_entries) < 200


def test_a_sweep_removes_only_entries_of_freed_outputs() -> None:
    entries, live = Entries(), [torch.ones(1) for _ in range(64)]
    for output in live:
        entries.add(Entry(output, lambda: None))
    entries.add(Entry(torch.ones(1), lambda: None))
    entries.add(Entry(live[0], lambda: None))
    assert all(entries.of(output) is not None for output in live)


def test_a_written_boundary_is_no_boundary() -> None:
    boundaries, tensor = LayerBoundaries(), torch.ones(2)
    boundaries.add(tensor)
    assert boundaries.of(tensor) is not None
    tensor.add_(1)
    assert boundaries.of(tensor) is None


def test_boundaries_of_freed_tensors_are_removed() -> None:
    boundaries = LayerBoundaries()
    for _ in range(3):
        boundaries.add(torch.ones(2))
    assert len(boundaries) == 1


@pytest.mark.parametrize("level", ("block", "output", "all", "layer"))
@pytest.mark.parametrize("products", (False, True))
def test_another_level_holds_for_its_context_alone(products: bool, level: str) -> None:
    state = State(None, products, False)

    def options() -> tuple:
        return state.level, state.is_paused, state.is_in_layer, state.rules

    before = options()
    with pytest.raises(KeyError), state.at(level):
        assert state.level == level
        raise KeyError
    assert options() == before


def test_a_closed_context_holds_nothing() -> None:
    x = torch.ones(4, WIDTH, device=DEVICE, requires_grad=True)
    module = torch.nn.Linear(WIDTH, WIDTH, device=DEVICE)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t), recompute.discard_outputs(module):
        discarder = thread.active[-1]
        h = F.layer_norm(x, WIDTH)
        total = h + x[:1]
        note(total, h, x[:1])
        _, small = total.grad_fn.metadata["ckpt_kernels"]
        discarder.boundaries.add(h)
        discarder.announced = Announced(None, False, None)
        assert discarder.outer is not None and len(discarder.all_entries) and discarder.boundaries
        assert small.tensor is not None and discarder.biases.is_unchanged(module.bias)
    assert discarder.outer is discarder.announced is small.tensor is None
    assert not len(discarder.all_entries) and not discarder.boundaries
    assert not discarder.biases.is_unchanged(module.bias)


def test_a_context_around_foreign_hooks_does_not_see_tensors() -> None:
    with recompute.discard_outputs():
        assert discarding() is not None
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            assert discarding() is None
        assert discarding() is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("written", ["input", "output"])
def test_writes_around_the_activation_of_a_float32_copy(dtype: torch.dtype, written: str) -> None:
    """An error, as in eager torch, or the gradient for the values before the write."""

    class Written(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            h = x.float()
            y = TF.relu(h) if written == "output" else TF.gelu(h)
            (y if written == "output" else h).mul_(-3)
            return y + h

    x = torch.linspace(-2, 2, 4096).to(dtype).requires_grad_()
    gelu_of = torch.autograd.grad(TF.gelu(x.float()).sum(), x)[0] + torch.tensor(-3.0)
    for level in ("block", "output"):
        model = nn.Sequential(Written())
        ckpt_kernels.convert(model, recompute=level)
        y = model(x)
        try:
            (found,) = torch.autograd.grad(y.sum(), x)
        except RuntimeError as error:
            assert "modified by an in-place operation" in str(error) or "inplace operation" in str(error)
        else:
            assert written == "input" and dtype is torch.bfloat16
            torch.testing.assert_close(found, gelu_of.to(dtype), rtol=0.02, atol=0.02)

"""Float32 copies of 16-bit tensors, whose values are kept in 16 bits."""

import contextlib
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ckpt_kernels
from ckpt_kernels import recompute

from .conversion import WIDTH, close, equal, kept, random_tensor, results_of, twins
from .discarded_outputs import assert_unchanged, kept_bytes, loss_of

ROWS, DTYPES = 64, (torch.bfloat16, torch.float16)
HALF, WHOLE = ROWS * WIDTH * 2, ROWS * WIDTH * 4


def narrow_input(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return random_tensor(ROWS, WIDTH, dtype=dtype).requires_grad_()


def waves(x: Tensor) -> Tensor:
    """Saves a float32 copy three times, once as a view."""
    wide = (x * 1).float()
    return wide.cos() + wide.sin() + wide.view(WIDTH, ROWS).erf().view(ROWS, WIDTH)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_readers_share_one_copy_in_16_bits(dtype: torch.dtype) -> None:
    x = narrow_input(dtype)
    assert kept_bytes(recompute.discard_outputs()(lambda: waves(x))) == HALF
    assert kept_bytes(lambda: waves(x)) == WHOLE
    assert_unchanged(lambda: waves(x), [x])


def test_a_graph_runs_twice_and_has_second_gradients() -> None:
    x = narrow_input()
    with recompute.discard_outputs():
        y = waves(x)
    first, second = (torch.autograd.grad(loss_of(y), x, retain_graph=True) for _ in range(2))
    assert torch.equal(first[0], second[0])
    seconds = []
    for context in (contextlib.nullcontext(), recompute.discard_outputs()):
        with context:
            y = waves(x)
        (grad,) = torch.autograd.grad(loss_of(y), x, create_graph=True)
        seconds.append(torch.autograd.grad(grad.float().square().sum(), x)[0])
    assert torch.equal(*seconds) and seconds[0].any()


@pytest.mark.parametrize("is_seen", (True, False))
def test_a_copy_that_was_written_to_is_kept(is_seen: bool) -> None:
    x = narrow_input()

    def written() -> Tensor:
        wide = (x * 1).float()
        with contextlib.nullcontext() if is_seen else torch.no_grad():
            wide += 1e-4
        return wide.cos()

    assert kept_bytes(recompute.discard_outputs()(written)) == WHOLE
    assert_unchanged(written, [x])


@pytest.mark.parametrize("compute", (lambda x: (x * 1).double().cos(), lambda x: (x * 1).float()[:2].clone().cos()))
def test_other_tensors_are_kept_as_they_are(compute: Callable[[Tensor], Tensor]) -> None:
    x = narrow_input()
    assert kept_bytes(recompute.discard_outputs()(lambda: compute(x))) == kept_bytes(lambda: compute(x))
    assert_unchanged(lambda: compute(x), [x])


class Island(nn.Module):
    """An activation in float32 within a 16-bit model."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(TF.gelu(self.first(x).float()).to(x.dtype))


class OfModules(Island):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        wide = self.act(self.first(x).to(torch.float32))
        return self.last(wide.to(x.dtype))


# The tensors that are kept at each level: the input, the activation's input, and its output.
FLOORS = {"block": 3, "output": 2, "all": 1, "layer": 1}


@pytest.mark.parametrize("kind", (Island, OfModules))
@pytest.mark.parametrize("level", FLOORS)
def test_activations_of_float32_copies_keep_16_bits(kind: type[Island], level: str) -> None:
    model, twin = twins(lambda: kind().bfloat16())
    ckpt_kernels.convert(model, recompute=level)
    x = narrow_input()
    biases = 2 * WIDTH * (level in ("all", "layer"))
    assert kept(model, x) <= FLOORS[level] * HALF + biases < kept(twin, x)
    ours, theirs = results_of(model, x), results_of(twin, x)
    assert ours["output"].dtype == torch.bfloat16 and close(ours, theirs, 0.02)
    if level != "block":
        ckpt_kernels.revert(model)
        ckpt_kernels.convert(model, recompute="block")
        assert equal(results_of(model, x), ours)


def test_hooks_around_the_model_get_the_16_bits() -> None:
    model, twin = twins(lambda: Island().bfloat16())
    ckpt_kernels.convert(model, recompute="block")
    x = narrow_input()
    with torch.autograd.graph.save_on_cpu():
        assert close(results_of(model, x), results_of(twin, x), 0.02)
    (ours,) = torch.autograd.grad(loss_of(checkpoint(model, x, use_reentrant=False)), x)
    (theirs,) = torch.autograd.grad(loss_of(model(x)), x)
    assert torch.equal(ours, theirs)


class NarrowAdapter(nn.Module):
    """A frozen 16-bit layer with a float32 adapter, as PEFT makes."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH, bias=False).bfloat16().requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result = self.base(x)
        result = result + self.up(self.down(x.to(torch.float32))) * 2.0
        return result.to(x.dtype)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH).bfloat16()
        self.gate, self.value, self.last = (NarrowAdapter() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.last(TF.silu(self.gate(x)) * self.value(x))


def test_products_with_float32_adapters_run_again() -> None:
    _, twin = twins(Gated)
    x = narrow_input()
    sizes = {}
    for level in ("output", "all"):
        model, _ = twins(Gated)
        ckpt_kernels.convert(model, recompute=level)
        assert close(results_of(model, x), results_of(twin, x), 0.02)
        sizes[level] = kept(model, x)
    # At "all" the outputs of gate and value are not kept, but copies of the biases and of the adapters' narrow rows.
    assert sizes["all"] <= sizes["output"] - 2 * HALF + 2 * 2 * WIDTH


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


class Attention(nn.Module):
    """Attention that norms queries and keys, and rotates them by tables of a given dtype."""

    def __init__(self, tables: torch.dtype) -> None:
        super().__init__()
        self.tables = tables
        self.project = nn.Linear(WIDTH, 3 * WIDTH)
        self.norm = nn.LayerNorm(WIDTH // 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).view(1, ROWS, 3, 2, WIDTH // 2).transpose(1, 3).unbind(2)
        angles = torch.arange(ROWS * WIDTH // 2, device=x.device).view(ROWS, -1) / ROWS
        cos, sin = angles.cos().to(self.tables), angles.sin().to(self.tables)
        q, k = turn(self.norm(q), self.norm(k), cos, sin)
        return TF.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v).transpose(1, 2).flatten(-2)


@pytest.mark.parametrize("level", ("output", "layer"))
def test_rotations_by_float32_tables_keep_what_narrow_tables_keep(level: str) -> None:
    x, sizes = narrow_input(), []
    for tables in (torch.bfloat16, torch.float32):
        model, twin = twins(lambda tables=tables: Attention(tables).bfloat16())
        ckpt_kernels.convert(model, recompute=level)
        assert close(results_of(model, x), results_of(twin, x), 0.03)
        sizes.append(kept(model, x))
    # Twice the bytes of the tables.
    assert sizes[1] <= sizes[0] + HALF


def test_without_gradients_a_written_view_of_several_is_read_as_in_torch() -> None:
    model, twin = twins(lambda: nn.Sequential(nn.GELU()))
    ckpt_kernels.convert(model)
    _, half = (random_tensor(ROWS, WIDTH).requires_grad_() * 1).chunk(2, -1)
    with torch.no_grad():
        half.view(half.shape).add_(1)
        torch.testing.assert_close(model(half), twin(half))


def test_hooks_around_a_context_of_narrow_copies_pack_them() -> None:
    x = narrow_input()
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor.detach().clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: 2 * tensor), recompute.keeping_narrow():
        result = x.float().square()
    assert [each.dtype for each in packed] == [x.dtype]
    # The hooks give back twice the values.
    torch.testing.assert_close(*torch.autograd.grad(result.sum(), x), 4 * x)


def test_a_context_of_narrow_copies_keeps_no_result_alive() -> None:
    x = random_tensor(ROWS, WIDTH).requires_grad_()
    with recompute.keeping_narrow():
        # The node saves the result.
        result = x.exp()
    reference = weakref.ref(result)
    del result
    gc.collect()
    assert reference() is None

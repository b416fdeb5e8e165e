"""MLPs in tiles of rows: the same results, less memory, and one gradient a parameter."""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import ckpt_kernels
from ckpt_kernels import functional as F
from ckpt_kernels.catalogue.linear import PAIRS, Pair
from ckpt_kernels.memory import peak_bytes, saved_bytes
from ckpt_kernels.ops import accumulate

from .conftest import DEVICE, DTYPES
from .test_linear import products

LEVELS = ("output", "all")
MLPS = [pair for pair in PAIRS if "mlp" in pair.name]
by_mlp = pytest.mark.parametrize("pair", MLPS, ids=lambda pair: pair.name)


def in_tiles(pair: Pair, level: str, tiles: int) -> Callable[..., tuple[Tensor, ...]]:
    def call(**operands: Tensor) -> tuple[Tensor, ...]:
        with ckpt_kernels.ops.tiles.in_tiles(tiles):
            return pair.at(level)(**operands)

    return call


def with_gradients(function: Callable[..., tuple[Tensor, ...]], operands: dict) -> dict[str, Tensor]:
    leaves = {n: t.detach().clone().requires_grad_() for n, t in operands.items() if isinstance(t, Tensor)}
    (output,) = function(**(operands | leaves))
    grad_output = torch.linspace(-1, 1, output.numel(), dtype=torch.float64, device=DEVICE).to(output.dtype)
    gradients = torch.autograd.grad(output, list(leaves.values()), grad_output.view_as(output))
    return {"output": output.detach(), **dict(zip(leaves, gradients, strict=True))}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@by_mlp
def test_error_is_at_most_eagers(pair: Pair, dtype: torch.dtype, level: str) -> None:
    operands = pair.operands((2, 9), 24, dtype, DEVICE)
    wide = {n: t.double() if isinstance(t, Tensor) else t for n, t in operands.items()}
    found, eager = with_gradients(in_tiles(pair, level, 4), operands), with_gradients(pair.eager, operands)
    truth = with_gradients(pair.eager, wide)
    for name, true in truth.items():
        assert found[name].dtype == eager[name].dtype and found[name].shape == eager[name].shape
        error, allowed = ((t[name].double() - true).abs().max() for t in (found, eager))
        ulps = 16 if dtype == torch.float64 else 1  # in float64 the truth is eager torch's result
        assert error <= 1.5 * allowed + ulps * torch.finfo(dtype).eps * true.abs().max(), name


@by_mlp
def test_many_tiles_in_bfloat16_accumulate_in_float32(pair: Pair) -> None:
    operands = pair.operands((1024,), 8, torch.bfloat16, DEVICE)
    wide = {n: t.double() if isinstance(t, Tensor) else t for n, t in operands.items()}
    found, eager = with_gradients(in_tiles(pair, "all", 128), operands), with_gradients(pair.eager, operands)
    for name, true in with_gradients(pair.eager, wide).items():
        error, allowed = ((t[name].double() - true).abs().max() for t in (found, eager))
        assert error <= 1.5 * allowed + torch.finfo(torch.bfloat16).eps * true.abs().max(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_in_16_bits_are_accumulated_without_rounding(dtype: torch.dtype) -> None:
    grad, input = (torch.randn(32, columns, device=DEVICE).to(dtype) for columns in (5, 7))
    buffer = accumulate.buffer_for(grad.new_empty(5, 7), dtype)
    for _ in range(2):
        accumulate.add_product(buffer, grad, input)
    torch.testing.assert_close(buffer.double(), 2 * grad.double().t() @ input.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lead", [(), (1,), (3,), (0,), (2, 0)], ids=str)
@by_mlp
def test_more_tiles_than_rows(pair: Pair, lead: tuple) -> None:
    operands = pair.operands(lead, 8, torch.float32, DEVICE)
    found, whole = (with_gradients(f, operands) for f in (in_tiles(pair, "all", 5), pair.at("all")))
    for name, value in whole.items():
        torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize("function,usual", [("mlp (gelu)", 6), ("gated_mlp (silu)", 9)])
def test_all_runs_one_product_less_than_checkpointing(function: str, usual: int) -> None:
    (pair,) = [pair for pair in MLPS if pair.name == function]
    operands = pair.operands((8,), 8, torch.float32, DEVICE)
    for level, expected in (("output", usual * 4), ("all", (usual + usual // 3 - 1) * 4)):
        # At "output" the first products run untiled.
        expected -= (usual // 3 - 1) * 3 if level == "output" else 0
        assert products(lambda level=level: in_tiles(pair, level, 4)(**operands)[0].sum().backward()) == expected


@by_mlp
def test_tiles_keep_the_same_tensors(pair: Pair) -> None:
    operands = pair.operands((8,), 8, torch.float32, DEVICE)
    for level in ("block", *LEVELS):  # "block" ignores tiles
        whole, tiled = (saved_bytes(lambda f=f: f(**operands)) for f in (pair.at(level), in_tiles(pair, level, 4)))
        assert tiled == whole


@pytest.mark.parametrize("name", ["mlp (gelu)", "gated_mlp (silu)"])
def test_temporary_memory_shrinks_with_the_number_of_tiles(name: str) -> None:
    (pair,) = [pair for pair in MLPS if pair.name == name]
    operands = pair.operands((4096,), 8, torch.float32, DEVICE)
    x = operands["input"]
    inner = 4096 * 4 * 8 * 4  # one tensor of the inner width

    def step(tiles: int) -> None:
        in_tiles(pair, "all", tiles)(**operands)[0].sum().backward()

    def transient(tiles: int) -> float:
        """Temporary memory in units of an inner tensor, without the output and the gradients of input and output."""
        for tensor in operands.values():
            if isinstance(tensor, Tensor):
                tensor.grad = None
        return (peak_bytes(lambda: step(tiles), DEVICE) - 3 * x.nbytes) / inner

    whole = transient(1)
    assert whole > 2.5
    assert transient(8) < whole / 8 + 0.15
    with torch.no_grad():
        forward = [peak_bytes(lambda n=n: in_tiles(pair, "all", n)(**operands), DEVICE) - x.nbytes for n in (1, 8)]
    assert forward[1] < forward[0] / 8 + 0.15 * inner


def test_parameters_accumulate_one_gradient_a_pass() -> None:
    torch.manual_seed(0)
    mlp = ckpt_kernels.nn.GatedMLP(8, 24, recompute="all", tiles=4).to(DEVICE)
    twin = copy.deepcopy(mlp)
    twin.tiles = 1
    counts: list[str] = []
    for name, parameter in mlp.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: counts.append(name))
    for seed in range(2):  # gradients accumulate over two batches
        x = torch.randn(10, 8, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        for module in (mlp, twin):
            module(x).square().sum().backward()
    assert sorted(counts) == sorted(2 * [name for name, _ in mlp.named_parameters()])
    for mine, theirs in zip(mlp.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize(
    "frozen", [("weight1",), ("weight2", "bias2"), ("input",), ("input", "weight1"), ("input", "weight1", "bias1")]
)
def test_frozen_operands(frozen: tuple) -> None:
    (pair,) = [pair for pair in MLPS if pair.name == "mlp (gelu)"]
    operands = pair.operands((9,), 8, torch.float32, DEVICE)
    leaves = [
        t for n, t in operands.items() if isinstance(t, Tensor) and t.requires_grad_(n not in frozen).requires_grad
    ]
    found, whole = (
        torch.autograd.grad(f(**operands)[0].square().sum(), leaves) for f in (in_tiles(pair, "all", 4), pair.eager)
    )
    for mine, theirs in zip(found, whole, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_second_derivatives_dropout_and_autocast() -> None:
    shapes = [(5, 4), (6, 4), (6,), (3, 6), (3,)]
    x, *weights = (torch.randn(s, dtype=torch.float64, device=DEVICE, requires_grad=True) for s in shapes)

    def seeded(*tensors: Tensor) -> Tensor:
        torch.manual_seed(3)
        return F.mlp(*tensors, dropout_p=0.4, recompute="all", tiles=2)

    assert torch.autograd.gradcheck(seeded, (x, *weights))
    assert torch.autograd.gradgradcheck(seeded, (x, *weights))
    single = [t.detach().float().requires_grad_() for t in (x, *weights)]
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        outputs = [F.mlp(*single, recompute="all", tiles=n) for n in (1, 2)]
    torch.testing.assert_close(outputs[1], outputs[0])
    gradients = [torch.autograd.grad(output.sum(), single) for output in outputs]
    for mine, theirs in zip(*reversed(gradients), strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)


def test_each_tile_draws_another_dropout_mask() -> None:
    eye = torch.eye(16, device=DEVICE)
    x, options = torch.ones(8, 16, device=DEVICE), dict(activation="relu", dropout_p=0.5, tiles=4)
    for output in (F.mlp(x, eye, None, eye, None, **options), F.gated_mlp(x, eye, eye, eye, **options)):
        assert len({tuple(row.tolist()) for row in output}) == 8
    state = torch.get_rng_state()
    F.mlp(x, eye, None, eye, None, training=False, **options)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_norm_after_a_tiled_mlp_keeps_no_input_within_a_layer() -> None:
    x, weight = torch.randn(64, 8, device=DEVICE, requires_grad=True), torch.randn(8, 8, device=DEVICE)

    def layer(x: Tensor, tiles: int) -> Tensor:
        return F.layer_norm(F.mlp(x, weight, None, weight, None, recompute="all", tiles=tiles), (8,))

    kept = [saved_bytes(lambda n=n: ckpt_kernels.recompute.layer(layer)(x, n)) for n in (1, 2)]
    assert kept[1] == kept[0]


def test_torch_func_grad_equals_untiled() -> None:
    x, weight = torch.randn(6, 8, device=DEVICE), torch.randn(8, 8, device=DEVICE)
    whole, tiled = (
        torch.func.grad(lambda x, n=n: F.mlp(x, weight, None, weight, None, tiles=n).sum())(x) for n in (1, 3)
    )
    torch.testing.assert_close(tiled, whole)


def test_the_context_is_thread_local_and_ends_on_errors() -> None:
    with pytest.raises(KeyError), ckpt_kernels.ops.tiles.in_tiles(3), ThreadPoolExecutor(1) as others:
        assert others.submit(ckpt_kernels.ops.tiles.tiles_now).result() == 1
        raise KeyError
    assert ckpt_kernels.ops.tiles.tiles_now() == 1


def test_torch_compile_equals_untiled() -> None:
    x, weight, last = (
        torch.randn(6, 4, device=DEVICE),
        torch.randn(8, 4, device=DEVICE),
        torch.randn(4, 8, device=DEVICE),
    )
    call = torch.compile(lambda x: F.mlp(x, weight, None, last, None, tiles=3), fullgraph=True, backend="eager")
    torch.testing.assert_close(call(x), F.mlp(x, weight, None, last, None))


@pytest.mark.parametrize("level", ["output", "all", "layer"])
def test_converted_models_in_tiles(level: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaModel(config).to(DEVICE)
    whole, tiled = copy.deepcopy(model), copy.deepcopy(model)
    ckpt_kernels.convert(whole, recompute=level)
    ckpt_kernels.convert(tiled, recompute=level, tiles=4)
    ids = torch.randint(32, (1, 512), device=DEVICE)

    def step(model: torch.nn.Module) -> None:
        model(input_ids=ids).last_hidden_state.square().mean().backward()

    peaks = []
    for module in (model, whole, tiled):
        step(module)
    for module in (whole, tiled):
        peaks.append(peak_bytes(lambda module=module: step(module), DEVICE))
        for mine, theirs in zip(module.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(mine.grad / 2, theirs.grad, rtol=1e-3, atol=1e-6)
    assert peaks[1] < peaks[0]
    assert saved_bytes(lambda: tiled(ids)) <= saved_bytes(lambda: whole(ids))
    copy.deepcopy(tiled)(ids)
    assert products(lambda: step(tiled)) > products(lambda: step(whole))


@pytest.mark.parametrize("tiles", [0, -1, 1.5, True])
def test_bad_numbers_of_tiles_are_an_error(tiles: object) -> None:
    x = torch.randn(4, 4, device=DEVICE)
    for call in (
        lambda: F.mlp(x, x, None, x, None, tiles=tiles),
        lambda: F.gated_mlp(x, x, x, x, tiles=tiles),
        lambda: ckpt_kernels.nn.MLP(4, 4, tiles=tiles),
        lambda: ckpt_kernels.nn.GatedMLP(4, 4, tiles=tiles),
        lambda: ckpt_kernels.convert(torch.nn.GELU(), tiles=tiles),
    ):
        with pytest.raises(ValueError, match=r"tiles is .*; expected a positive whole number"):
            call()
    with pytest.raises(ValueError, match="tiles is 2 and recompute is 'block'"):
        F.mlp(x, x, None, x, None, tiles=2, recompute="block")
    # Integers of other types are whole numbers.
    assert F.mlp(x, x, None, x, None, tiles=torch.tensor(2)).shape == x.shape


class Part(torch.nn.Module):
    """A layer that checkpoints a method that is no forward, and an MLP of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(8, 32), torch.nn.Linear(32, 8)
        self.own = ckpt_kernels.nn.MLP(8, 32, recompute="output")

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(TF.gelu(self.up(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = x + checkpoint(self.mlp, x, use_reentrant=False)
        return x + checkpoint(lambda x: self.own(x), x, use_reentrant=False)


@pytest.mark.parametrize("level", ["output", "all", "layer"])
def test_a_part_that_the_model_checkpoints_itself(level: str) -> None:
    model, x = torch.nn.Sequential(Part(), Part()).to(DEVICE), torch.randn(6, 8, device=DEVICE)
    tiled = copy.deepcopy(model)
    ckpt_kernels.convert(tiled, recompute=level, tiles=3)
    for module in (model, tiled):
        module(x).square().sum().backward()
    for mine, theirs in zip(tiled.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    # Outside of the model's forward, as in the second pass of the checkpoint, the method computes in tiles too.
    assert products(lambda: tiled[0].mlp(x)) > products(lambda: model[0].mlp(x))


@pytest.mark.parametrize("kind", (ckpt_kernels.nn.MLP, ckpt_kernels.nn.GatedMLP))
def test_a_module_with_tiles_is_exported_for_all_numbers_of_rows(kind: type[torch.nn.Module]) -> None:
    module = kind(16, 32, recompute="all", tiles=3).to(DEVICE)
    batch = torch.export.Dim("batch")
    exported = torch.export.export(module, (torch.randn(4, 16, device=DEVICE),), dynamic_shapes=({0: batch},))
    x = torch.randn(9, 16, device=DEVICE)
    torch.testing.assert_close(exported.module()(x), module(x))

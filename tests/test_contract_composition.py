"""Blocks with torch's transforms, compile, export, checkpoint, autocast, copies, and state dicts."""

import copy
import inspect
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from ckpt_kernels import functional, nn, ops
from ckpt_kernels.backends.blocks import RowNormOptions
from ckpt_kernels.catalogue.block import Block
from ckpt_kernels.catalogue.blocks import BLOCKS
from ckpt_kernels.catalogue.linear import PAIRS
from ckpt_kernels.ops.map_norm import MapNormOptions

from .blocks import by_block, with_gradients
from .conftest import DEVICE, interprets, serving, where


@by_block
def test_gradcheck_and_double_backward(block: Block) -> None:
    operands = block.operands((2, 3), 5, torch.float64, DEVICE)
    names = list(operands)

    def fn(*tensors):
        return tuple(block.call(**dict(zip(names, tensors, strict=True))))

    assert torch.autograd.gradcheck(fn, tuple(operands.values()))
    if not block.options.get("cast_before_weight"):
        assert torch.autograd.gradgradcheck(fn, tuple(operands.values()))


@by_block
def test_third_derivatives(block: Block) -> None:
    """Compared with finite differences of the second derivatives, because the third derivatives of torch's layer_norm
    and batch_norm lack a term."""
    operands = block.operands((2, 3), 5, torch.float64, DEVICE)
    names = list(operands)

    def second(*tensors):
        outputs = block.call(**dict(zip(names, tensors, strict=True)))
        sources = [tensor for tensor in tensors if tensor.requires_grad]
        for _ in range(2):
            loss = sum(output.sin().sum() for output in outputs)
            outputs = torch.autograd.grad(loss, sources, create_graph=True)
        return outputs

    if not block.options.get("cast_before_weight"):
        assert torch.autograd.gradcheck(second, tuple(operands.values()), fast_mode=True)


@by_block
def test_torch_compile_gives_the_same_numbers_without_a_graph_break(block: Block) -> None:
    operands = block.operands((2, 6), 32, torch.float32, DEVICE)
    torch._dynamo.reset()
    compiled = torch.compile(block.call, fullgraph=True, backend="aot_eager")
    eager, ours = with_gradients(block.call, operands), with_gradients(compiled, operands)
    for name in eager:
        assert torch.equal(eager[name], ours[name]), name


@by_block
def test_torch_utils_checkpoint_around_it(block: Block) -> None:
    operands = block.operands((2, 6), 32, torch.float32, DEVICE)

    def checkpointed(**tensors):
        return checkpoint(lambda: tuple(block.call(**tensors)), use_reentrant=False)

    eager, ours = with_gradients(block.call, operands), with_gradients(checkpointed, operands)
    for name in eager:
        assert torch.equal(eager[name], ours[name]), name


@by_block
def test_bitwise_the_same_from_run_to_run(block: Block, backend: str) -> None:
    # Rows for two programs are enough where kernels are interpreted.
    operands = block.operands((2, 20 if interprets(backend) else 50), 64, torch.float32, DEVICE)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = with_gradients(block.call, operands), with_gradients(block.call, operands)
    finally:
        torch.use_deterministic_algorithms(False)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("threads", [1, 2, 5])
@by_block
def test_bitwise_the_same_for_any_number_of_threads(block: Block, threads: int) -> None:
    operands = block.operands((2, 600), 64, torch.float32, DEVICE)
    expected = with_gradients(block.call, operands)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = with_gradients(block.call, operands)
    finally:
        torch.set_num_threads(before)
    for name in expected:
        assert torch.equal(expected[name], found[name]), name


# Channel norms have statistics of several rows, and torch's functions, which the reference uses, round differently at
# the end of a tensor.
@where(lambda block, backend: not block.channels and backend != "reference")
@by_block
def test_a_row_does_not_depend_on_its_neighbours(block: Block, backend: str) -> None:
    operands = block.operands((2, 21), 48, torch.float32, DEVICE)
    alone = {name: t[:, 5:6] if name in block.rows else t for name, t in operands.items()}
    alone |= {name: operands[name][5:6] for name in block.tables}
    for whole, part in zip(block.call(**operands), block.call(**alone), strict=True):
        assert torch.equal(whole[:, 5:6], part)


@by_block
def test_operands_and_gradients_are_not_written_to(block: Block, backend: str) -> None:
    operands = block.operands((2, 5), 48, torch.float32, DEVICE)
    copies = {name: t.detach().clone() for name, t in operands.items()}
    outputs = block.call(**operands)
    incoming = [torch.ones_like(y) for y in outputs]
    torch.autograd.grad(outputs, [t for t in operands.values() if t.requires_grad], incoming)
    for name, tensor in operands.items():
        assert torch.equal(tensor, copies[name]), name
    assert all((g == 1).all() for g in incoming)


@by_block
def test_one_process_uses_every_backend_in_turn(block: Block) -> None:
    if DEVICE != "cpu":
        pytest.skip("the host backend needs CPU tensors")
    operands = block.operands((2, 9), 64, torch.float32, DEVICE)
    found = {}
    for name in ("reference", "native", "triton", "cuda_on_host", "native"):
        with serving(name):
            found[name] = with_gradients(block.call, operands)
    for name, results in found.items():
        for key, value in results.items():
            torch.testing.assert_close(value, found["reference"][key], rtol=2e-5, atol=2e-5, msg=f"{name} {key}")


def op_arguments() -> dict[str, tuple]:
    """The arguments of each op; a name may have a variant after a comma."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE).requires_grad_()

    def none(count: int) -> tuple[None, ...]:
        return (None,) * count

    x, y, w, b = random(3, 4, 8), random(3, 4, 8), random(8), random(8)
    seed = torch.tensor([7], device=DEVICE)
    return {
        "row_norm": (x, *none(4), w, b, None, *RowNormOptions(8, 1e-5, True, "silu", "gelu")),
        "row_norm, modulated": (
            *(x, None, None, random(3, 8), random(3, 8), w, b, None),
            *RowNormOptions(8, 1e-5, True, activation="silu"),
        ),
        "row_norm, residual": (
            *(x, y, *none(3), w, None, seed),
            *RowNormOptions(8, 1e-5, False, activation="silu", dropout_p=0.25),
        ),
        "row_norm, gate": (
            *(x, None, y, None, None, w, None, None),
            *RowNormOptions(8, 1e-5, False, activation="silu", gate_before_norm=True),
        ),
        "glu": (x, y, *ops.glu.Options("silu")),
        "packed_glu": (x, *ops.glu.PackedOptions("gelu", "interleaved")),
        "bias_act": (x, w, seed, "silu", 0.25),
        "dyt": (x, random(1), w, b),
        "channel_norm": (x, y, random(4), random(4), None, None, 2, 1e-5, "silu"),
        "map_norm": (x, random(4), random(4), *MapNormOptions(1e-5, True, "silu", 0.0, False, True)),
        "map_norm, rms": (x, random(4), None, *MapNormOptions(1e-5, False, "silu", 0.0, False, False)),
    }


FORWARD_OPS = {
    name
    for family in (ops.row_norm, ops.glu, ops.bias_act, ops.dyt, ops.channel_norm, ops.map_norm)
    for name, value in vars(family).items()
    if isinstance(value, ops.block.Block)
}


@pytest.mark.parametrize("name", op_arguments())
def test_opcheck(name: str) -> None:
    op = getattr(torch.ops.ckpt_kernels, name.partition(",")[0]).default
    torch.library.opcheck(op, op_arguments()[name])


def test_every_op_is_checked() -> None:
    assert {name.partition(",")[0] for name in op_arguments()} == FORWARD_OPS


def test_torch_export() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(16, activation="gelu")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x)

    model, x = Model().to(DEVICE), torch.randn(4, 16, device=DEVICE)
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), model(x))


def test_torch_func_grad() -> None:
    x = torch.randn(4, 16, device=DEVICE)
    found = torch.func.grad(lambda t: functional.layer_norm(t, 16, activation="silu").square().sum())(x)
    leaf = x.clone().requires_grad_()
    functional.layer_norm(leaf, 16, activation="silu").square().sum().backward()
    torch.testing.assert_close(found, leaf.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_under_autocast_are_torchs(dtype: torch.dtype) -> None:
    x = torch.randn(4, 16, device=DEVICE)
    for input in (x, x.to(dtype)):
        with torch.autocast(DEVICE, dtype):
            ours = functional.layer_norm(input, 16, activation="relu")
            theirs = torch.nn.functional.layer_norm(input, (16,))
        assert ours.dtype == theirs.dtype


MIXED_OPERANDS = {
    "residual": lambda a, b, w: functional.add_layer_norm(a, b, 16, w),
    "gate": lambda a, b, w: functional.gated_rms_norm(a, b, 16, w),
    "value": lambda a, b, w: functional.glu(a, b),
    "added": lambda a, b, w: functional.batch_norm(a, None, None, w, None, True, activation="relu", residual=b),
}


@pytest.mark.parametrize("name", MIXED_OPERANDS)
def test_operands_of_mixed_dtypes_under_autocast(name: str) -> None:
    """A product in bfloat16 and a residual in float32 are accepted under autocast, and are an error without."""
    a, b = torch.randn(4, 16, device=DEVICE).bfloat16(), torch.randn(4, 16, device=DEVICE)
    w = torch.ones(16, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = MIXED_OPERANDS[name](a, b, w)
    expected = MIXED_OPERANDS[name](a.float(), b, w)
    for y, e in zip(*((t if isinstance(t, tuple) else (t,)) for t in (found, expected)), strict=True):
        assert y.dtype == torch.float32 and torch.equal(y, e)
    with pytest.raises(RuntimeError, match="has dtype"):
        MIXED_OPERANDS[name](a, b, w)


MODULES = [
    (nn.LayerNorm(16, activation="silu"), torch.nn.LayerNorm(16)),
    (nn.RMSNorm(16, activation="gelu"), torch.nn.RMSNorm(16)),
    (nn.AddLayerNorm(16, dropout=0.1), torch.nn.LayerNorm(16)),
    (nn.AddRMSNorm(16, dropout=0.1), torch.nn.RMSNorm(16)),
    (nn.GatedRMSNorm(16), torch.nn.RMSNorm(16)),
    (nn.ModulatedLayerNorm(16), torch.nn.LayerNorm(16)),
    (nn.ModulatedRMSNorm(16), torch.nn.RMSNorm(16)),
    (nn.GLU(), torch.nn.GLU()),
    (nn.BiasAct(16, activation="gelu"), nn.BiasAct(16)),
    (nn.DyT(16, alpha_init=0.8), nn.DyT(16)),
    (nn.BatchNorm1d(16, activation="relu"), torch.nn.BatchNorm1d(16)),
    (nn.BatchNorm2d(16, activation="relu"), torch.nn.BatchNorm2d(16)),
    (nn.BatchNorm3d(16, activation="relu"), torch.nn.BatchNorm3d(16)),
    (nn.SyncBatchNorm(16, activation="relu"), torch.nn.SyncBatchNorm(16)),
    (nn.GroupNorm(4, 16, activation="silu"), torch.nn.GroupNorm(4, 16)),
    (nn.InstanceNorm1d(16, affine=True, activation="silu"), torch.nn.InstanceNorm1d(16, affine=True)),
    (nn.InstanceNorm2d(16, affine=True, activation="silu"), torch.nn.InstanceNorm2d(16, affine=True)),
    (nn.InstanceNorm3d(16, track_running_stats=True), torch.nn.InstanceNorm3d(16, track_running_stats=True)),
]


@pytest.mark.parametrize("ours,theirs", MODULES, ids=lambda module: type(module).__name__)
def test_state_dict_both_ways_deepcopy_and_pickle(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert repr(copied) == repr(ours)
        for key, value in ours.state_dict().items():
            assert torch.equal(copied.state_dict()[key], value)


def test_every_function_is_covered() -> None:
    """A function without an entry in the catalogue fails here. `rotary_qk` calls rotary twice, and
    `linear_cross_entropy`, whose targets are no operand of a block, has its own tests."""
    public = {name for name, value in vars(functional).items() if inspect.isfunction(value)}
    assert public == set(functional.__all__)
    assert public == {block.function for block in BLOCKS} | {pair.function for pair in PAIRS} | {
        "rotary_qk",
        "linear_cross_entropy",
    }

"""Blocks with linear layers that read them: the contracts, for every pair and recompute level."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from ckpt_kernels import functional as F
from ckpt_kernels import nn
from ckpt_kernels.activations import NAMES
from ckpt_kernels.catalogue.block import Operands
from ckpt_kernels.catalogue.linear import PAIRS, Pair
from ckpt_kernels.levels import OF_FUNCTIONS
from ckpt_kernels.memory import saved_bytes
from ckpt_kernels.ops.products import as_saved

from .blocks import by_pair, with_gradients
from .conftest import DEVICE, emulated, interprets, where
from .test_contract_numbers import check_against_eager

DISCARDING_LEVELS = ("output", "all")


def assert_same_bits(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if DEVICE == "cuda" and value.dtype == torch.float32 and name.startswith("grad "):
            # cuBLAS selects the kernel of a product, and the order of the sums, by the operands' strides.
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(found[name], value), name


@by_pair
def test_error_is_at_most_eagers(pair: Pair, served: tuple) -> None:
    backend, dtype = served
    check_against_eager(pair, lambda seed: pair.operands((2, 9), 24, dtype, DEVICE, seed), backend)


def has_shapes(backend: str, dtype: torch.dtype, lead: tuple, columns: int) -> bool:
    """Whether this combination is tested: every shape in float32, one in other dtypes; fewer where kernels are
    interpreted."""
    if (lead, columns) == ((2, 9), 24):
        return True
    return dtype == torch.float32 and (not interprets(backend) or lead == (0,))


@where(has_shapes)
@pytest.mark.parametrize("lead,columns", [((2, 9), 24), ((3,), 37), ((), 8), ((0,), 8), ((1, 300), 16)])
@by_pair
def test_every_level_gives_the_same_bits(pair: Pair, lead: tuple, columns: int, served: tuple) -> None:
    _, dtype = served
    operands = pair.operands(lead, columns, dtype, DEVICE)
    expected = with_gradients(pair.at("block"), operands)
    for level in DISCARDING_LEVELS:
        assert_same_bits(with_gradients(pair.at(level), operands), expected)


# "all" recomputes outputs by the kernels of "output", so "all" is enough for emulated kernels.
@where(lambda backend, level: not emulated(backend) or level == "all")
@pytest.mark.parametrize("level", DISCARDING_LEVELS)
@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("function", ["norm_linear", "mlp", "gated_mlp"])
def test_every_activation_and_dropout(function: str, activation: str, level: str, backend: str) -> None:
    x = torch.randn(5, 16, device=DEVICE, requires_grad=True)
    w1, w2 = (torch.nn.Parameter(torch.randn(shape, device=DEVICE) / 4) for shape in ((32, 16), (16, 32)))
    b1 = torch.nn.Parameter(torch.randn(32, device=DEVICE))

    def run(level: str) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(3)
        if function == "norm_linear":
            y = F.norm_linear(x, 16, None, None, w1, b1, activation=activation, recompute=level)
        elif function == "mlp":
            y = F.mlp(x, w1, b1, w2, None, activation=activation, dropout_p=0.3, recompute=level)
        else:
            y = F.gated_mlp(x, w1, w1 * 2, w2, b1, activation=activation, dropout_p=0.3, recompute=level)
        # The gradient of the last weight reads the recomputed output of the block, including dropout.
        sources = (x, w1, b1) if function == "norm_linear" else (x, w1, b1, w2)
        return y, *torch.autograd.grad(y.sin().sum(), sources)

    for found, expected in zip(run(level), run("block"), strict=True):
        assert torch.equal(found, expected)


def test_recomputed_outputs_are_rounded_before_the_weight(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, product = (torch.randn(s, generator=generator).bfloat16().to(DEVICE) for s in ((9, 64), (64,), (8, 64)))
    product.requires_grad_()
    x.requires_grad_()
    found = []
    for level in ("block", "output"):
        options = {"norm": "rms_norm", "cast_before_weight": True, "recompute": level}
        y = F.norm_linear(x, 64, weight, None, product, **options)
        found.append(torch.autograd.grad(y.float().square().sum(), product)[0])
    assert torch.equal(*found)


# Saved tensors do not depend on the kernel, so one dtype is enough for emulated backends.
@where(lambda backend, dtype: not emulated(backend) or dtype == torch.bfloat16)
@pytest.mark.parametrize("level", OF_FUNCTIONS)
@by_pair
def test_keeps_the_floor(pair: Pair, level: str, served: tuple) -> None:
    _, dtype = served
    operands = pair.operands((4, 25), 24, dtype, DEVICE)
    wide = 8 if dtype == torch.float64 else 4
    floor = int(pair.units(level) * operands["input"].nbytes) + pair.statistics * wide * 100
    assert saved_bytes(pair.at(level), **operands) == floor


@pytest.mark.parametrize("level", DISCARDING_LEVELS)
@by_pair
def test_frozen_weights_cost_nothing(pair: Pair, level: str) -> None:
    """As with a LoRA adapter: the input has a gradient, and tensors that only the weights' gradients need are not
    kept."""
    operands = pair.operands((4, 25), 24, torch.float32, DEVICE)
    whole = with_gradients(pair.at(level), operands)
    frozen = {name: t.detach() if name == "input" else t.requires_grad_(False) for name, t in operands.items()}
    frozen["input"].requires_grad_()
    found = with_gradients(pair.at(level), frozen)
    assert torch.equal(found["grad input"], whole["grad input"])
    # All keep the operands of the block's derivative. The input of an MLP is only needed for the first weights'
    # gradients, or to run the first products again.
    mlp_without_input = pair.function in ("mlp", "gated_mlp") and level == "output"
    floor = int((pair.units(level) - mlp_without_input) * frozen["input"].nbytes) + pair.statistics * 400
    assert saved_bytes(pair.at(level), **frozen) <= floor
    nothing = {name: t.detach() for name, t in frozen.items()}
    assert saved_bytes(pair.at(level), **nothing) == 0


@pytest.mark.parametrize("level", DISCARDING_LEVELS)
@by_pair
def test_gradcheck_and_second_gradients(pair: Pair, level: str) -> None:
    operands = pair.operands((3,), 4, torch.float64, "cpu")
    names = list(operands)

    def fn(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(pair.at(level)(**dict(zip(names, tensors, strict=True))))

    tensors = tuple(t.detach().requires_grad_() for t in operands.values())
    # In one random direction; other tests compare every derivative with eager torch's.
    assert torch.autograd.gradcheck(fn, tensors, fast_mode=True)
    # Second gradients are those of the composition at every level, so one level is enough.
    assert level != "all" or torch.autograd.gradgradcheck(fn, tensors, fast_mode=True)


def products(fn) -> int:
    """The number of matrix products that fn runs."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        fn()
    return sum(event.name in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm") for event in found.events())


@pytest.mark.parametrize("function,usual", [("mlp (gelu)", 6), ("gated_mlp (silu)", 9)])
def test_all_runs_one_product_less_than_checkpointing(function: str, usual: int) -> None:
    (pair,) = [pair for pair in PAIRS if pair.name == function]
    operands = pair.operands((6,), 8, torch.float32, DEVICE)
    names = list(operands)

    def step(fn) -> None:
        fn(**operands)[0].sum().backward()

    def checkpointed(**operands: torch.Tensor):
        return checkpoint(
            lambda *t: pair.eager(**dict(zip(names, t, strict=True))), *operands.values(), use_reentrant=False
        )

    forward = usual // 3
    assert products(lambda: step(pair.eager)) == usual
    assert products(lambda: step(pair.at("output"))) == usual
    assert products(lambda: step(checkpointed)) == usual + forward
    assert products(lambda: step(pair.at("all"))) == usual + forward - 1


@pytest.mark.parametrize("level", OF_FUNCTIONS)
@by_pair
def test_dtypes_under_autocast_are_those_of_linear(pair: Pair, level: str) -> None:
    operands = pair.operands((2, 9), 24, torch.float32, DEVICE)

    def under_autocast(fn):
        def run(**operands):
            with torch.autocast(DEVICE, torch.bfloat16):
                return fn(**operands)

        return run

    found = with_gradients(under_autocast(pair.at(level)), operands)
    theirs = with_gradients(under_autocast(pair.eager), operands)
    for name, value in theirs.items():
        assert found[name].dtype == value.dtype, name
    assert_same_bits(found, with_gradients(under_autocast(pair.at("block")), operands))
    if level == "all":
        # The input itself is kept, and no cast copy.
        statistics = pair.statistics * 4 * 18
        assert saved_bytes(under_autocast(pair.at(level)), **operands) == operands["input"].nbytes + statistics


@by_pair
def test_compiles_without_a_graph_break(pair: Pair) -> None:
    torch._dynamo.reset()
    operands = pair.operands((2, 9), 24, torch.float32, DEVICE)
    compiled = torch.compile(pair.at("output"), fullgraph=True, backend="aot_eager")
    found, expected = with_gradients(compiled, operands), with_gradients(pair.call, operands)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


@by_pair
def test_accumulates_into_grad(pair: Pair) -> None:
    operands = pair.operands((2, 9), 24, torch.float32, DEVICE)
    for _ in range(2):
        sum(y.sum() for y in pair.call(**operands)).backward()
    twice = {name: t.grad.clone() for name, t in operands.items()}
    for t in operands.values():
        t.grad = None
    sum(y.sum() for y in pair.call(**operands)).backward()
    for name, t in operands.items():
        torch.testing.assert_close(twice[name], 2 * t.grad)


MODULES = [
    (lambda r: nn.NormLinear(16, 8, activation="silu", recompute=r), {"block": 2, "output": 1, "all": 1}),
    (
        lambda r: nn.NormLinear(16, (8, 4), norm="rms_norm", bias=False, recompute=r),
        {"block": 2, "output": 1, "all": 1},
    ),
    (lambda r: nn.ActLinear(16, 8, dropout=0.1, recompute=r), {"block": 2, "output": 1, "all": 1}),
    (lambda r: nn.MLP(16, 64, dropout=0.1, recompute=r), {"block": 9, "output": 5, "all": 1}),
    (lambda r: nn.GatedMLP(16, 64, recompute=r), {"block": 13, "output": 9, "all": 1}),
    (lambda r: nn.GatedMLP(16, 64, 8, packed=True, bias=True, dropout=0.1, recompute=r), {"output": 9, "all": 1}),
]


@pytest.mark.parametrize("level", OF_FUNCTIONS)
@pytest.mark.parametrize("make,kept", MODULES)
def test_modules_at_every_level(make, kept: dict, level: str) -> None:
    torch.manual_seed(0)
    module, plain = make(level).to(DEVICE), make("block").to(DEVICE)
    plain.load_state_dict(module.state_dict(), strict=True)
    x = torch.randn(50, 16, device=DEVICE, requires_grad=True)
    results = []
    for given in (module, plain):
        torch.manual_seed(1)
        outputs = given(x)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        results.append([*outputs, *torch.autograd.grad(sum(y.sum() for y in outputs), (x, *given.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert f"recompute={level!r}" in repr(module) or level == "output"
    if level in kept:
        # A few statistics and a dropout seed are kept besides the tensors.
        assert 0 <= saved_bytes(module, x) - kept[level] * x.nbytes <= 50 * 2 * 4 + 8
    module.eval()
    with torch.no_grad():
        assert saved_bytes(module, x) == 0
        # In evaluation there is no dropout, so two calls agree.
        torch.testing.assert_close(module(x), module(x), rtol=0, atol=0)


BAD = [
    (lambda o: F.mlp(o["x"], o["w"], None, o["w"], None), "weight2 has shape"),
    (lambda o: F.mlp(o["x"], o["w"][0], None, o["w"], None), "weight1 has shape"),
    (lambda o: F.mlp(o["x"], o["w"], o["x"], o["w"].t(), None), "bias1 has shape"),
    (lambda o: F.mlp(o["x"], o["w"], None, o["w"].t(), None, recompute="some"), "recompute is 'some'"),
    (lambda o: F.mlp(o["x"], o["w"], None, o["w"].t(), None, dropout_p=2), "dropout_p is 2"),
    (lambda o: F.mlp(o["x"], None, None, o["w"].t(), None), "weight1 is NoneType"),
    (lambda o: F.gated_mlp(o["x"], o["w"], o["w"][:3], o["w"].t()), "value_weight has shape"),
    (lambda o: F.gated_mlp(o["x"], o["w"][:3], None, o["w"].t()), "gate_weight has shape"),
    (lambda o: F.gated_mlp(o["x"], o["w"], None, o["w"].t()[:, :3], layout="mixed"), "layout is 'mixed'"),
    (lambda o: F.gated_mlp(o["x"], o["w"], None, o["w"].t()[:, :3], value_bias=o["x"][0]), "value_bias is given"),
    (lambda o: F.norm_linear(o["x"], 4, None, None, o["w"], norm="batch"), "norm is 'batch'"),
    (lambda o: F.norm_linear(o["x"], (2, 4), None, None, o["w"]), "normalized_shape is|expected one dimension"),
    (lambda o: F.norm_linear(o["x"], 4, None, o["x"][0], o["w"], norm="rms_norm"), "norm_bias is given"),
    (lambda o: F.norm_linear(o["x"], 4, None, None, [o["w"]], [None, None]), "bias has 2 tensors"),
    (lambda o: F.norm_linear(o["x"], 4, None, None, o["w"], weight_offset=1.0), "weight_offset"),
    (lambda o: F.act_linear(o["x"], o["w"], activation="gela"), "activation is 'gela'"),
    (lambda o: F.act_linear(o["x"][0, 0], o["w"]), r"input has shape \(\)"),
    (lambda o: nn.MLP(4, 8, recompute="none"), "recompute is 'none'"),
    (lambda o: nn.GatedMLP(4, 8, layout="mixed", packed=True), "layout is 'mixed'"),
    (lambda o: nn.NormLinear(4, 8, norm="group"), "norm is 'group'"),
]


@pytest.mark.parametrize("call,message", BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_input_is_named(call, message: str) -> None:
    operands: Operands = {"x": torch.randn(2, 4, device=DEVICE), "w": torch.randn(6, 4, device=DEVICE)}
    with pytest.raises((RuntimeError, ValueError, TypeError), match=message):
        call(operands)


@pytest.mark.parametrize("recompute", ["block", "output", "all"])
def test_tensors_without_columns(recompute: str) -> None:
    x, weight = (torch.zeros(*shape, 0, device=DEVICE, requires_grad=True) for shape in ((2, 3), (4,)))
    bias = torch.ones(4, device=DEVICE, requires_grad=True)
    y = F.act_linear(x, weight, bias, recompute=recompute)
    gradients = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert torch.equal(y, torch.ones(2, 3, 4, device=DEVICE)) and (gradients[2] == 6).all()
    assert [g.shape for g in gradients] == [x.shape, weight.shape, bias.shape]


@pytest.mark.parametrize("recompute", ["block", "output", "all"])
def test_a_weight_of_another_dtype_is_an_error_except_under_autocast(recompute: str) -> None:
    x, weight = torch.randn(3, 8, device=DEVICE), torch.randn(4, 8, device=DEVICE, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"weight has dtype torch\.bfloat16; expected the input's, torch\.float32"):
        F.act_linear(x, weight, recompute=recompute)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert F.act_linear(x, weight, recompute=recompute).dtype == torch.bfloat16


SLICES = {
    "few steps": lambda h: h[:, -4:],
    "all but one step": lambda h: h[:, 1:],
    "columns": lambda h: h[..., :16],
    "transposed": lambda h: h.transpose(0, 1),
}


class Slicing(torch.nn.Module):
    """An MLP of a part of what another layer returns, which nothing else keeps."""

    def __init__(self, name: str, recompute: str) -> None:
        super().__init__()
        self.taken, self.recompute = SLICES[name], recompute
        self.first, self.last = torch.nn.Linear(8, 32), torch.nn.Linear(24, 8)
        self.up = torch.nn.Linear(16 if name == "columns" else 32, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.taken(self.first(x))
        if self.recompute == "none":
            return self.last(torch.relu(self.up(x)))
        weights = self.up.weight, self.up.bias, self.last.weight, self.last.bias
        return F.mlp(x, *weights, activation="relu", recompute=self.recompute)


@pytest.mark.parametrize("is_cast", [False, True])
@pytest.mark.parametrize("recompute", ["block", "output", "all"])
@pytest.mark.parametrize("name", SLICES)
def test_a_slice_of_a_sequence_keeps_no_more_than_in_torch(name: str, recompute: str, is_cast: bool) -> None:
    x = torch.randn(8, 48, 8, device=DEVICE)
    kept, gradients = [], []
    for level in (recompute, "none"):
        torch.manual_seed(0)
        net = Slicing(name, level).to(DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=is_cast):
            kept.append(saved_bytes(net, x))
            loss = net(x).float().square().sum()
        gradients.append(torch.autograd.grad(loss, list(net.parameters())))
    assert kept[0] <= kept[1]
    for found, expected in zip(*gradients, strict=True):
        assert (found - expected).norm() <= (2e-2 if is_cast else 1e-5) * expected.norm()


@pytest.mark.parametrize("recompute", ["block", "output", "all"])
@pytest.mark.parametrize("name", sorted(SLICES.keys() - {"columns"}))  # whose rows are a matrix
def test_the_model_may_write_to_a_slice_that_torch_copies(name: str, recompute: str) -> None:
    net = Slicing(name, recompute).to(DEVICE)
    base = torch.randn(8, 48, 8, device=DEVICE)
    h = net.first(base).clone()
    net.first = torch.nn.Identity()
    loss = net(h).square().sum()
    with torch.no_grad():
        h.add_(1.0)
    loss.backward()
    assert net.up.weight.grad is not None


# Parts of a sequence of 2 x 12 rows with 8 columns, and whether the part is copied.
PARTS = {
    "rows that form a matrix": (lambda h: h[..., :4], False),
    "one step": (lambda h: h[:, :1], False),
    "transposed": (lambda h: h.transpose(0, 1), True),
    "all but one step": (lambda h: h[:, 1:], True),
    "a matrix but for the last dimension": (lambda h: h.view(2, 3, 4, 8)[:, :, 1:3], True),
    "expanded": (lambda h: h[:1].expand(4, 12, 8), True),
    "the same row": (lambda h: h[:1, :1].expand(4, 12, 8), False),
}


@pytest.mark.parametrize("name", PARTS)
def test_which_parts_of_a_tensor_are_copied(name: str) -> None:
    take, is_copied = PARTS[name]
    part = take(torch.randn(2, 12, 8))
    saved = as_saved(part)
    assert torch.equal(saved, part) and (saved.data_ptr() != part.data_ptr()) is is_copied

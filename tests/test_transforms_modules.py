"""Modules with torch's whole-model transforms: tracers, export, compilers, torch.func, and the meta device."""

import contextlib
import copy
import io
import operator
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

import ckpt_kernels
from ckpt_kernels import functional, nn, recompute

from .conftest import DEVICE

X = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
# The constructor and the arguments of each module.
MODULES: dict[str, tuple[Callable[[], torch.nn.Module], tuple[Tensor, ...]]] = {
    "LayerNorm": (lambda: nn.LayerNorm(8, activation="gelu"), (X,)),
    "RMSNorm": (lambda: nn.RMSNorm(8), (X,)),
    "AddLayerNorm": (lambda: nn.AddLayerNorm(8, dropout=0.5), (X, X + 1)),
    "AddRMSNorm": (lambda: nn.AddRMSNorm(8, dropout=0.5), (X, X + 1)),
    "GatedRMSNorm": (lambda: nn.GatedRMSNorm(8), (X, X + 1)),
    "ModulatedLayerNorm": (lambda: nn.ModulatedLayerNorm(8), (X, X[:, :1], X[:, 1:2])),
    "ModulatedRMSNorm": (lambda: nn.ModulatedRMSNorm(8), (X, X[:, :1], X[:, 1:2])),
    "GLU": (lambda: nn.GLU(1), (X,)),
    "DyT": (lambda: nn.DyT(8), (X,)),
    "BiasAct": (lambda: nn.BiasAct(8, activation="gelu", dropout=0.5), (X,)),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4, activation="relu"), (X,)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4), (X[..., None],)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(4), (X[..., None, None],)),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(4), (X,)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4, activation="silu"), (X,)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True), (X,)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(4), (X[..., None].expand(3, 4, 8, 2),)),
    "InstanceNorm3d": (lambda: nn.InstanceNorm3d(4), (X[..., None, None].expand(3, 4, 8, 2, 2),)),
    "NormLinear": (lambda: nn.NormLinear(8, (5, 6)), (X,)),
    "ActLinear": (lambda: nn.ActLinear(8, 5, dropout=0.5), (X,)),
    "MLP": (lambda: nn.MLP(8, 16, dropout=0.5, recompute="all"), (X,)),
    "GatedMLP": (lambda: nn.GatedMLP(8, 16, packed=True), (X,)),
    "Rotary": (lambda: nn.Rotary(8, norm="rms"), (X, X[..., :4].cos(), X[..., :4].sin())),
}
by_module = pytest.mark.parametrize("name", MODULES)


def _made(name: str) -> tuple[torch.nn.Module, tuple[Tensor, ...]]:
    make, inputs = MODULES[name]
    return make().to(DEVICE), inputs


def test_every_module_is_tested() -> None:
    assert set(MODULES) == set(nn.__all__)


@by_module
def test_derivatives_of_modules_in_both_modes(name: str) -> None:
    """Forward-mode and reverse-mode directional derivatives equal finite differences."""
    module, inputs = _made(name)
    module, inputs = module.double().eval(), tuple(t.double() for t in inputs)
    direction = tuple(t.cos() for t in inputs)

    def total(*inputs: Tensor) -> Tensor:
        outputs = module(*inputs)
        return sum(y.sin().sum() for y in (outputs if isinstance(outputs, tuple) else (outputs,)))

    step = 1e-6
    after, before = (total(*(t + s * d for t, d in zip(inputs, direction, strict=True))) for s in (step, -step))
    expected = (after - before) / (2 * step)
    with torch.no_grad(), fwAD.dual_level():
        tangent = fwAD.unpack_dual(total(*map(fwAD.make_dual, inputs, direction))).tangent
    gradients = grad(total, tuple(range(len(inputs))))(*inputs)
    pulled = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
    for found in (tangent, jvp(total, inputs, direction)[1], pulled):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


class _Around(torch.nn.Module):
    def __init__(self, block: torch.nn.Module, count: int) -> None:
        super().__init__()
        self.block, self.count = block, count

    def forward(self, inputs: tuple[Tensor, ...]) -> object:
        return self.block(*(inputs[i] for i in range(self.count)))


@by_module
def test_torch_fx_records_a_module_as_one_call(name: str) -> None:
    """The traced call then follows the module's training mode, as with torch.nn's modules."""
    module, inputs = _made(name)
    traced = torch.fx.symbolic_trace(_Around(module, len(inputs)))
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["block"]
    assert all(node.target is operator.getitem for node in traced.graph.nodes if node.op == "call_function")
    traced = pickle.loads(pickle.dumps(traced)).eval()
    torch.testing.assert_close(traced(inputs), module.eval()(*inputs), rtol=0, atol=0)


def test_torch_fx_traces_functions_and_single_modules() -> None:
    traced = torch.fx.symbolic_trace(lambda x, w: functional.glu(functional.layer_norm(x, 8, w), x))
    assert [n.target for n in traced.graph.nodes if n.op == "call_function"] == [functional.layer_norm, functional.glu]
    weight = torch.randn(8, device=DEVICE)
    torch.testing.assert_close(traced(X, weight), functional.glu(functional.layer_norm(X, 8, weight), X))
    norm = nn.LayerNorm(8, activation="gelu").to(DEVICE)
    torch.testing.assert_close(torch.fx.symbolic_trace(norm)(X), norm(X))
    # A trace of GLU itself takes one tensor or two, as the module does.
    for gate in (nn.GLU(), nn.GLU(1, activation="silu", layout="gate_first")):
        traced = torch.fx.symbolic_trace(gate)
        torch.testing.assert_close(traced(X), gate(X))
        torch.testing.assert_close(traced(X, X + 1), gate(X, X + 1))
        torch.testing.assert_close(pickle.loads(pickle.dumps(traced))(X), gate(X))


@by_module
@pytest.mark.filterwarnings("ignore")
def test_torch_jit_trace_makes_a_program_for_any_batch(name: str) -> None:
    module, inputs = _made(name)
    module.eval()
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(module, inputs), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    assert {node.kind().partition("::")[0] for node in loaded.inlined_graph.nodes()} <= {"aten", "prim"}
    more = tuple(torch.cat([t, t + 1]) for t in inputs)
    torch.testing.assert_close(loaded(*more), module(*more))


@pytest.mark.filterwarnings("ignore")
def test_torch_jit_trace_of_a_batch_norm_updates_running_statistics() -> None:
    ours = nn.BatchNorm1d(4).to(DEVICE)
    theirs = torch.nn.BatchNorm1d(4).to(DEVICE)
    traced = torch.jit.trace(ours, X, check_trace=False)
    ours.load_state_dict(theirs.state_dict())
    for batch in (X, torch.cat([X, X + 1])):
        torch.testing.assert_close(traced(batch), theirs(batch))
        torch.testing.assert_close(traced.running_mean, theirs.running_mean)
        torch.testing.assert_close(traced.running_var, theirs.running_var)


def _network() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [torch.nn.LayerNorm(8), torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Dropout(0.0)]
    layers += [torch.nn.Linear(16, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU(), torch.nn.Linear(8, 8)]
    layers[4] = torch.nn.Linear(16, 8)
    return torch.nn.Sequential(*layers).to(DEVICE)


@pytest.mark.parametrize("level", ["block", "output", "all"])
@pytest.mark.filterwarnings("ignore")
def test_torch_jit_trace_is_stable_for_a_converted_network_with_convolutions(level: str) -> None:
    # torch's `_check_trace` compares the graph with a second trace under no_grad, including the names of values.
    layers = [torch.nn.Conv1d(3, 4, 3), torch.nn.GroupNorm(2, 4), torch.nn.SiLU(), torch.nn.Conv1d(4, 4, 1)]
    model = torch.nn.Sequential(*layers).to(DEVICE)
    converted = copy.deepcopy(model)
    ckpt_kernels.convert(converted, recompute=level)
    images = torch.randn(2, 3, 6, device=DEVICE)
    torch.testing.assert_close(torch.jit.trace(converted, images)(images + 1), model(images + 1))


@pytest.mark.parametrize("level", ["block", "output", "all"])
def test_a_converted_model_is_traced_and_differentiated_as_before(level: str) -> None:
    model = _network()
    converted = copy.deepcopy(model)
    ckpt_kernels.convert(converted, recompute=level)
    for m in (model, converted):
        m.eval()
    torch.testing.assert_close(torch.fx.symbolic_trace(converted)(X), model(X))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(torch.jit.trace(converted, X)(X + 1), model(X + 1))

    def per_sample(model: torch.nn.Module) -> dict[str, Tensor]:
        def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(model, parameters, (x[None],)).square().sum()

        parameters = {name: p.detach() for name, p in model.named_parameters()}
        return vmap(grad(loss), (None, 0))(parameters, X)

    torch.testing.assert_close(per_sample(converted), per_sample(model))
    torch.testing.assert_close(jvp(converted, (X,), (X,)), jvp(model, (X,), (X,)))

    def batched(model: torch.nn.Module) -> tuple[Tensor, ...]:
        incoming = torch.stack([X, X + 1])
        parameters = list(model.parameters())
        return torch.autograd.grad(model(X), parameters, incoming, is_grads_batched=True)

    torch.testing.assert_close(batched(converted), batched(model))


def test_compiled_autograd_with_discarded_outputs() -> None:
    """The recipe of an output reads a recomputed product and parameters."""
    from torch._dynamo import compiled_autograd

    model = torch.nn.Sequential(torch.nn.Linear(8, 8), nn.BiasAct(8, activation="silu"), torch.nn.Linear(8, 8))

    def gradients(compiled: bool) -> tuple[Tensor, ...]:
        with recompute.discard_outputs(products=True):
            loss = model(X.cpu()).square().sum()
        compiling = compiled_autograd._enable(torch.compile(backend="eager"))
        with compiling if compiled else contextlib.nullcontext():
            return torch.autograd.grad(loss, list(model.parameters()))

    torch.testing.assert_close(gradients(True), gradients(False))


@by_module
def test_a_meta_default_device(name: str) -> None:
    """Construct, convert and run modules on the meta device, by a default device and by the device of tensors."""
    make, inputs = MODULES[name]
    with torch.device("meta"):
        module = make()
        ckpt_kernels.convert(module)
        outputs = module(*(torch.empty(t.shape) for t in inputs))
    meta_outputs = module(*(t.to("meta") for t in inputs))
    expected = _made(name)[0](*inputs)
    for found in (outputs, meta_outputs):
        for y, e in zip(*(t if isinstance(t, tuple) else (t,) for t in (found, expected)), strict=True):
            assert (y.device.type, y.shape, y.dtype, y.stride()) == ("meta", e.shape, e.dtype, e.stride())
    if list(module.parameters()):
        sum(y.sum() for y in (meta_outputs if isinstance(meta_outputs, tuple) else (meta_outputs,))).backward()
    assert all(p.grad is not None and p.grad.is_meta for p in module.parameters())


def test_losses_and_casts_of_parameters_on_meta() -> None:
    """torch has no autocast for the meta device, and raises if asked for its state."""
    layer = torch.nn.Linear(8, 8, device="meta")
    x, target = X.to("meta"), torch.zeros(3, 4, dtype=torch.int64, device="meta")
    for autocast in (contextlib.nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        layer.zero_grad()
        with autocast, recompute.discard_outputs(products=True):
            weight, bias = (p.bfloat16() for p in layer.parameters())
            y = F.linear(F.silu(F.linear(x.bfloat16(), weight, bias)), weight, bias)
            functional.linear_cross_entropy(y.float(), layer.weight, target, layer.bias).backward()
        assert all(p.grad.is_meta and p.grad.shape == p.shape for p in layer.parameters())


@pytest.mark.filterwarnings("ignore")
def test_options_may_be_traced_sizes() -> None:
    table, weight = X[0, :, :2], torch.eye(8, device=DEVICE)
    target = torch.zeros(3, 4, dtype=torch.int64, device=DEVICE)
    for call in (
        lambda x: functional.rotary(x, table, table, rotary_dim=x.shape[-1] // 2, rotary_start=x.shape[-1] // 4),
        lambda x: functional.linear_cross_entropy(x, weight, target, chunk=x.shape[1], ignore_index=x.shape[0]),
        lambda x: functional.mlp(x, weight, None, weight, None, tiles=x.shape[0]),
    ):
        torch.testing.assert_close(torch.jit.trace(call, X, check_trace=False)(X + 1), call(X + 1))


DROPOUTS = {
    "bias_act": lambda x: functional.bias_act(x, dropout_p=0.5),
    "add_layer_norm": lambda x: functional.add_layer_norm(x, torch.zeros_like(x), 64, dropout_p=0.5)[1],
    "mlp": lambda x: functional.mlp(x, torch.eye(64), None, torch.eye(64), None, activation="identity", dropout_p=0.5),
}


@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout_within_vmap_is_as_random_as_torchs(name: str) -> None:
    ones = torch.ones(4, 64)
    with pytest.raises(RuntimeError) as theirs:
        vmap(lambda x: F.dropout(x, 0.5))(ones)
    with pytest.raises(RuntimeError) as ours:
        vmap(DROPOUTS[name])(ones)
    assert str(ours.value) == str(theirs.value)
    for batched in (True, False):  # an unbatched operand also gets another mask for each sample
        block = DROPOUTS[name] if batched else lambda x: DROPOUTS[name](ones[0]) + 0 * x
        same, different = (vmap(block, randomness=randomness)(ones) for randomness in ("same", "different"))
        assert all(torch.equal(row, same[0]) for row in same)
        assert not any(torch.equal(different[i], different[j]) for i in range(4) for j in range(i))
        for y in (same, different):
            assert set(y.unique().tolist()) == {0.0, 2.0}
    tangent = jvp(DROPOUTS[name], (ones[0],), (ones[0],))[1]
    assert set(tangent.unique().tolist()) == {0.0, 2.0}


STATISTICS = {
    "batch_norm": (functional.batch_norm, F.batch_norm),
    "instance_norm": (functional.instance_norm, F.instance_norm),
}
UPDATES = {
    "grad": lambda norm, mean, var: grad(lambda x: norm(x, mean, var).sin().sum())(X),
    "jvp": lambda norm, mean, var: jvp(lambda x: norm(x, mean, var), (X,), (X.cos(),)),
    "vmap": lambda norm, mean, var: vmap(norm)(torch.stack([X, 2 * X]), mean, var),
    "vmap refused": lambda norm, mean, var: vmap(lambda x: norm(x, mean[0], var[0]))(torch.stack([X, 2 * X])),
}


@pytest.mark.parametrize("transform", UPDATES)
@pytest.mark.parametrize("name", STATISTICS)
def test_running_statistics_under_transforms_are_torchs(name: str, transform: str) -> None:
    found = []
    for function in STATISTICS[name]:
        lead = (2,) if "vmap" in transform else ()
        running = torch.zeros(*lead, 4, device=DEVICE), torch.ones(*lead, 4, device=DEVICE)

        def norm(x: Tensor, mean: Tensor, var: Tensor, function: Callable[..., Tensor] = function) -> Tensor:
            return function(x, mean, var, None, None, True)

        try:
            result = UPDATES[transform](norm, *running)
        except RuntimeError as error:
            result = str(error)
        found.append((result, *running))
    ours, theirs = found
    assert isinstance(theirs[0], str) == (transform == "vmap refused")
    if isinstance(theirs[0], str):
        assert ours[0] == theirs[0]
        ours, theirs = ours[1:], theirs[1:]
    torch.testing.assert_close(ours, theirs)


def test_running_statistics_have_no_tangents() -> None:
    norm = nn.BatchNorm1d(4).to(DEVICE)
    with torch.no_grad(), fwAD.dual_level():
        norm(fwAD.make_dual(X, X))
        assert fwAD.unpack_dual(norm.running_mean).tangent is None
    assert norm.num_batches_tracked == 1 and norm.running_mean.abs().sum() > 0


def _loss(weight: Tensor, x: Tensor) -> Tensor:
    return functional.glu(functional.layer_norm(x, 8, weight, activation="gelu"), x).square().sum()


COMPILED = {
    "per-sample gradients": lambda w: vmap(grad(_loss), (None, 0))(w, X),
    "jacrev": lambda w: jacrev(lambda w: functional.rms_norm(X, 8, w, activation="silu"))(w),
    "hessian": lambda w: hessian(_loss)(w, X),
    "jvp": lambda w: jvp(lambda w: functional.rms_norm(X, 8, w, activation="silu"), (w,), (w.cos(),)),
}


@pytest.mark.parametrize("name", COMPILED)
def test_torch_compile_of_transforms(name: str) -> None:
    weight = torch.randn(8, device=DEVICE)
    torch._dynamo.reset()
    compiled = torch.compile(COMPILED[name], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(weight), COMPILED[name](weight), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of an exported and saved program."""
    model = torch.nn.Sequential(nn.LayerNorm(8, activation="gelu"), nn.BiasAct(8, activation="silu")).eval()
    file = str(tmp_path_factory.mktemp("saved") / "model.pt2")
    torch.export.save(torch.export.export(model, (X.cpu(),)), file)
    return file


def test_a_saved_program_under_transforms(saved: str) -> None:
    program = torch.export.load(saved).module()
    x = X.cpu()

    def block(x: Tensor) -> Tensor:
        return functional.bias_act(functional.layer_norm(x, 8, activation="gelu"), activation="silu")

    def everything(f: Callable[[Tensor], Tensor]) -> list:
        def total(x: Tensor) -> Tensor:
            return f(x).square().sum()

        with torch.no_grad(), fwAD.dual_level():
            tangent = fwAD.unpack_dual(f(fwAD.make_dual(x, x.cos()))).tangent
        batch = torch.stack([x, x + 1])
        return [tangent, jvp(f, (x,), (x,)), vmap(f)(batch), vmap(grad(total))(batch), jacrev(grad(total))(x)]

    torch.testing.assert_close(everything(program), everything(block), rtol=1e-4, atol=1e-4)


def test_a_saved_program_names_the_package_to_import(saved: str) -> None:
    code = "import sys, torch\n{}\nprint(torch.export.load(sys.argv[1]).module()(torch.ones(3, 4, 8)).shape)"
    found = [
        subprocess.run([sys.executable, "-c", code.format(first), saved], capture_output=True, text=True)
        for first in ("", "import ckpt_kernels")
    ]
    assert found[0].returncode and "Please import" in found[0].stderr and "torch.ops.ckpt_kernels" in found[0].stderr
    assert found[1].returncode == 0 and "[3, 4, 8]" in found[1].stdout

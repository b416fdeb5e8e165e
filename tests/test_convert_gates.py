"""Gates of two halves in methods and functions of one tensor: the trial, the kept tensors, and the calls that are left
to the model's own code."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ckpt_kernels
from ckpt_kernels.ops.glu import CLAMP_STOPS_AT_LIMIT

from .conftest import DEVICE
from .conversion import WIDTH, close, equal, kept, random_tensor, replacement_of, results_of, twins


class Gated(nn.Module):
    """Two products and a gate between them. The first product is scaled, to reach the limits."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4 * WIDTH, WIDTH))
        self.down = nn.Parameter(torch.randn(WIDTH, 2 * WIDTH) / WIDTH)
        self.act, self.limit, self.alpha = nn.SiLU(), 1.5, 1.702

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.gate(F.linear(x, self.up)), self.down)

    def gate(self, packed: Tensor) -> Tensor:
        raise NotImplementedError


class Interleaved(Gated):
    """The gate of GPT-OSS."""

    def gate(self, packed: Tensor) -> Tensor:
        gate, value = packed[..., ::2], packed[..., 1::2]
        gate = gate.clamp(min=None, max=self.limit)
        value = value.clamp(min=-self.limit, max=self.limit)
        return (value + 1) * (gate * torch.sigmoid(gate * self.alpha))


class Chunked(Gated):
    """An activation of a child."""

    def gate(self, packed: Tensor) -> Tensor:
        gate, value = packed.chunk(2, dim=-1)
        return self.act(gate.clamp(max=self.limit)) * value.clamp(min=-self.limit, max=self.limit)


class Cast(Gated):
    """Torch keeps no 16-bit input."""

    def gate(self, packed: Tensor) -> Tensor:
        value, gate = packed.chunk(2, dim=-1)
        return (self.act(gate.float()) * value.float()).to(packed.dtype)


def clamped(packed: Tensor, limit: float = 1.5) -> Tensor:
    half = packed.shape[-1] // 2
    gate, value = packed[..., :half], packed[..., half:]
    return torch.sigmoid(torch.clamp(gate, max=limit)) * torch.clamp(value, -limit, limit)


class Helped(Gated):
    """A function of the file."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(clamped(F.linear(x, self.up)), self.down)


class Within(Gated):
    """Statements of a longer method. The names are bound again in each round."""

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for part in range(2):
            packed = F.linear(x[part], self.up)
            gate, up = packed[..., ::2], packed[..., 1::2]
            gate = gate.clamp(min=None, max=self.limit)
            up = up.clamp(min=-self.limit, max=self.limit)
            glu = gate * torch.sigmoid(gate * self.alpha)
            gated = (up + 1) * glu
            total[part] = F.linear(gated, self.down)
        return total


FOUND = {
    Within: "packed gate (quick_gelu, limit 1.5, offset 1)",
    Interleaved: "packed gate (quick_gelu, limit 1.5, offset 1)",
    Chunked: "packed gate (silu, limit 1.5)",
    Cast: "packed gate (silu)",
    Helped: "packed gate (sigmoid, limit 1.5)",
}


def wide_results(model: nn.Module, given: Tensor) -> dict[str, Tensor]:
    return results_of(copy.deepcopy(model).double(), given.double())


@pytest.mark.parametrize("kind", FOUND, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("level", ("block", "output", "all"))
def test_a_gate_keeps_only_the_whole(kind: type[nn.Module], level: str) -> None:
    model, twin = twins(kind)
    assert replacement_of(ckpt_kernels.convert(model, recompute=level), "") == FOUND[kind]
    given = random_tensor(2, 32, WIDTH)
    assert close(results_of(model, given), results_of(twin, given), 1e-5)
    # The input has size 1, the packed tensor size 4, and the gate size 2.
    most = 7 if level == "block" else 5
    assert kept(model, given) <= most * given.nbytes < kept(twin, given)


@pytest.mark.parametrize("kind", FOUND, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_errors_in_16_bits(kind: type[nn.Module], dtype: torch.dtype) -> None:
    model, twin = (made.to(dtype) for made in twins(kind))
    ckpt_kernels.convert(model)
    given = random_tensor(2, 32, WIDTH, dtype=dtype)
    truth, found, eager = wide_results(twin, given), results_of(model, given), results_of(twin, given)
    for name, exact in truth.items():
        error, allowed = ((r[name].double() - exact).norm() for r in (found, eager))
        assert error <= 1.5 * allowed, name
    assert kept(model, given) < kept(twin, given)


def test_a_user_may_write_to_an_input_that_torch_copies() -> None:
    model, twin = (made.bfloat16() for made in twins(Cast))
    ckpt_kernels.convert(model)
    gradients = []
    for made in (model, twin):
        packed = random_tensor(8, 4 * WIDTH, dtype=torch.bfloat16).requires_grad_()
        whole = packed * 1.0
        output = made.gate(whole)
        whole.detach().zero_()
        gradients += torch.autograd.grad(output.sum(), packed)
    assert torch.allclose(*gradients, rtol=2e-2, atol=2e-2)


def changed_limit(model: nn.Module) -> None:
    model.limit = 0.5


def changed_type(model: nn.Module) -> None:
    model.limit = torch.tensor(0.5, device=DEVICE)


def changed_child(model: nn.Module) -> None:
    model.act = nn.ReLU()


def hooked_child(model: nn.Module) -> None:
    model.act.register_forward_hook(lambda module, args, output: output * 2)


def own_method(model: nn.Module) -> None:
    model.gate = lambda packed: packed.chunk(2, -1)[0]


CHANGES = (changed_limit, changed_type, changed_child, hooked_child, own_method)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes_after_the_conversion_are_seen(change: Callable[[nn.Module], None]) -> None:
    model, twin = twins(Chunked)
    assert replacement_of(ckpt_kernels.convert(model), "") == FOUND[Chunked]
    given = random_tensor(2, 32, WIDTH)
    before = results_of(model, given)
    for made in (model, twin):
        change(made)
    assert close(results_of(model, given), results_of(twin, given), 1e-6)
    assert not close(results_of(model, given), before, 1e-2)


@pytest.mark.parametrize("change", (changed_limit, changed_type), ids=lambda change: change.__name__)
def test_changes_are_seen_within_a_method(change: Callable[[nn.Module], None]) -> None:
    model, twin = twins(Within)
    ckpt_kernels.convert(model)
    given = random_tensor(2, 32, WIDTH)
    for made in (model, twin):
        change(made)
    assert close(results_of(model, given), results_of(twin, given), 1e-6)


@pytest.mark.parametrize("name", ("__defaults__", "__code__"))
def test_changes_of_a_function_are_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, twin = twins(Helped)
    ckpt_kernels.convert(model)
    values = {"__defaults__": (0.25,), "__code__": (lambda packed, limit=0.5: packed[..., ::2] * limit).__code__}
    monkeypatch.setattr(clamped, name, values[name])
    given = random_tensor(2, 32, WIDTH)
    assert equal(results_of(model, given), results_of(twin, given))


def test_copies_and_pickles_compute_the_same() -> None:
    model, _ = twins(Interleaved)
    ckpt_kernels.convert(model)
    given = random_tensor(2, 32, WIDTH)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert equal(results_of(made, given), results_of(model, given))
        assert kept(made, given) == kept(model, given)


def test_compiled_without_graph_breaks() -> None:
    model, twin = twins(Chunked)
    ckpt_kernels.convert(model)
    given = random_tensor(2, 32, WIDTH)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(given), twin(given), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "shape", ((0, 4 * WIDTH), (4 * WIDTH,), (2, 1, 3, 2, 4 * WIDTH), (3, 6), (3, 2), (6, 4)), ids=str
)
@pytest.mark.parametrize("layout", (Tensor.contiguous, lambda x: x.t() if x.dim() == 2 else x), ids=("rows", "columns"))
def test_inputs_of_every_shape(shape: tuple[int, ...], layout: Callable[[Tensor], Tensor]) -> None:
    model, twin = twins(Interleaved)
    ckpt_kernels.convert(model)
    packed = layout(random_tensor(*shape))
    if packed.shape[-1] % 2:
        return
    found, expected = model.gate(packed), twin.gate(packed)
    assert found.stride() == expected.stride() and torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


class OfRows(Gated):
    """A gate for matrices only: of another tensor, halves along the second dimension."""

    def gate(self, packed: Tensor) -> Tensor:
        gate, value = packed.chunk(2, dim=1)
        return self.act(gate.clamp(max=self.limit)) * value.clamp(min=-self.limit, max=self.limit)


@pytest.mark.parametrize("shape", ((8, 6), (2, 8, 6), (1, 2, 4, 6)), ids=str)
def test_other_numbers_of_dimensions_than_tried_are_left(shape: tuple[int, ...]) -> None:
    model, twin = twins(OfRows)
    assert replacement_of(ckpt_kernels.convert(model), "") == FOUND[Chunked]
    found, expected = (made.gate(random_tensor(*shape)) for made in (model, twin))
    assert found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_hooks_of_all_modules_run() -> None:
    model, twin = twins(Chunked)
    ckpt_kernels.convert(model)
    given = random_tensor(2, 32, WIDTH)
    before = results_of(model, given)
    doubling = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: output * 2 if isinstance(module, nn.SiLU) else None
    )
    try:
        found, expected = results_of(model, given), results_of(twin, given)
    finally:
        doubling.remove()
    assert close(found, expected, 1e-6) and not close(found, before, 1e-2)


def test_no_finalizer_runs_on_a_stand_in() -> None:
    finalized = []

    class Finalized(Chunked):
        def __del__(self) -> None:
            finalized.append(self)

    model = Finalized()
    ckpt_kernels.convert(model)
    assert not finalized
    del Finalized.__del__


class ReadLater(Gated):
    """A part of the gate is read after it, so the run cannot be one call."""

    def forward(self, x: Tensor) -> Tensor:
        packed = F.linear(x, self.up)
        gate, up = packed.chunk(2, dim=-1)
        gate = gate.clamp(max=self.limit)
        up = up.clamp(min=-self.limit, max=self.limit)
        gated = F.silu(gate) * up
        return F.linear(gated, self.down) * gate.sum()


class Placed(Gated):
    """The target of the last statement reads a name of the run."""

    def forward(self, x: Tensor) -> Tensor:
        packed = F.linear(x, self.up)
        gate, up = packed.chunk(2, dim=-1)
        gate = gate.clamp(max=self.limit)
        gated: dict[int, Tensor] = {}
        gated[gate.dim()] = F.silu(gate) * up.clamp(min=-self.limit, max=self.limit)
        return F.linear(gated[x.dim()], self.down)


class Exclusive(Gated):
    """Torch's hardtanh has the gradient 0 at the limits, and its clamp 1, before torch 2.14."""

    def gate(self, packed: Tensor) -> Tensor:
        gate, value = packed.chunk(2, dim=-1)
        return F.silu(gate.clamp(max=1.5)) * F.hardtanh(value, -1.5, 1.5)


class After(Gated):
    """A clamp after the activation."""

    def gate(self, packed: Tensor) -> Tensor:
        gate, value = packed.chunk(2, dim=-1)
        return F.silu(gate).clamp(max=self.limit) * value.clamp(min=-self.limit, max=self.limit)


class Wide(Gated):
    """Another limit of the value than of the gate."""

    def gate(self, packed: Tensor) -> Tensor:
        gate, value = packed.chunk(2, dim=-1)
        return F.silu(gate.clamp(max=self.limit)) * value.clamp(min=-self.alpha, max=self.alpha)


class Bounded(Gated):
    """Parts that larger tensors than those of a trial would show."""

    def gate(self, packed: Tensor) -> Tensor:
        gate, value = packed.to(packed.dtype)[..., :4096].chunk(2, dim=-1)
        return F.silu(gate) * value


class Decides(Gated):
    def gate(self, packed: Tensor) -> Tensor:
        gate, value = packed.chunk(2, dim=-1)
        if gate.max() > 1e40:
            return gate
        return F.silu(gate.to(packed.dtype)) * value


class Detached(Gated):
    def gate(self, packed: Tensor) -> Tensor:
        gate, value = packed.chunk(2, dim=-1)
        return F.silu(gate.clamp(max=self.limit)).detach() * value.clamp(min=-self.limit, max=self.limit)


class Counts(Gated):
    """A write amid the statements."""

    def gate(self, packed: Tensor) -> Tensor:
        gate, value = packed.to(packed.dtype).chunk(2, dim=-1)
        self.calls = 1
        return F.silu(gate) * value


class Widened(Gated):
    """The gate has another dtype than the packed tensor, which shows in float64 only."""

    def gate(self, packed: Tensor) -> Tensor:
        gate, value = packed.float().chunk(2, dim=-1)
        return F.silu(gate) * value


class Scaled(Gated):
    """A parameter."""

    def gate(self, packed: Tensor) -> Tensor:
        gate, value = packed.to(packed.dtype).chunk(2, dim=-1)
        return F.silu(gate) * value * self.down.sum()


class Computed(Interleaved):
    """Each load of an attribute runs code."""

    def __getattribute__(self, name: str) -> object:
        return 0.5 if name == "limit" else super().__getattribute__(name)


class Property(Chunked):
    @property
    def act(self) -> Callable[[Tensor], Tensor]:
        return torch.relu

    @act.setter
    def act(self, value: nn.Module) -> None:
        self._modules["act"] = value


@pytest.mark.parametrize(
    "kind",
    (
        Widened,
        Computed,
        Property,
        ReadLater,
        Placed,
        pytest.param(Exclusive, marks=pytest.mark.skipif(CLAMP_STOPS_AT_LIMIT, reason="both have the gradient 0")),
        After,
        Wide,
        Bounded,
        Decides,
        Detached,
        Counts,
        Scaled,
    ),
    ids=lambda kind: kind.__name__,
)
def test_other_functions_are_no_gates(kind: type[nn.Module]) -> None:
    model, twin = twins(kind)
    assert "packed gate (" not in (replacement_of(ckpt_kernels.convert(model), "") or "")
    given = random_tensor(2, 32, WIDTH)
    assert close(results_of(model, given), results_of(twin, given), 1e-5)


def test_the_experts_of_gpt_oss() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GptOssConfig(
        hidden_size=16, intermediate_size=16, num_local_experts=2, num_experts_per_tok=1, num_attention_heads=2
    )
    config._experts_implementation = "eager"
    experts = transformers.models.gpt_oss.modeling_gpt_oss.GptOssExperts(config).to(DEVICE)
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    model, twin = twins(lambda: experts)
    report = ckpt_kernels.convert(model)
    assert (replacement_of(report, "") or "").startswith("packed gate (quick_gelu, limit 7, offset 1)")
    x = random_tensor(12, 16)
    indices = torch.arange(12, device=DEVICE).remainder(2).unsqueeze(1)
    weights = torch.ones(12, 1, device=DEVICE)

    class Routed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, indices, weights)

    assert close(results_of(Routed(model), x), results_of(Routed(twin), x), 1e-5)

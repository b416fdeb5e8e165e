"""Small calls by plans give the same bits as the full path, which serves all calls without a plan."""

import threading
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

import ckpt_kernels.nn as ours
from benchmarks.small import Small, blocks, own_calls
from ckpt_kernels import backends, functional, ops, recompute, use_backend
from ckpt_kernels.thin import direct, plan_cache

from .call_plans import Counted, full_path

pytestmark = [
    pytest.mark.skipif(not direct.is_available, reason="calls cannot be made directly here"),
    pytest.mark.usefixtures("without_plans"),
]

BLOCKS = blocks()
BY_NAME = {block.name: block for block in BLOCKS}


def tensors_of(block: Small, dtype: torch.dtype = torch.float32, columns: int | None = None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = block.shape if columns is None else (*block.shape[:-1], columns)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for _ in range(block.tensors)]


def results(call: Callable[..., object], tensors: Sequence[Tensor], sources: Sequence[Tensor]) -> list[Tensor]:
    """Outputs and gradients, from the same seed."""
    torch.manual_seed(0)
    outputs = call(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape) for y in outputs]
    return [*outputs, *torch.autograd.grad(outputs, sources, grads)]


@pytest.mark.parametrize("name", BY_NAME)
def test_a_plan_gives_the_bits_of_the_full_path(name: str, counted: Counted) -> None:
    block = BY_NAME[name]
    call, tensors = block.ours, tensors_of(block)
    sources = [*tensors, *(call.parameters() if isinstance(call, nn.Module) else ())]
    buffers = [b.clone() for b in call.buffers()] if isinstance(call, nn.Module) else []

    def run() -> list[Tensor]:
        for buffer, value in zip(call.buffers() if buffers else (), buffers, strict=True):
            buffer.copy_(value)
        return [*results(call, tensors, sources), *(b.clone() for b in (call.buffers() if buffers else ()))]

    with full_path():
        expected = run()
    first, second = run(), run()
    assert counted.served == 1, "only the second call finds a plan"
    for found in (first, second):
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b) and a.stride() == b.stride()
    with torch.no_grad():
        torch.manual_seed(0)
        outputs = call(*tensors)
    output = outputs[0] if isinstance(outputs, tuple) else outputs
    assert torch.equal(output, expected[0]) and not output.requires_grad


@pytest.mark.parametrize("name", BY_NAME)
def test_second_gradients_after_a_plan_use_the_full_rule(name: str, counted: Counted) -> None:
    """Also for blocks with a second output that is not read."""
    block = BY_NAME[name]
    call, tensors = block.ours, tensors_of(block)
    sources = [*tensors, *(call.parameters() if isinstance(call, nn.Module) else ())]

    def gradients() -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        outputs = call(*tensors)
        first = outputs[0] if isinstance(outputs, tuple) else outputs
        grad = torch.linspace(-1, 1, first.numel()).reshape(first.shape)
        return torch.autograd.grad(first, sources, grad, create_graph=True)

    with full_path():
        expected = gradients()
    gradients()
    for a, b in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(a, b)
    assert counted.served


@pytest.mark.parametrize("columns", [1, 7, 63])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_widths_and_dtypes(columns: int, dtype: torch.dtype) -> None:
    """Widths of the last dimension that are no multiples of a vector."""
    x = torch.randn(3, 5, columns, dtype=torch.float64).to(dtype).requires_grad_()
    packed = torch.randn(3, 5, 2 * columns, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(columns, requires_grad=True)
    if dtype == torch.float64:
        weight = weight.detach().double().requires_grad_()
    calls = (
        (lambda: functional.layer_norm(x, (columns,), weight, activation="silu"), [x, weight]),
        (lambda: functional.rms_norm(x, (columns,), weight), [x, weight]),
        (lambda: functional.bias_act(x, weight, activation="gelu"), [x, weight]),
        (lambda: functional.bias_act(x, activation="tanh"), [x]),
        (lambda: functional.glu(x, x * 2), [x]),
        *((lambda k=k: functional.packed_glu(packed, layout=k), [packed]) for k in ("gate_first", "interleaved")),
    )
    for call, sources in calls:
        with full_path():
            expected = results(call, (), sources)
        call()
        for a, b in zip(results(call, (), sources), expected, strict=True):
            assert torch.equal(a, b)


def layer() -> tuple[nn.Module, Tensor]:
    """A norm that has a plan, and its input."""
    norm, x = ours.LayerNorm(64), torch.randn(8, 64, requires_grad=True)
    norm(x)
    return norm, x


class _Seen(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen = [*getattr(self, "seen", ()), str(function)]
        return function(*args, **(kwargs or {}))


class _Subclass(Tensor):
    pass


def test_modes_transforms_and_profilers_see_the_op(counted: Counted) -> None:
    norm, x = layer()
    with full_path():
        expected = norm(x)
    found = counted.found
    with _Seen() as mode:
        assert torch.equal(norm(x), expected)
    assert any("ckpt_kernels.row_norm" in op for op in mode.seen)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        norm(x)
    assert any("row_norm" in event.key for event in profile.key_averages())
    torch.testing.assert_close(torch.func.vmap(norm)(x), expected)
    torch.testing.assert_close(torch.func.jvp(norm, (x,), (x,))[0], expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        assert torch.autograd.forward_ad.unpack_dual(norm(dual)).tangent is not None
    assert torch.equal(norm(x.detach().as_subclass(_Subclass)).as_subclass(Tensor), expected)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert norm(x.detach()).shape == x.shape
    assert norm.to("meta")(x.detach().to("meta")).is_meta
    assert counted.found == found


def test_torch_compile_gives_the_same_bits() -> None:
    norm, x = layer()
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), norm(x))


def test_unusual_tensors_of_a_plans_shape() -> None:
    """Negated, sparse, and without memory."""
    norm, x = layer()
    plain = x.detach()
    negated = torch.complex(torch.zeros(8, 64), -plain).conj().imag
    assert negated.is_neg() and torch.equal(norm(negated), norm(plain.clone()))
    assert not direct.is_plain(torch._efficientzerotensor((8, 64)))
    with pytest.raises(RuntimeError, match="input has layout"):
        norm(plain.to_sparse())


def test_errors_are_those_of_the_full_path() -> None:
    norm, x = layer()
    norm.weight = nn.Parameter(torch.ones(1, 64))
    with pytest.raises(RuntimeError, match=r"weight has shape \(1, 64\); expected \(64,\)"):
        norm(x)
    with pytest.raises(RuntimeError, match="input has shape"):
        layer()[0](x[:, :32])
    with pytest.raises(TypeError, match="input is int"):
        layer()[0](3)


def test_gradients_of_every_kind() -> None:
    norm, x = layer()
    parameters = [x, *norm.parameters()]
    grad = torch.randn(8, 64)
    kinds = {
        "plain": lambda: grad,
        "expanded": lambda: grad[:1].expand(8, 64),
        "of a sum": lambda: grad[:1, :1].expand(8, 64),
        "transposed": lambda: grad.t().contiguous().t(),
        "negated": lambda: torch.complex(torch.zeros(8, 64), -grad).conj().imag,
    }
    for kind in kinds.values():
        with full_path():
            expected = torch.autograd.grad(norm(x), parameters, kind().clone().contiguous())
        for a, b in zip(torch.autograd.grad(norm(x), parameters, kind()), expected, strict=True):
            assert torch.equal(a, b)
    batch = torch.randn(3, 8, 64)
    found = torch.autograd.grad(norm(x), parameters, batch, is_grads_batched=True)
    for i, sample in enumerate(batch):
        for a, b in zip(found, torch.autograd.grad(norm(x), parameters, sample), strict=True):
            torch.testing.assert_close(a[i], b)


def test_gradients_of_gradients() -> None:
    norm, x = layer()
    norm, x = norm.double(), x.detach().double()[:2, :].requires_grad_()
    norm(x)
    assert torch.autograd.gradgradcheck(norm, (x,), atol=1e-4)


@pytest.mark.parametrize("frozen", ["input", "weight", "bias", "input and weight"])
def test_frozen_operands(frozen: str) -> None:
    norm, x = layer()
    for name, tensor in (("input", x), ("weight", norm.weight), ("bias", norm.bias)):
        tensor.requires_grad_(name not in frozen)
    sources = [t for t in (x, norm.weight, norm.bias) if t.requires_grad]
    with full_path():
        expected = results(norm, (x,), sources)
    for a, b in zip(results(norm, (x,), sources), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", BY_NAME)
def test_a_plan_saves_the_same_tensors_as_the_full_path(name: str) -> None:
    """In number, dtype, shape and strides, which torch's checkpoint compares."""
    block = BY_NAME[name]
    call, tensors = block.ours, tensors_of(block)

    def saved() -> list[tuple]:
        kept: list[tuple] = []

        def pack(tensor: Tensor) -> Tensor:
            kept.append((tensor.dtype, tuple(tensor.shape), tensor.stride()))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            call(*tensors)
        return kept

    with full_path():
        expected = saved()
    call(*tensors)
    assert saved() == expected and expected


def test_mixed_dtypes_under_autocast_have_no_plan(counted: Counted) -> None:
    """Autocast promotes the operands first, and a plan would read the given tensors."""
    x, other = torch.randn(8, 64), torch.randn(8, 64).bfloat16()
    calls = (
        lambda a, b: functional.add_layer_norm(a, b, 64)[0],
        lambda a, b: functional.gated_rms_norm(a, b, 64),
        functional.glu,
        lambda a, b: functional.batch_norm(a, None, None, training=True, residual=b),
    )
    for call in calls:
        for pair in ((x, other), (other, x)):
            expected = call(*(t.float() for t in pair))
            found = counted.found
            for _ in range(2):
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    assert torch.equal(call(*pair), expected)
            assert counted.found == found


def test_running_statistics_that_require_a_gradient_are_an_error() -> None:
    x, running = torch.randn(8, 4, 3), [torch.zeros(4), torch.ones(4)]
    for norm in (functional.batch_norm, functional.instance_norm):
        call = (lambda n: lambda: n(x, *running, None, None, True))(norm)
        call()
        running[0].requires_grad_()
        with pytest.raises(RuntimeError, match="running_mean requires a gradient"):
            call()
        running[0].requires_grad_(False)


def test_in_place_writes_are_detected() -> None:
    norm, x = layer()
    y = x * 1
    out = norm(y)
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_plans_respect_the_backend_of_the_thread_and_the_forward(counted: Counted) -> None:
    norm, x = layer()
    found = counted.found
    with use_backend("reference"):
        norm(x)
    assert counted.found == found
    y = norm(x)
    with use_backend("reference"):
        by_plan = torch.autograd.grad(y, x, torch.ones(8, 64))[0]
    assert torch.equal(by_plan, torch.autograd.grad(norm(x), x, torch.ones(8, 64))[0])
    names = []

    def elsewhere() -> None:
        names.append(backends.chosen())
        norm(x)

    found = counted.found
    with use_backend("reference"):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert counted.found == found + (names[0] != "reference")


def test_a_sum_of_a_norm_needs_no_full_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> tuple:
        raise AssertionError("the full path ran")

    norm, x = layer()
    norm(x)
    monkeypatch.setattr(ops.row_norm.row_norm, "full_backward", fail)
    norm(x).sum().backward()


def test_autocast_changes_nothing_on_the_cpu() -> None:
    norm, x = layer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(norm(x), norm(x.detach().clone()))


def test_hooks_unpack_once() -> None:
    """torch's checkpoint allows one unpack a tensor, with a plan and on the full path."""
    norm, x = layer()
    for grad in (torch.ones(8, 64), torch.complex(torch.zeros(8, 64), -torch.ones(8, 64)).conj().imag):
        unpacked = []

        def unpack(tensor: Tensor, unpacked: list = unpacked) -> Tensor:
            unpacked.append(1)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            y = norm(x)
        torch.autograd.grad(y, x, grad)
        assert len(unpacked) == 5


def test_outputs_of_plans_are_discarded() -> None:
    """Within `discard_outputs` a plan's output has a recipe, as on the full path."""
    model, x = nn.Sequential(ours.LayerNorm(64), nn.Linear(64, 64)), torch.randn(8, 64, requires_grad=True)
    expected = results(model, (x,), [x, *model.parameters()])
    for _ in range(2):
        kept = []

        def pack(tensor: Tensor, kept: list = kept) -> Tensor:
            kept.append(tensor.untyped_storage().data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), recompute.discard_outputs():
            y = model[0](x)
            z = model[1](y)
        assert y.untyped_storage().data_ptr() not in kept
        grads = torch.linspace(-1, 1, z.numel()).reshape(z.shape)
        for a, b in zip([z, *torch.autograd.grad(z, [x, *model.parameters()], grads)], expected, strict=True):
            assert torch.equal(a, b)


def test_a_parametrized_weight_is_used() -> None:
    class Twice(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    norm, x = layer()
    torch.nn.utils.parametrize.register_parametrization(norm, "weight", Twice())
    torch.testing.assert_close(norm(x), torch.nn.functional.layer_norm(x, (64,), norm.weight, norm.bias))

    class Shifted(ours.LayerNorm):
        weight = property(lambda self: self._parameters["weight"] + 1)

    shifted = ours.LayerNorm(64)
    shifted.__class__ = Shifted
    torch.testing.assert_close(shifted(x), torch.nn.functional.layer_norm(x, (64,), shifted.weight, shifted.bias))


def test_a_layer_norm_makes_few_python_calls() -> None:
    norm, x = layer()
    grad = torch.randn(8, 64)
    out = norm(x)
    assert own_calls(lambda: norm(x)) <= 8
    assert own_calls(lambda: torch.autograd.grad(out, [x, *norm.parameters()], grad)) <= 6


def test_the_number_of_plans_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_cache, "MOST_PLANS", 3)
    for rows in range(1, 8):
        functional.bias_act(torch.ones(rows, 2), activation="gelu")
    assert len(plan_cache._plans) == 3


def test_mutable_options_are_read_at_every_call() -> None:
    gelu, x = nn.GELU(), torch.randn(8, 64)
    functional.bias_act(x, activation=gelu)
    gelu.approximate = "tanh"
    torch.testing.assert_close(functional.bias_act(x, activation=gelu), gelu(x))


def test_calls_without_plans_work() -> None:
    norm, x = layer()
    with full_path():
        assert norm(x).shape == (8, 64)
    assert not direct.direct("row_norm_forward")(*[None] * 18)

"""Small calls: the same bits as the full path, which serves whatever a plan does not."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn

import ckpt_kernels.nn as ours
from benchmarks.small import Small, blocks, own_calls
from ckpt_kernels import backends, functional, recompute, thin, use_backend
from ckpt_kernels.thin import direct, plan, plan_cache

pytestmark = pytest.mark.skipif(not direct.is_available, reason="calls cannot be made directly here")

BLOCKS = blocks()
BY_NAME = {block.name: block for block in BLOCKS}


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    plan_cache._plans.clear()
    yield
    plan_cache._plans.clear()


@contextlib.contextmanager
def full_path() -> Iterator[None]:
    """No call goes by a plan."""
    key = plan_cache.key
    plan_cache.key = lambda *call: None
    try:
        yield
    finally:
        plan_cache.key = key


class Counted:
    """How many calls went by a plan and were not refused."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found = self.refused = 0
        plan_of, refused = plan_cache.plan_of, plan.Plan.fall_back

        def counted(*call: object) -> object:
            found = plan_of(*call)
            self.found += found is not None
            return found

        def counted_refusal(*arguments: object) -> object:
            self.refused += 1
            return refused(*arguments)

        monkeypatch.setattr(thin, "plan_of", counted)
        monkeypatch.setattr(plan.Plan, "fall_back", counted_refusal)

    @property
    def served(self) -> int:
        return self.found - self.refused


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


def tensors_of(block: Small, dtype: torch.dtype = torch.float32, columns: int | None = None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = block.shape if columns is None else (*block.shape[:-1], columns)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for _ in range(block.tensors)]


def results(call: Callable[..., object], tensors: Sequence[Tensor], wanted: Sequence[Tensor]) -> list[Tensor]:
    """Outputs and gradients, from the same seed."""
    torch.manual_seed(0)
    outputs = call(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape) for y in outputs]
    return [*outputs, *torch.autograd.grad(outputs, wanted, grads)]


@pytest.mark.parametrize("name", BY_NAME)
def test_a_plan_gives_the_bits_of_the_full_path(name: str, counted: Counted) -> None:
    block = BY_NAME[name]
    call, tensors = block.ours, tensors_of(block)
    wanted = [*tensors, *(call.parameters() if isinstance(call, nn.Module) else ())]
    buffers = [b.clone() for b in call.buffers()] if isinstance(call, nn.Module) else []

    def run() -> list[Tensor]:
        for buffer, value in zip(call.buffers() if buffers else (), buffers, strict=True):
            buffer.copy_(value)
        return [*results(call, tensors, wanted), *(b.clone() for b in (call.buffers() if buffers else ()))]

    with full_path():
        expected = run()
    first, second = run(), run()
    assert counted.served == 1, "the second call is the one like an earlier one"
    for found in (first, second):
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b) and a.stride() == b.stride()
    with torch.no_grad():
        torch.manual_seed(0)
        again = call(*tensors)
    assert torch.equal(again[0] if isinstance(again, tuple) else again, expected[0])
    assert not (again[0] if isinstance(again, tuple) else again).requires_grad


@pytest.mark.parametrize("name", BY_NAME)
def test_the_full_rule_goes_on_where_a_plan_has_begun(name: str, counted: Counted) -> None:
    """For gradients of gradients, and for an output that nobody reads."""
    block = BY_NAME[name]
    call, tensors = block.ours, tensors_of(block)
    wanted = [*tensors, *(call.parameters() if isinstance(call, nn.Module) else ())]

    def gradients() -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        outputs = call(*tensors)
        first = outputs[0] if isinstance(outputs, tuple) else outputs
        grad = torch.linspace(-1, 1, first.numel()).reshape(first.shape)
        return torch.autograd.grad(first, wanted, grad, create_graph=True)

    with full_path():
        expected = gradients()
    gradients()
    for a, b in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(a, b)
    assert counted.served


@pytest.mark.parametrize("columns", [1, 7, 63])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_widths_and_dtypes(columns: int, dtype: torch.dtype) -> None:
    """Of the last dimension, which no vector holds a whole number of times."""
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
    for call, wanted in calls:
        with full_path():
            expected = results(call, (), wanted)
        call()
        for a, b in zip(results(call, (), wanted), expected, strict=True):
            assert torch.equal(a, b)


def layer() -> tuple[nn.Module, Tensor]:
    """A norm whose plan is there."""
    norm, x = ours.LayerNorm(64), torch.randn(8, 64, requires_grad=True)
    norm(x)
    return norm, x


class _Seen(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen = [*getattr(self, "seen", ()), str(function)]
        return function(*args, **(kwargs or {}))


class _Subclass(Tensor):
    pass


def test_whatever_must_see_the_op_sees_it(counted: Counted) -> None:
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


def test_under_torch_compile() -> None:
    norm, x = layer()
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), norm(x))


def test_tensors_whose_memory_does_not_say_it_all(counted: Counted) -> None:
    """Negated, sparse, without memory, and laid out in another way: all of the plan's shape."""
    norm, x = layer()
    plain = x.detach()
    negated = torch.complex(torch.zeros(8, 64), -plain).conj().imag
    assert negated.is_neg() and torch.equal(norm(negated), norm(plain.clone()))
    assert not direct.is_plain(torch._efficientzerotensor((8, 64)))
    transposed = plain.t().contiguous().t()
    assert torch.equal(norm(transposed), norm(plain)) and norm(transposed).is_contiguous()
    with pytest.raises(RuntimeError, match="input has layout"):
        norm(plain.to_sparse())
    assert counted.refused >= 1


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
    for i, one in enumerate(batch):
        for a, b in zip(found, torch.autograd.grad(norm(x), parameters, one), strict=True):
            torch.testing.assert_close(a[i], b)


def test_gradients_of_gradients() -> None:
    norm, x = layer()
    norm, x = norm.double(), x.detach().double()[:2, :].requires_grad_()
    norm(x)
    assert torch.autograd.gradgradcheck(norm, (x,), atol=1e-4)


@pytest.mark.parametrize("frozen", ["input", "weight", "bias", "input and weight"])
def test_what_wants_no_gradient(frozen: str) -> None:
    norm, x = layer()
    for name, tensor in (("input", x), ("weight", norm.weight), ("bias", norm.bias)):
        tensor.requires_grad_(name not in frozen)
    wanted = [t for t in (x, norm.weight, norm.bias) if t.requires_grad]
    with full_path():
        expected = results(norm, (x,), wanted)
    for a, b in zip(results(norm, (x,), wanted), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", BY_NAME)
def test_what_is_saved_is_what_the_full_path_saves(name: str) -> None:
    """To the last tensor, its dtype, shape and strides: torch's checkpoint compares them."""
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


def test_dtypes_that_meet_under_autocast_have_no_plan(counted: Counted) -> None:
    """They are promoted first, and a plan would read the tensors as they are given."""
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


def test_running_statistics_that_require_a_gradient_are_refused() -> None:
    x, running = torch.randn(8, 4, 3), [torch.zeros(4), torch.ones(4)]
    for norm in (functional.batch_norm, functional.instance_norm):
        call = (lambda n: lambda: n(x, *running, None, None, True))(norm)
        call()
        running[0].requires_grad_()
        with pytest.raises(RuntimeError, match="running_mean requires a gradient"):
            call()
        running[0].requires_grad_(False)


def test_writes_in_place_are_noticed() -> None:
    norm, x = layer()
    y = x * 1
    out = norm(y)
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_the_backend_is_that_of_the_thread_and_of_the_forward_pass(counted: Counted) -> None:
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


def test_autocast_changes_nothing_on_the_cpu() -> None:
    norm, x = layer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(norm(x), norm(x.detach().clone()))


def test_hooks_unpack_once() -> None:
    """As torch's checkpoint demands, whichever way the backward pass goes."""
    norm, x = layer()
    for grad in (torch.ones(8, 64), torch.ones(1, 1).expand(8, 64)):
        unpacked = []

        def unpack(tensor: Tensor, unpacked: list = unpacked) -> Tensor:
            unpacked.append(1)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            y = norm(x)
        torch.autograd.grad(y, x, grad)
        assert len(unpacked) == 5


def test_outputs_are_let_go_of() -> None:
    """Within `discard_outputs` a plan's output has a recipe, as the full path's has."""
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


def test_a_parametrized_weight_is_the_one_that_is_used() -> None:
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


def test_a_layer_norm_is_few_calls() -> None:
    norm, x = layer()
    grad = torch.randn(8, 64)
    out = norm(x)
    assert own_calls(lambda: norm(x)) <= 8
    assert own_calls(lambda: torch.autograd.grad(out, [x, *norm.parameters()], grad)) <= 6


def test_plans_do_not_grow_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_cache, "MOST_PLANS", 3)
    for rows in range(1, 8):
        functional.bias_act(torch.ones(rows, 2), activation="gelu")
    assert len(plan_cache._plans) == 3


def test_options_that_may_change_are_not_remembered() -> None:
    gelu, x = nn.GELU(), torch.randn(8, 64)
    functional.bias_act(x, activation=gelu)
    gelu.approximate = "tanh"
    torch.testing.assert_close(functional.bias_act(x, activation=gelu), gelu(x))


def test_without_the_module_nothing_changes() -> None:
    norm, x = layer()
    with full_path():
        assert norm(x).shape == (8, 64)
    assert not direct.direct("row_norm_forward")(*[None] * 18)

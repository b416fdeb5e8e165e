"""Offload of saved tensors to host memory: equal gradients, prefetching, and no leaks. Simulated on the CPU."""

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import ckpt_kernels
from ckpt_kernels import offload
from ckpt_kernels.memory import peak_bytes, saved_bytes

from .trained import blocks

pytestmark = pytest.mark.filterwarnings("ignore:the model is on the CPU, where offload is simulated")


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> Iterator[weakref.WeakSet]:
    """The living offloaded storages."""
    storages: weakref.WeakSet = weakref.WeakSet()
    original = offload.OffloadedStorage.__init__

    def init(self: offload.OffloadedStorage, *args: object) -> None:
        original(self, *args)
        storages.add(self)

    monkeypatch.setattr(offload.OffloadedStorage, "__init__", init)
    yield storages


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    model(x).square().mean().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("level", [None, "block", "output", "all"])
def test_gradients_are_the_same_to_the_last_bit(level: str | None, alive: weakref.WeakSet) -> None:
    model, x = blocks(), torch.randn(2, 8, 16)
    if level is not None:
        ckpt_kernels.convert(model, recompute=level)
    expected, kept = gradients(model, x), saved_bytes(model, x)
    assert offload.offload(model, "*", least=1) == ["0", "1"]
    for got, want in zip(gradients(model, x), expected, strict=True):
        assert torch.equal(got, want)
    assert kept > 0 and saved_bytes(model, x) == 0
    # Discarded tensors are not copied. Two layers may both keep the tensor that passes from one to the other.
    loss = model(x).sum()
    assert kept <= sum(storage.host.nbytes for storage in alive) <= kept + x.nbytes
    del loss
    ckpt_kernels.revert(model)
    assert not any(map(ckpt_kernels.is_converted, model))


class Conjugate(nn.Module):
    """Saves a conjugate, and a negative of a part of it, whose bits are not in the memory."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.complex(x, 2.0 * x).conj()
        return (y * y).real + y.imag * y.imag


def test_conjugates_and_negatives_stay_as_they_are() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    model = nn.Sequential(Conjugate())
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    with pytest.warns(UserWarning, match="simulated"):
        offload.offload(model, "0", least=1)
    (found,) = torch.autograd.grad(model(x).sum(), x)
    assert torch.equal(found, expected)


def test_small_tensors_and_parameters_stay() -> None:
    model, x = blocks(), torch.randn(2, 8, 16)
    kept = saved_bytes(model, x)
    offload.offload(model, "*", least=2**20)
    assert saved_bytes(model, x) == kept > 0
    ckpt_kernels.revert(model)
    # The largest tensors are the input and the output of the MLP's activation.
    offload.offload(model, "*", least=x.nbytes + 1)
    assert 0 < saved_bytes(model, x) < kept


def test_a_checkpoint_around_an_offloaded_layer() -> None:
    model, x = blocks(), torch.randn(2, 8, 16)
    want = gradients(model, x)
    offload.offload(model, "0", least=x.nbytes + 1)
    model.zero_grad()
    output = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    output.square().mean().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), want, strict=True))


def fetched_bytes(alive: weakref.WeakSet) -> int:
    """The bytes of offloaded storages that are on the device."""
    return sum(storage.on_device[0].nbytes for storage in alive if storage.on_device is not None)


def test_tensors_of_at_most_two_layers_are_on_the_device(
    alive: weakref.WeakSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured at the start of each layer and at each fetch, in two passes over a retained graph."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(4)))
    x, turns, most = torch.randn(4, 8), [], []
    fetch, begin = offload.from_host, offload.PrefetchSchedule.begin

    def fetched(host: torch.Tensor, device: torch.device) -> tuple:
        most.append(fetched_bytes(alive) + host.nbytes)
        found = fetch(host, device)
        assert found[0].data_ptr() != host.data_ptr()
        return found

    def begun(self: offload.PrefetchSchedule, call: offload.LayerCall) -> None:
        is_new = call.last_pass != torch._C._current_graph_task_id()
        begin(self, call)
        if is_new:
            turns.append(fetched_bytes(alive))

    monkeypatch.setattr(offload, "from_host", fetched)
    monkeypatch.setattr(offload.PrefetchSchedule, "begin", begun)
    offload.offload(model, "*", least=1)
    loss = model(x).sum()
    # The inputs of the linear layer and of the activation.
    layer = 2 * x.nbytes
    assert not most and sum(storage.host.nbytes for storage in alive) == 4 * layer
    assert x.data_ptr() not in {storage.host.data_ptr() for storage in alive}
    for _ in range(2):
        turns.clear(), most.clear()
        loss.backward(retain_graph=True)
        assert turns == [2 * layer] * 3 + [layer] and fetched_bytes(alive) == 0
        # Each tensor is fetched once, and at most two layers' tensors are there.
        assert len(most) == 8 and max(most) == 2 * layer
    # Reading an attribute of a node leaves no tensor on the device.
    node = loss.grad_fn.next_functions[0][0]
    assert node._saved_self.shape == x.shape and fetched_bytes(alive) == 0


def test_many_steps_leave_no_storages(alive: weakref.WeakSet) -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2)))
    offload.offload(model, "*", least=1)
    x, counts = torch.randn(2, 4), set()
    for _ in range(200):
        loss = model(x).sum()
        counts.add(len(alive))
        loss.backward()
        del loss
    gc.collect()
    assert len(counts) == 1 and len(alive) == 0


def test_two_passes_over_a_retained_graph() -> None:
    model, x = blocks(), torch.randn(2, 8, 16)
    offload.offload(model, "*", least=1)
    loss = model(x).square().mean()
    parameters = list(model.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("least", [1, 2**20])
@pytest.mark.parametrize("written", ["weight", "input", "result"])
@pytest.mark.parametrize("is_offloaded", [False, True])
def test_a_write_between_the_passes_is_torchs_error(is_offloaded: bool, written: str, least: int) -> None:
    model, x = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))), torch.randn(2, 4)
    found = {"weight": model[0][2].weight, "input": x}
    model[0][1].register_forward_hook(lambda module, args, output: found.update(result=output))
    if is_offloaded:
        offload.offload(model, "0", least=least)
    loss = model(x).sum()
    with torch.no_grad():
        found[written].add_(1)
    with pytest.raises(RuntimeError, match=r"modified by an in-?place operation"):
        loss.backward()


@pytest.mark.parametrize("least", [1, 2**20])
def test_an_error_in_a_pass_leaves_no_storages(alive: weakref.WeakSet, least: int) -> None:
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, input: torch.Tensor, where: str) -> torch.Tensor:
            ctx.where = where
            if where == "forward":
                raise ArithmeticError
            return input.clone()

        @staticmethod
        def backward(ctx: object, grad_output: torch.Tensor) -> tuple:
            if ctx.where == "backward":
                raise ArithmeticError
            return grad_output, None

    class Layer(nn.Module):
        where = ""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return Fails.apply(self.linear(input).tanh(), self.where).tanh()

    model, x = nn.Sequential(*(Layer() for _ in range(4))), torch.randn(2, 4)
    want = gradients(model, x)
    offload.offload(model, "*", least=least)
    gc.collect()
    gc.disable()
    try:
        for where in ("forward", "backward"):
            model[1].where = where
            try:
                loss = model(x).square().mean()
                loss.backward(retain_graph=True)
            except ArithmeticError:
                pass
            else:
                raise AssertionError(f"{where} raises nothing")
            if where == "backward":
                # A second pass over the same graph fails at the same node.
                with pytest.raises(ArithmeticError):
                    loss.backward()
                del loss
                gc.collect()
            assert len(alive) == 0
    finally:
        gc.enable()
    model[1].where = ""
    assert all(map(torch.equal, gradients(model, x), want))


def test_only_the_view_of_a_large_storage_is_copied(alive: weakref.WeakSet) -> None:
    model, large = nn.Sequential(nn.Sequential(nn.Linear(4, 4))), torch.randn(100, 2, 4)
    # Tensors with exactly `least` bytes are offloaded.
    offload.offload(model, "0", least=large[3].nbytes)
    loss = model(large[3]).sum()
    assert [storage.host.nbytes for storage in alive] == [large[3].nbytes]
    loss.backward()
    assert torch.equal(model[0][0].weight.grad, large[3].sum(0).expand(4, 4))


class Multiplying(nn.Module):
    """Multiplies by a buffer, by a tensor that is written to in between, and by a conjugate."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("buffer", torch.full((2, 4), 3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = torch.full_like(x, 2.0)
        # This graph, over which no backward pass runs, keeps its saved tensors alive.
        self.unused = x * scale
        scale.add_(5.0)
        turned = torch.complex(x, x) * torch.full((2, 4), 1 + 1j).conj()
        return x * self.buffer + x * scale + torch.view_as_real(turned).sum(-1)


def test_buffers_stay_and_written_tensors_are_copied_again(alive: weakref.WeakSet) -> None:
    model, x = nn.Sequential(Multiplying()), torch.randn(2, 4, requires_grad=True)
    offload.offload(model, "0", least=1)
    loss = model(x).sum()
    assert model[0].buffer.flatten().tolist() not in [storage.host.view(torch.float32).tolist() for storage in alive]
    loss.backward()
    assert torch.equal(x.grad, torch.full_like(x, 3.0 + 7.0 + 2.0))
    with torch.autograd.graph.disable_saved_tensors_hooks("none here"):
        model(x).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 24.0))


class Scaled(nn.Module):
    """Multiplies by a parameter of its own and by one that belongs to nobody below; reads a part and the whole."""

    def __init__(self, foreign: nn.Parameter) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.ones(8))
        self.foreign = [foreign]

    def forward(self, x: Tensor) -> Tensor:
        whole = x * self.own * self.foreign[0]
        part = whole[:, :4]
        return (part * part).sum() + (whole * whole).sum()


def test_tensors_that_stay_are_passed_to_hooks_around_as_they_are(alive: weakref.WeakSet) -> None:
    """Parameters stay, those of other modules too."""
    foreign, seen = nn.Parameter(torch.full((8,), 2.0)), []
    model, x = nn.Sequential(Scaled(foreign)), torch.randn(4, 8, requires_grad=True)
    offload.offload(model, "0", least=foreign.nbytes)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: seen.append(tensor) or tensor, lambda tensor: tensor):
        output = model(x)
    assert [tensor is parameter for tensor, parameter in zip(seen, (model[0].own, foreign), strict=True)] == [True] * 2
    # Views of one storage are one copy: the input, the first product, and the second one with its part.
    assert output.requires_grad and [storage.host.nbytes for storage in alive] == [x.nbytes] * 3


def test_an_outer_contexts_products_are_discarded_in_an_offloaded_layer(alive: weakref.WeakSet) -> None:
    act = ckpt_kernels.nn.BiasAct(64, activation="gelu")
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 64), act, nn.Linear(64, 8)))
    x = torch.randn(128, 8, requires_grad=True)
    offload.offload(model, "0", least=x.nbytes)
    with ckpt_kernels.recompute.discard_outputs(model, products=True):
        loss = model(x).sum()
    assert [storage.host.nbytes for storage in alive] == [x.nbytes]
    del loss


def test_a_forward_without_gradients_is_no_part_of_the_chain(alive: weakref.WeakSet) -> None:
    model, x = blocks(), torch.randn(2, 8, 16)
    offload.offload(model, "*", least=1)
    hidden = model[0](x)
    with torch.no_grad():
        model[0](x)
    loss = model[1](hidden).sum()
    calls = {storage.call for storage in alive}
    assert [call for call in calls if call.before is not None and call.before() in calls]
    del loss


def test_a_pickle_has_the_least_size() -> None:
    model, x = blocks(), torch.randn(2, 8, 16)
    kept = saved_bytes(model, x)
    offload.offload(model, "*", least=2**20)
    assert saved_bytes(pickle.loads(pickle.dumps(model)), x) == kept


def test_a_copy_of_the_model_has_its_own_chain(alive: weakref.WeakSet) -> None:
    model, x = blocks(), torch.randn(2, 8, 16)
    offload.offload(model, "*", least=1)
    twin = copy.deepcopy(model)
    assert all(map(torch.equal, gradients(twin, x), gradients(model, x)))
    losses = model(x).sum(), twin(x).sum()
    calls = {storage.call for storage in alive}
    # Each chain has one first layer.
    assert len(calls) == 4 and sum(call.before is None or call.before() is None for call in calls) == 2
    del losses


def test_names_with_a_common_prefix_are_not_nested() -> None:
    assert offload.offload(nn.Sequential(*(nn.Tanh() for _ in range(11))), "*") == [str(n) for n in range(11)]


def test_bad_arguments_are_errors_and_a_cpu_is_a_warning() -> None:
    with pytest.raises(ValueError, match="layers is 'layers'; expected a name"):
        offload.offload(blocks(), "layers")
    for arguments, message in (((3, "0"), "model is int"), ((blocks(), 3), "layers is int")):
        with pytest.raises(TypeError, match=message):
            offload.offload(*arguments)
    replaced = nn.Sequential(nn.Tanh())
    replaced[0].forward = torch.tanh
    with pytest.raises(ValueError, match=r"expected layers whose forward is a plain method .*, unlike 0"):
        offload.offload(replaced, "0")
    with pytest.raises(ValueError, match="least is -1"):
        offload.offload(blocks(), "0", least=-1)
    with pytest.warns(UserWarning, match="simulated and saves no memory"):
        offload.offload(blocks(), "0")


def step_peak(model: nn.Module, x: torch.Tensor) -> int:
    """The peak in bytes of a step that accumulates into existing gradients, without host memory."""

    def step() -> None:
        model(x).square().mean().backward()

    step()
    return peak_bytes(step)


@pytest.mark.parametrize("level", ("none", "block", "output", "all", "output, tiles=2"))
def test_levels_with_offload(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "LEAST", 1)
    model, x = blocks(layers=4), torch.randn(8, 32, 16)
    ckpt_kernels.convert(model, recompute={"?": level})
    expected, kept, before = gradients(model, x), saved_bytes(model, x), step_peak(model, x)
    report = ckpt_kernels.convert(model, recompute={"?": f"{level}, offload"})
    assert report.recompute == f"by module: 4 x {level}, offload"
    for got, want in zip(gradients(model, x), expected, strict=True):
        assert torch.equal(got, want)
    assert saved_bytes(model, x) == 0
    # The saved tensors of at most two of the four layers are on the device.
    assert step_peak(model, x) <= before - kept / 4
    ckpt_kernels.revert(model)
    assert not any(map(ckpt_kernels.is_converted, model.modules()))


def test_a_single_layer_may_be_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "LEAST", 1)
    model, x = blocks(layers=3), torch.randn(8, 32, 16)
    ckpt_kernels.convert(model, recompute={"?": "output"})
    kept = saved_bytes(model, x)
    ckpt_kernels.convert(model, recompute={"?": "output", "1": "output, offload"})
    assert 0.6 * kept < saved_bytes(model, x) < 0.7 * kept


def test_memory_is_flat_over_many_steps(alive: weakref.WeakSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "LEAST", 1)
    model, x = blocks(), torch.randn(2, 8, 16)
    ckpt_kernels.convert(model, recompute={"?": "output, offload"})
    peak = step_peak(model, x)
    for _ in range(20):
        gradients(model, x)
        assert not alive
    assert step_peak(model, x) == peak


@pytest.mark.parametrize("spelled", ("checkpoint, offload", "output, offload, tiles=2", "output, offloaded", "offload"))
def test_levels_that_cannot_be_offloaded_are_an_error(spelled: str) -> None:
    with pytest.raises(ValueError, match=r"recompute\['0'\] is .*; all but checkpoint may end in ', offload'"):
        ckpt_kernels.convert(blocks(), recompute={"0": spelled})
    with pytest.raises(ValueError, match="recompute is 'output, offload', a level of single modules; expected"):
        ckpt_kernels.convert(blocks(), recompute="output, offload")


def test_lazy_modules_train_in_an_offloaded_layer() -> None:
    model, x = nn.Sequential(nn.Sequential(nn.LazyLinear(16), nn.GELU(), nn.Linear(16, 4))), torch.randn(2, 8)
    twin = copy.deepcopy(model)
    offload.offload(model, "0", least=1)
    model(x)
    twin.load_state_dict(model.state_dict())
    for got, want in zip(gradients(model, x), gradients(twin, x), strict=True):
        assert torch.equal(got, want)


def test_a_weight_with_other_data_has_the_gradient_for_the_values_of_the_forward_pass() -> None:
    model, x = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)), torch.randn(2, 8, requires_grad=True)
    expected = torch.autograd.grad(model(x).sum(), x)
    for whole in (False, True):
        twin = nn.Sequential(copy.deepcopy(model))
        offload.offload(twin, "0" if whole else "0.2", least=1)
        output = twin(x)
        twin[0][2].weight.data = torch.zeros(4, 16)
        torch.testing.assert_close(torch.autograd.grad(output.sum(), x), expected)


@pytest.mark.parametrize("of", ("0", "0.1"))
def test_a_scale_with_other_data_has_the_gradient_for_the_values_of_the_forward_pass(of: str) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4)))
    x = torch.randn(2, 8, requires_grad=True)
    expected = torch.autograd.grad(model(x).square().sum(), x)
    offload.offload(model, of, least=1)
    output = model(x)
    model[0][1].weight.data = torch.zeros(16)
    torch.testing.assert_close(torch.autograd.grad(output.square().sum(), x), expected)


def test_zero_tangents_stay_where_they_are() -> None:
    """Forward-mode differentiation saves tensors without memory."""
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)))
    x, tangent = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8)

    def step() -> list[Tensor]:
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.unpack_dual(model(torch.autograd.forward_ad.make_dual(x, tangent)))
            assert dual.tangent is not None
            return list(torch.autograd.grad(dual.tangent.square().sum(), list(model.parameters())[::2]))

    expected = step()
    with pytest.warns(UserWarning, match="simulated"):
        offload.offload(model, "0", least=1)
    torch.testing.assert_close(step(), expected)


class Returned(torch.autograd.Function):
    """Saves a tensor, and records the tensor that comes back."""

    found: ClassVar[list[Tensor]] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor, saved: Tensor) -> Tensor:
        ctx.save_for_backward(saved)
        return x * 1

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        Returned.found += ctx.saved_tensors
        return gradient, None


class WithViews(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        wide = torch.ones(1000, 8)
        quantized = torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)
        for view in (wide[::2, 1], wide[:100], wide.t()[:, :100], wide[:, 2:4], quantized):
            x = Returned.apply(x, view)
        return x


@pytest.mark.filterwarnings("ignore:.*quantize")
def test_unusual_tensors_come_back_as_they_were() -> None:
    model = nn.Sequential(WithViews())
    offload.offload(model, "0", least=1)
    Returned.found.clear()
    model(torch.ones(3, requires_grad=True)).sum().backward()
    quantized, *views = Returned.found
    assert [view.stride() for view in views] == [(8, 1), (1, 8), (8, 1), (16,)]
    assert quantized.is_quantized and torch.allclose(quantized.dequantize(), torch.ones(4))

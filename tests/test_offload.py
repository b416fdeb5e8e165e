"""What layers keep in host memory: the same gradients, in time, and nothing left behind. Simulated on the CPU."""

import copy
import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import ckpt_kernels
from ckpt_kernels import offload
from ckpt_kernels.memory import saved_bytes

from .trained import blocks

pytestmark = pytest.mark.filterwarnings("ignore:the model is on the CPU, where offload is simulated")


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> Iterator[weakref.WeakSet]:
    """The packets that there are."""
    packets: weakref.WeakSet = weakref.WeakSet()
    made = offload.Packet.__init__

    def init(self: offload.Packet, *args: object) -> None:
        made(self, *args)
        packets.add(self)

    monkeypatch.setattr(offload.Packet, "__init__", init)
    yield packets


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
    # What is let go of is not copied; what goes from one layer to the other may be kept by both.
    loss = model(x).sum()
    assert kept <= sum(packet.host.nbytes for packet in alive) <= kept + x.nbytes
    del loss
    ckpt_kernels.revert(model)
    assert not any(map(ckpt_kernels.is_converted, model))


def test_what_is_small_stays_and_parameters_do() -> None:
    model, x = blocks(), torch.randn(2, 8, 16)
    kept = saved_bytes(model, x)
    offload.offload(model, "*", least=2**20)
    assert saved_bytes(model, x) == kept > 0
    ckpt_kernels.revert(model)
    # The input and the output of the MLP's activation are the largest.
    offload.offload(model, "*", least=x.nbytes + 1)
    assert 0 < saved_bytes(model, x) < kept


def test_what_is_around_sees_what_stays() -> None:
    model, x = blocks(), torch.randn(2, 8, 16)
    want = gradients(model, x)
    offload.offload(model, "0", least=x.nbytes + 1)
    model.zero_grad()
    output = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    output.square().mean().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), want, strict=True))


def test_a_layer_s_tensors_come_back_one_layer_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(4)))
    x, told = torch.randn(4, 8), []
    visits: list[offload.Visit] = []
    begin, fetch, drop = offload.Visit.begin_backward, offload.Visit.fetch, offload.Visit.drop
    made = offload.Visit.__init__
    monkeypatch.setattr(offload.Visit, "__init__", lambda self, *args: (visits.append(self), made(self, *args))[1])
    for name, function in (("begin", begin), ("fetch", fetch), ("drop", drop)):

        def told_of(self: offload.Visit, name: str = name, function: object = function) -> None:
            told.append((name, visits.index(self)))
            function(self)

        monkeypatch.setattr(offload.Visit, name.replace("begin", "begin_backward"), told_of)
    offload.offload(model, "*", least=1)
    loss = model(x).sum()
    assert len(visits) == 4 and not told
    loss.backward()
    turns = [entry for entry in told if entry[0] != "begin"]
    assert turns == [
        ("fetch", 3), ("fetch", 2),
        ("fetch", 2), ("fetch", 1), ("drop", 3),
        ("fetch", 1), ("fetch", 0), ("drop", 2),
        ("fetch", 0), ("drop", 1),
    ]  # fmt: skip


def test_a_thousand_steps_leave_nothing(alive: weakref.WeakSet) -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2)))
    offload.offload(model, "*", least=1)
    x, counts = torch.randn(2, 4), set()
    for _ in range(1000):
        loss = model(x).sum()
        counts.add(len(alive))
        loss.backward()
        del loss
    gc.collect()
    assert len(counts) == 1 and len(alive) == 0


def test_a_graph_that_is_kept_is_walked_twice() -> None:
    model, x = blocks(), torch.randn(2, 8, 16)
    offload.offload(model, "*", least=1)
    loss = model(x).square().mean()
    parameters = list(model.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters)
    assert all(map(torch.equal, first, second))


def test_what_is_written_to_afterwards_was_copied_before() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4)))
    x = torch.randn(2, 4)
    want = gradients(model, x)
    offload.offload(model, "0", least=1)
    model.zero_grad()
    y = model(x)
    x.zero_()
    y.square().mean().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), want, strict=True))


def test_of_a_much_larger_memory_only_the_view_is_copied(alive: weakref.WeakSet) -> None:
    model, large = nn.Sequential(nn.Sequential(nn.Linear(4, 4))), torch.randn(100, 2, 4)
    offload.offload(model, "0", least=1)
    loss = model(large[3]).sum()
    assert [packet.host.nbytes for packet in alive] == [large[3].nbytes]
    loss.backward()
    assert torch.equal(model[0][0].weight.grad, large[3].sum(0).expand(4, 4))


def test_a_copy_has_a_chain_of_its_own() -> None:
    model, x = blocks(), torch.randn(2, 8, 16)
    offload.offload(model, "*", least=1)
    twin = copy.deepcopy(model)
    assert all(map(torch.equal, gradients(twin, x), gradients(model, x)))


def test_a_name_that_fits_nothing_is_refused_and_the_cpu_is_told_of() -> None:
    with pytest.raises(ValueError, match="layers is 'layers'; expected a name"):
        offload.offload(blocks(), "layers")
    with pytest.warns(UserWarning, match="simulated and saves no memory"):
        offload.offload(blocks(), "0")

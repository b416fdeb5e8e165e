"""Plans with processes, gradient scaling and accumulation, autocast, adapters, and torch.compile."""

import copy
import os
import pathlib
import pickle
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ckpt_kernels import DoesNotFit, Plan, memory, plan
from ckpt_kernels.integrations import common
from ckpt_kernels.plan.bench import StepCost
from ckpt_kernels.plan.costs import Checkpoint, StageAt
from ckpt_kernels.plan.plan import ModelReference, structure_of

from .planned_models import TOKENS, Model, made
from .test_plan_solve import alike

pytestmark = pytest.mark.usefixtures("one_thread")


def mixed(model: nn.Module) -> Plan:
    """A hand-made plan: a level, a checkpoint of one layer, and a checkpoint of two layers."""
    parts = (
        StageAt(0, "all"),
        Checkpoint((StageAt(1, "output"),)),
        Checkpoint((StageAt(2, "none"), StageAt(3, "output"))),
    )
    nothing, names = StepCost(0, 0.0), [f"layers.{index}" for index in range(4)]
    return Plan(None, parts, nothing, nothing, {}, 0.0, [], alike(4), names, structure_of(model), {})


def test_copies_of_a_plan_keep_the_model_and_pickles_leave_it_out() -> None:
    model = Model()
    plan = replace(mixed(model), _model=ModelReference(model))
    copied = copy.deepcopy(plan)
    assert copied == plan and copied._model() is model
    received = pickle.loads(pickle.dumps(plan))
    assert received == plan
    with pytest.raises(ValueError, match="no model is given"):
        received.apply()
    assert received.apply(model).replaced


def peak(found: Plan, model: nn.Module, tokens: Tensor) -> int:
    """The peak in bytes of a step with a plan that accumulates into existing gradients."""
    found.apply(model)
    step(model, tokens)
    return memory.peak_bytes(lambda: step(model, tokens))


def loss_of(logits: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), torch.zeros(logits[..., 0].numel(), dtype=torch.long))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def step(model: nn.Module, tokens: Tensor) -> None:
    loss_of(model(tokens)).backward()


def accumulated(model: nn.Module, tokens: Tensor) -> None:
    for turn in range(3):
        (loss_of(model(tokens.roll(turn, 1))) / 3).backward()


def cast(model: nn.Module, tokens: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model(tokens))
    loss.backward()


def scaled(model: nn.Module, tokens: Tensor) -> None:
    """A step with an optimizer, which the scaler skips if a gradient is not finite."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler.scale(loss_of(model(tokens))).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


WAYS = {step: 1e-5, accumulated: 1e-5, scaled: 1e-5, cast: 2**-6}


@pytest.mark.parametrize(("way", "tolerance"), WAYS.items(), ids=[way.__name__ for way in WAYS])
def test_planned_models_train_as_the_original(way: Callable[[nn.Module, Tensor], None], tolerance: float) -> None:
    model, tokens = made()
    planned = copy.deepcopy(model)
    mixed(planned).apply(planned)
    way(model, tokens)
    way(planned, tokens)
    expected, found = gradients(model), gradients(planned)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= tolerance * gradient.norm() + 1e-7, name
    for parameter, other in zip(model.parameters(), planned.parameters(), strict=True):
        torch.testing.assert_close(other, parameter, rtol=1e-4, atol=1e-4 if way is cast else 1e-6)


@pytest.mark.parametrize("size", ((4, TOKENS), (2, TOKENS // 2)))
def test_peaks_of_other_batches_and_lengths_are_estimated(size: tuple[int, int]) -> None:
    model, tokens = made()
    planned = copy.deepcopy(model)
    measured = StepCost(peak(mixed(planned), planned, tokens), 0.0)
    other = torch.randint(0, 50, size)
    found = replace(mixed(model), measured=measured, given=tuple(tokens.shape)).predict(other)
    assert found.peak == pytest.approx(peak(mixed(model), model, other), rel=0.15)


def test_an_estimate_needs_a_tensor_like_the_first() -> None:
    model, tokens = made()
    with pytest.raises(ValueError, match="as many dimensions"):
        replace(mixed(model), given=tuple(tokens.shape)).predict(tokens[0])


class Adapted(nn.Module):
    """A frozen linear layer with a LoRA adapter."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def test_adapters_need_a_new_plan() -> None:
    """The plan of the model without adapters is an error; with a new plan only adapters have gradients."""
    model, tokens = made()
    before = mixed(model)
    model.requires_grad_(False)
    for layer in model.layers:
        layer.up = Adapted(layer.up)
    with pytest.raises(ValueError, match="another structure"):
        before.apply(model)
    planned = copy.deepcopy(model)
    mixed(planned).apply(planned)
    step(model, tokens)
    step(planned, tokens)
    expected, found = gradients(model), gradients(planned)
    assert len(expected) == 8
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_layers_below_all_trained_parameters_belong_to_the_code_before() -> None:
    model, tokens = made()
    for module in (model.embedding, *model.layers[:2]):
        module.requires_grad_(False)
    found = plan(model, tokens, budget=0.75)
    assert found.whole is None and [name for name in found.layers if name] == ["layers.2", "layers.3"]
    planned = copy.deepcopy(model)
    found.apply(planned)
    step(model, tokens)
    step(planned, tokens)
    expected = gradients(model)
    assert expected and gradients(planned).keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients(planned)[name], gradient, rtol=1e-4, atol=1e-6)


class Cache:
    """An object that layers receive."""


class WithCache(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = made(layers=1)[0].layers[0]

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        return self.layer(x)


class Cached(Model):
    def __init__(self) -> None:
        super().__init__(0)
        self.layers = nn.ModuleList(WithCache() for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, Cache())
        return self.head(self.norm(x))


def test_a_plan_says_why_it_offers_no_checkpoint() -> None:
    with pytest.raises(DoesNotFit, match="layers receive a Cache, and are not checkpointed"):
        plan(Cached(), made()[1], budget=0.05)


def test_compiled_layers_with_a_plan() -> None:
    model, tokens = made()
    planned = copy.deepcopy(model)
    mixed(planned).apply(planned)
    for layer in (planned.layers[0], planned.layers[1]):
        layer.compile(backend="aot_eager")
    step(model, tokens)
    step(planned, tokens)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradients(planned)[name], gradient, rtol=1e-4, atol=1e-6)


def replicated(model: Model) -> nn.Module:
    return DistributedDataParallel(model)


def sharded(model: Model) -> nn.Module:
    for layer in model.layers:
        fully_shard(layer)
    return fully_shard(model)


def _process(rank: int, port: int, wraps: tuple[Callable, ...], folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    for wrap in wraps:
        model, tokens = made()
        Plan.load(f"{folder}/plan.json").apply(model)
        wrapped = wrap(model)
        step(wrapped, tokens[rank : rank + 1].expand(2, -1))
        named: dict[str, Any] = {name.removeprefix("module."): p.grad for name, p in wrapped.named_parameters()}
        found = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in named.items()}
        torch.save(found, f"{folder}/{wrap.__name__}{rank}.pt")
    model, tokens = made()
    with pytest.raises(TypeError, match="DistributedDataParallel, which waits"):
        plan(replicated(made()[0]), tokens, budget=0.7)
    with pytest.raises(ValueError, match=r"model\.module"):
        Plan.load(f"{folder}/plan.json").apply(replicated(made()[0]))
    if rank:
        common.plan = None  # only the first process plans
    torch.save(str(common.converted(model, 0.7, inputs=tokens)), f"{folder}/report{rank}.pt")
    error = (RuntimeError, "first process cannot plan: DoesNotFit") if rank else (DoesNotFit, "")
    with pytest.raises(error[0], match=error[1]):
        common.converted(made()[0], 0.01, inputs=tokens)
    dist.barrier()
    # Without the interpreter's shutdown, in which the destructors of DDP and gloo may deadlock over the GIL.
    os._exit(0)


def test_two_processes_apply_the_same_plan(tmp_path: pathlib.Path) -> None:
    model, tokens = made()
    mixed(model).save(tmp_path / "plan.json")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    wraps = (replicated, sharded)
    mp.spawn(_process, (port, wraps, str(tmp_path)), nprocs=2)
    reports = [torch.load(tmp_path / f"report{rank}.pt") for rank in range(2)]
    assert reports[0] == reports[1] and "by module" in reports[0]
    step(model, tokens)
    for wrap in wraps:
        first, second = (torch.load(tmp_path / f"{wrap.__name__}{rank}.pt") for rank in range(2))
        for name, gradient in gradients(model).items():
            assert torch.equal(first[name], second[name])
            assert (first[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name

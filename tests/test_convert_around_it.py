"""`convert` with measurements, reports, lazy modules, torch.compile, and batch norms in two modes and checkpoints."""

import copy
import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ckpt_kernels
from ckpt_kernels import functional

from .conftest import DEVICE

WIDTH = 8
LEVELS = ("block", "output", "all")


def rows() -> Tensor:
    return torch.randn(4, WIDTH, device=DEVICE)


def layers() -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)).to(DEVICE)


# Measured


class Remembering(nn.Module):
    """Holds objects that cannot be copied: a tensor with a graph, a lock, a generator."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = layers()
        self.lock = threading.Lock()
        self.steps = (step for step in range(100))
        self.last = [torch.zeros(())]

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            self.last[0] = self.layers(x)
        return self.last[0].square()


def test_a_model_that_cannot_be_copied_is_measured() -> None:
    model, x = Remembering(), rows()
    ckpt_kernels.convert(model)
    model(x)
    last, values = model.last[0], model.last[0].detach().clone()
    state = torch.get_rng_state()
    before, after = ckpt_kernels.convert(model, inputs=x).kept
    assert after < before
    assert ckpt_kernels.convert(model, inputs=x).kept == (before, after)
    assert torch.equal(torch.get_rng_state(), state)
    assert ckpt_kernels.is_converted(model) and next(model.steps) == 0
    assert model.last[0] is last and torch.equal(last, values)


class Doubling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = layers()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.mul_(2))


def test_measuring_does_not_change_the_inputs() -> None:
    x = torch.ones(4, WIDTH, device=DEVICE)
    ckpt_kernels.convert(Doubling(), inputs={"x": x})
    assert torch.equal(x, torch.ones_like(x))


def test_measuring_within_inference_mode() -> None:
    model = layers()
    with torch.inference_mode():
        before, after = ckpt_kernels.convert(model, inputs=rows()).kept
    assert 0 < after < before


# Listed


class Linear3(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))


class GateInThree(Linear3):
    def forward(self, x: Tensor) -> Tensor:
        gate = self.a(x)
        value = self.b(x)
        return self.c(F.silu(gate) * value)


class MLPInThree(Linear3):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = F.gelu(x)
        return self.b(x)


class ActivationInTwo(Linear3):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.cos(x)
        return self.a(F.gelu(y))


@pytest.mark.parametrize(
    "kind,found", [(GateInThree, "gated MLP"), (MLPInThree, "MLP"), (ActivationInTwo, "bias_act (gelu)")]
)
def test_the_report_lists_one_expression_once(kind: Callable[[], nn.Module], found: str) -> None:
    assert [entry.by for entry in ckpt_kernels.convert(kind()).replaced] == [found]


class Child(nn.Module):
    def __init__(self, parent: nn.Module) -> None:
        super().__init__()
        self.parent = parent
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.parent.scale


class Parent(nn.Module):
    """A module whose child refers back to the module."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 2.0
        self.norm = nn.LayerNorm(WIDTH)
        self.child = Child(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.child(self.norm(x))


@pytest.mark.parametrize("exclude", [None, ["child.*"]])
def test_cycles_of_modules_are_converted(exclude: list[str] | None) -> None:
    # torch's own `to` recurses without end here.
    model = Parent()
    for part in (model.norm, model.child.linear):
        part.to(DEVICE)
    x = rows()
    expected = model(x)
    ckpt_kernels.convert(model, exclude=exclude)
    assert ckpt_kernels.is_converted(model.norm)
    torch.testing.assert_close(model(x), expected)


# Initialised


@pytest.mark.parametrize("level", LEVELS)
def test_lazy_modules_are_initialised_by_the_first_call(level: str) -> None:
    model = nn.Sequential(nn.LazyLinear(WIDTH), nn.LazyBatchNorm1d(), nn.GELU(), nn.Linear(WIDTH, 3)).to(DEVICE)
    ckpt_kernels.convert(model, recompute=level)
    model(rows()).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("norm", [lambda: nn.RMSNorm(WIDTH), lambda: nn.LayerNorm(WIDTH)])
@pytest.mark.parametrize("shape", [(), (WIDTH + 1,), (3, 1)])
def test_inputs_of_a_wrong_shape_raise_torchs_own_error(norm: Callable[[], nn.Module], shape: tuple) -> None:
    model, x = norm().to(DEVICE), torch.randn(shape, device=DEVICE)
    errors = []
    for _ in range(2):
        with pytest.raises((ValueError, RuntimeError, IndexError)) as caught:
            model(x)
        errors.append((caught.type, str(caught.value)))
        ckpt_kernels.convert(model)
    assert errors[0] == errors[1]


# Compiled


def _model_with_its_own_code(number: int) -> nn.Module:
    names: dict = {}
    exec(f"def forward(self, x): return self.linear(self.norm(x)) + {number}", names)
    model = type(f"Model{number}", (nn.Module,), names)()
    model.norm, model.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
    return model.to(DEVICE)


def test_dynamos_recompile_limit_is_per_model() -> None:
    torch._dynamo.reset()
    limit = torch._dynamo.config.recompile_limit
    for number in range(limit + 2):
        model = _model_with_its_own_code(number)
        ckpt_kernels.convert(model)
        torch.compile(model, backend="eager", fullgraph=True)(rows())
    torch._dynamo.reset()


# Trained in two modes


@pytest.mark.parametrize("level", [None, *LEVELS])
def test_a_pass_in_training_between_an_evaluation_and_its_backward_pass(level: str | None) -> None:
    """torch's batch norm updates running statistics without a change of the version counter."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1)).to(DEVICE)
    if level is not None:
        ckpt_kernels.convert(model, recompute=level)
    first = model.eval()(rows())
    second = model.train()(rows())
    assert model[1].num_batches_tracked == 1 and model[1].running_mean.any()
    (first.sum() + second.sum()).backward()
    assert model[0].weight.grad.isfinite().all()


# A norm without a weight


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
def test_a_weight_offset_without_a_weight_is_ignored(backend: str) -> None:
    if reason := ckpt_kernels.backends.why_not(backend, DEVICE, torch.float32):
        pytest.skip(reason)
    x = rows().requires_grad_()
    with ckpt_kernels.use_backend(backend):
        found = functional.rms_norm(x, WIDTH, None, weight_offset=1.0)
        (gradient,) = torch.autograd.grad(found.square().sum(), x)
    expected = F.rms_norm(x, (WIDTH,), None, eps=torch.finfo(torch.float32).eps)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.square().sum(), x)[0], rtol=1e-4, atol=1e-5)


NORMS_WITH_STATISTICS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: nn.BatchNorm2d(3),
    "cumulative": lambda: nn.BatchNorm2d(3, momentum=None),
    "instance": lambda: nn.InstanceNorm2d(3, track_running_stats=True),
}


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("last", ["norm", "activation", "convolution"])
@pytest.mark.parametrize("kind", NORMS_WITH_STATISTICS)
def test_running_statistics_in_a_checkpoint_are_torchs(kind: str, last: str, use_reentrant: bool) -> None:
    """A checkpoint with early stop ends the recomputation with the last tensor that the backward pass needs."""
    norm = NORMS_WITH_STATISTICS[kind]()
    after = {"norm": [], "activation": [nn.ReLU()], "convolution": [nn.SiLU(), nn.Conv2d(3, 3, 1)]}[last]
    model = nn.Sequential(nn.Conv2d(3, 3, 1), norm, *after)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    twin = copy.deepcopy(model)
    ckpt_kernels.convert(twin)
    for module in (model, twin):
        checkpoint(module, x, use_reentrant=use_reentrant).sum().backward()
    for (name, theirs), mine in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=name)

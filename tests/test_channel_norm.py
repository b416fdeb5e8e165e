"""Channel norms: memory formats, running statistics, several processes, saved bytes, and errors."""

import copy
import socket
import sys
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ckpt_kernels import functional as F
from ckpt_kernels import nn, ops
from ckpt_kernels.memory import saved_bytes
from ckpt_kernels.recompute import discard_outputs

from .conftest import DEVICE, serving, where

SHAPES = (
    (4, 6, 5, 7),
    (3, 8, 11),
    (64, 10),
    (2, 4, 1, 1),
    (2, 6, 150, 3),
    (2, 4, 3, 3, 3),
    (1, 3, 2, 2500),
    # With channels last, no number of pieces divides the rows of this shape.
    (2, 6, 131, 1),
)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def channels_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def eager(kind, x, groups, w, b):
    if kind == "group":
        return torch.nn.functional.group_norm(x, groups, w, b)
    if kind == "instance":
        return torch.nn.functional.instance_norm(x, None, None, w, b)
    return torch.nn.functional.batch_norm(x, None, None, w, b, training=True)


# An instance with one value has no variance.
@where(lambda kind, shape: kind != "instance" or shape[2:] not in ((), (1, 1)))
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["batch", "group", "instance"])
def test_every_shape_in_both_memory_formats(kind: str, shape: tuple, last: bool, backend: str) -> None:
    groups = {"batch": 0, "group": 1 if shape[1] % 2 else 2, "instance": shape[1]}[kind]
    # Where two values make a group, and are nearly equal, torch's own gradients have no correct digit.
    torch.manual_seed(0)
    x, g = randn(*shape), randn(*shape)
    if last and len(shape) > 2:
        x, g = channels_last(x), channels_last(g)
    x.requires_grad_()
    w, b = (randn(shape[1]) + 1).requires_grad_(), randn(shape[1]).requires_grad_()
    if kind == "batch":
        ours = F.batch_norm(x, None, None, w, b, training=True, activation="silu")
    elif kind == "group":
        ours = F.group_norm(x, groups, w, b, activation="silu")
    else:
        ours = F.instance_norm(x, None, None, w, b, activation="silu")
    theirs = torch.nn.functional.silu(eager(kind, x, groups, w, b))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    # On GPUs torch's group norm returns contiguous tensors; ours keeps the input's memory format.
    formats = [theirs.stride(), x.stride()] if kind == "group" and DEVICE == "cuda" else [theirs.stride()]
    if 1 not in shape:
        assert ours.stride() in formats
    found = torch.autograd.grad(ours, (x, w, b), g)
    # torch's instance norm of one sample has wrong gradients if grad_output is channels last.
    expected = torch.autograd.grad(theirs, (x, w, b), g.contiguous() if kind == "instance" else g)
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)
    if 1 not in shape:
        assert found[0].stride() in (expected[0].stride(), *formats)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_huge_means_stay_accurate(last: bool, backend: str) -> None:
    torch.manual_seed(0)
    x = randn(4, 3, 40, 50) + 1e4
    x = (channels_last(x) if last else x).requires_grad_()
    truth = torch.nn.functional.batch_norm(x.double(), None, None, training=True)
    ours = F.batch_norm(x, None, None, training=True)
    theirs = torch.nn.functional.batch_norm(x, None, None, training=True)
    # The mean, about 1e4, is rounded to a multiple of 2^-10.
    allowed = max(1.5 * (theirs - truth).abs().max().item(), 1e-3)
    assert (ours - truth).abs().max() <= allowed


@pytest.mark.parametrize("momentum", [0.1, 0.9, None])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_a_hundred_steps_and_a_switch_to_eval(momentum: float | None, track: bool, affine: bool) -> None:
    options = {"momentum": momentum, "track_running_stats": track, "affine": affine}
    ours, theirs = nn.BatchNorm2d(5, **options).to(DEVICE), torch.nn.BatchNorm2d(5, **options).to(DEVICE)
    for step in range(100):
        x = randn(3, 5, 4, 4) * (1 + step % 7) + step
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-5, atol=1e-5)
    ours.eval(), theirs.eval()
    x = randn(3, 5, 4, 4).requires_grad_()
    y, e = ours(x), theirs(x)
    torch.testing.assert_close(y, e, rtol=1e-4, atol=1e-4)
    g = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, g), torch.autograd.grad(e, x, g), rtol=1e-4, atol=1e-4)


def test_eval_gradients_of_every_operand(backend: str) -> None:
    x, r, g = (randn(4, 6, 5, 5).requires_grad_() for _ in range(3))
    mean, var = randn(6), randn(6).abs() + 0.5
    w, b = randn(6).requires_grad_(), randn(6).requires_grad_()
    ours = F.batch_norm(x, mean, var, w, b, activation="gelu", residual=r)
    theirs = torch.nn.functional.gelu(torch.nn.functional.batch_norm(x, mean, var, w, b) + r)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    sources = (x, r, w, b)
    for a, e in zip(torch.autograd.grad(ours, sources, g), torch.autograd.grad(theirs, sources, g), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_gradients_use_the_statistics_of_the_forward(activation: str, backend: str) -> None:
    """A later pass in training updates the running statistics without a change of their version counters."""
    x, g, w, b = randn(4, 6, 5, 5).requires_grad_(), randn(4, 6, 5, 5), randn(6).requires_grad_(), randn(6)
    mean, var = randn(6), randn(6).abs() + 0.5
    expected = torch.autograd.grad(F.batch_norm(x, mean, var, w, b, activation=activation), (x, w), g)
    output = F.batch_norm(x, mean, var, w, b, activation=activation)
    torch.nn.functional.batch_norm(5 * randn(4, 6, 5, 5) + 3, mean, var, training=True, momentum=0.9)
    for found, gradient in zip(torch.autograd.grad(output, (x, w), g), expected, strict=True):
        assert torch.equal(found, gradient)


def test_recomputed_outputs_use_the_statistics_of_the_forward() -> None:
    x, g, w = randn(4, 6).requires_grad_(), randn(4, 3), randn(3, 6).requires_grad_()
    mean, var = randn(6), randn(6).abs() + 0.5
    gradients = []
    for update in (False, True):
        with discard_outputs():
            output = torch.nn.functional.linear(F.batch_norm(x, mean, var), w)
        if update:
            torch.nn.functional.batch_norm(5 * randn(4, 6) + 3, mean, var, training=True, momentum=0.9)
        gradients.append(torch.autograd.grad(output, w, g)[0])
    assert torch.equal(*gradients)


@pytest.mark.parametrize("last", [False, True])
def test_elements_are_independent_in_evaluation(last: bool, backend: str) -> None:
    x, mean, var = randn(3, 4, 4, 4), randn(4), randn(4).abs() + 0.5
    x[0, 0, 0, 0], x[1, 1, 1, 1] = float("inf"), float("nan")
    x = (channels_last(x) if last else x).requires_grad_()
    (grad,) = torch.autograd.grad(F.batch_norm(x, mean, var, activation="relu").sum(), x)
    assert grad.isfinite().sum() >= grad.numel() - 2


def test_running_statistics_of_instance_norm_are_torchs() -> None:
    ours = nn.InstanceNorm2d(4, affine=True, track_running_stats=True).to(DEVICE)
    theirs = torch.nn.InstanceNorm2d(4, affine=True, track_running_stats=True).to(DEVICE)
    for _ in range(5):
        x = randn(3, 4, 6, 6) * 2 + 1
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    ours.eval(), theirs.eval()
    x = randn(4, 6, 6)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("last", [False, True])
def test_saved_bytes_are_the_input_and_statistics(last: bool) -> None:
    """A norm with an activation and a residual also keeps its output, which the next convolution keeps as well."""
    x, r = randn(4, 8, 10, 10), randn(4, 8, 10, 10)
    x, r = ((channels_last(t) if last else t).requires_grad_() for t in (x, r))
    conv = torch.nn.Conv2d(8, 8, 1).to(DEVICE)
    for norm, statistics in (
        (nn.BatchNorm2d(8, activation="relu"), 2 * 8),
        (nn.BatchNorm2d(8), 2 * 8),
        (nn.BatchNorm2d(8).eval(), 0),
        (nn.GroupNorm(4, 8, activation="silu"), 2 * 4 * 4),
    ):
        assert saved_bytes(norm.to(DEVICE), x) == x.nbytes + statistics * 4
    norm = nn.BatchNorm2d(8, activation="relu").to(DEVICE)
    with_conv = saved_bytes(lambda: conv(norm(x, r)))
    assert with_conv == 2 * x.nbytes + 2 * 8 * 4


def test_very_large_groups_and_many_channels(backend: str) -> None:
    for shape, groups in (((1, 2, 70000), 1), ((1, 1200, 3), 400), ((2, 520, 2, 2), 1)):
        for x in (randn(*shape), channels_last(randn(*shape))):
            torch.testing.assert_close(
                F.group_norm(x, groups), torch.nn.functional.group_norm(x, groups), rtol=1e-4, atol=1e-4
            )


# The batch sizes of the two processes.
SHARES = ((3, 3), (5, 1))


def _one_process(rank: int, port: int, results: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found = []
    for sizes in SHARES:
        torch.manual_seed(0)
        whole, residual, g = (torch.randn(sum(sizes), 4, 3, 5) for _ in range(3))
        norm = nn.SyncBatchNorm(4, activation="relu")
        torch.nn.init.normal_(norm.weight)
        parts = [t.split(list(sizes))[rank].clone().requires_grad_() for t in (whole, residual)]
        y = norm(*parts)
        y.backward(g.split(list(sizes))[rank])
        for t in (norm.weight.grad, norm.bias.grad):
            dist.all_reduce(t)
        found.append((y.detach(), *(t.grad for t in parts), norm.weight.grad, norm.state_dict()))
    torch.save(found, f"{results}/{rank}.pt")
    dist.destroy_process_group()


def test_sync_batch_norm_equals_one_process_with_the_whole_batch(tmp_path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_one_process, (port, str(tmp_path)), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for sizes, *found in zip(SHARES, *results, strict=True):
        torch.manual_seed(0)
        whole, residual, g = (torch.randn(sum(sizes), 4, 3, 5) for _ in range(3))
        leaves = whole.requires_grad_(), residual.requires_grad_()
        norm = torch.nn.BatchNorm2d(4)
        torch.nn.init.normal_(norm.weight)
        y = torch.relu(norm(leaves[0]) + leaves[1])
        y.backward(g)
        for index, expected in enumerate((y.detach(), leaves[0].grad, leaves[1].grad)):
            torch.testing.assert_close(torch.cat([part[index] for part in found]), expected, rtol=1e-4, atol=1e-5)
        for _, _, _, grad_weight, state in found:
            torch.testing.assert_close(grad_weight, norm.weight.grad, rtol=1e-4, atol=1e-4)
            for name, value in norm.state_dict().items():
                torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-5)


def test_sync_batch_norm_in_one_process_is_a_batch_norm() -> None:
    x = randn(4, 3, 5)
    torch.testing.assert_close(nn.SyncBatchNorm(3).to(DEVICE)(x), torch.nn.BatchNorm1d(3).to(DEVICE)(x))


def test_every_backend_agrees() -> None:
    x, r, w, b = randn(3, 6, 9, 9), randn(3, 6, 9, 9), randn(6), randn(6)
    found = {}
    for name in ("reference", "native", "triton", "cuda_on_host") if DEVICE == "cpu" else ("reference", "native"):
        with serving(name):
            found[name] = F.batch_norm(x, None, None, w, b, True, activation="gelu", residual=r)
    for value in found.values():
        torch.testing.assert_close(value, found["reference"], rtol=1e-5, atol=1e-5)


X = torch.randn(4, 6, 5)
W = torch.ones(6)
BAD = {
    "not a tensor": (lambda: F.group_norm(3, 2), TypeError, "input is int"),
    "one dimension": (lambda: F.batch_norm(W, None, None, training=True), RuntimeError, r"input has shape \(6,\)"),
    "channels of weight": (
        lambda: F.batch_norm(X, None, None, W[:5], training=True),
        RuntimeError,
        r"weight has shape \(5,\); expected \(6,\)",
    ),
    "channels of bias": (lambda: F.group_norm(X, 2, W, W[:3]), RuntimeError, r"bias has shape \(3,\)"),
    "residual": (
        lambda: F.batch_norm(X, None, None, training=True, residual=X[:2]),
        RuntimeError,
        r"residual has shape \(2, 6, 5\); expected the input's",
    ),
    "one value per channel": (
        lambda: F.batch_norm(X[:1, :, :1], None, None, training=True),
        ValueError,
        "expected more than 1 value per channel",
    ),
    "one value in space": (lambda: F.instance_norm(X[:, :, :1]), ValueError, "expected more than 1 element in space"),
    "no statistics in eval": (lambda: F.batch_norm(X, None, None), RuntimeError, "running_mean or running_var is None"),
    "groups": (lambda: F.group_norm(X, 4), RuntimeError, "num_groups is 4; expected a divisor of the channels"),
    "one value per group": (
        lambda: F.group_norm(X[:1, :, :1], 6),
        ValueError,
        "expected more than 1 value for each of",
    ),
    "no groups": (lambda: F.group_norm(X, 0), RuntimeError, "num_groups is 0"),
    "activation": (lambda: F.group_norm(X, 2, activation="swish"), ValueError, "activation is 'swish'"),
    "module's dimensions": (lambda: nn.BatchNorm2d(6)(X), ValueError, "expected 4D input"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_named_error(case: str) -> None:
    call, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        call()


def test_two_values_per_group_are_normalized() -> None:
    x = torch.tensor([[[1.0, 3.0], [-8.0, -4.0]]])
    expected = torch.tensor([[[-1.0, 1.0], [-1.0, 1.0]]])
    torch.testing.assert_close(F.group_norm(x, 2), expected, rtol=1e-4, atol=0)


def test_running_statistics_are_unchanged_after_an_error() -> None:
    norm = nn.BatchNorm1d(6)
    norm(X)
    before = copy.deepcopy(norm.state_dict())
    for bad in (torch.randn(4, 7, 5), torch.randn(1, 6, 1), X.long()):
        with pytest.raises((RuntimeError, ValueError)):
            norm(bad)
    with pytest.raises(RuntimeError, match=r"running_var has shape \(5,\)"):
        F.batch_norm(X, norm.running_mean, norm.running_var[:5], training=True)
    for name, value in before.items():
        assert torch.equal(norm.state_dict()[name], value), name


def test_repr_of_modules() -> None:
    assert repr(nn.GroupNorm(2, 6)) == repr(torch.nn.GroupNorm(2, 6))
    for module in (nn.GroupNorm(2, 6, activation="silu"), nn.BatchNorm2d(6, activation="silu")):
        assert "activation='silu'" in repr(module)


@pytest.mark.parametrize("training", [False, True])
def test_running_statistics_that_torch_rejects(training: bool) -> None:
    x, mean, var = randn(3, 4, 6), torch.zeros(4, device=DEVICE), torch.ones(4, device=DEVICE)
    # Later calls of the same shape may take a shorter way.
    F.batch_norm(x, mean.clone(), var.clone(), training=training)
    F.instance_norm(x, mean.clone(), var.clone(), use_input_stats=training)
    for given in ((mean, None), (None, var)):
        with pytest.raises(ValueError, match="expected both or neither"):
            F.batch_norm(x, *given, training=training)
        with pytest.raises(ValueError, match="expected both or neither"):
            F.instance_norm(x, *given, use_input_stats=training)
    for given in ((mean.clone().requires_grad_(), var), (mean, var.clone().requires_grad_())):
        for call in (torch.nn.functional.batch_norm, F.batch_norm):
            with pytest.raises(RuntimeError):
                call(x, *given, training=training)
    # Without gradients torch takes them.
    with torch.no_grad():
        found = F.batch_norm(x, mean.clone().requires_grad_(), var.clone(), training=training)
    expected = F.batch_norm(x, mean.clone(), var.clone(), training=training)
    torch.testing.assert_close(found, expected)


def test_a_trace_updates_running_statistics_by_batches_of_any_size() -> None:
    def found(norm: Callable[..., torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, var = torch.zeros(4, device=DEVICE), torch.ones(4, device=DEVICE)
        given = randn(2, 4, 3), mean.clone(), var.clone()
        traced = torch.jit.trace(lambda x, m, v: norm(x, m, v, training=True), given, check_trace=False)
        traced(x, mean, var)
        return mean, var

    x = randn(3, 4, 2)
    torch.testing.assert_close(found(F.batch_norm, x), found(torch.nn.functional.batch_norm, x))


def test_a_pass_in_training_leaves_the_graph_of_one_in_evaluation() -> None:
    x = randn(3, 4, 6)

    def gradient(norm: torch.nn.BatchNorm1d) -> torch.Tensor:
        output = norm.to(DEVICE).eval()(x)
        norm.train()(x)
        return torch.autograd.grad(output.square().sum(), norm.weight)[0]

    torch.testing.assert_close(gradient(nn.BatchNorm1d(4)), gradient(torch.nn.BatchNorm1d(4)), rtol=1e-4, atol=1e-4)


def test_an_interrupt_leaves_gradients_on() -> None:
    """An interrupt may come between any two steps of a call, so no step switches gradients off and on."""
    norm, x = nn.BatchNorm1d(4).to(DEVICE), randn(3, 4)
    switched = []

    def watch(frame: object, event: str, called: object) -> None:
        if event == "c_return" and getattr(called, "__name__", "") == "_set_grad_enabled":
            switched.append(called)

    sys.setprofile(watch)
    try:
        norm(x)
    finally:
        sys.setprofile(None)
    assert not switched


def test_native_cpu_calls_run_all_steps_in_one_call(backend: str) -> None:
    whole = ops.channel_steps.single_call_backend(torch.randn(2, 4, 3, device=DEVICE))
    assert (whole is not None) == (backend == "native" and DEVICE == "cpu")

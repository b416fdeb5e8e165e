"""`linear_cross_entropy`, compared with eager torch and float64, in chunks that do not divide the rows."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor

from ckpt_kernels import functional as F
from ckpt_kernels.memory import peak_bytes, saved_bytes

from .conftest import DEVICE, DTYPES

CLASSES, COLUMNS, LEAD = 50, 16, (3, 11)
KINDS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "capped": {"softcap": 2.0},
    "both": {"label_smoothing": 0.3, "softcap": 2.0},
    "another ignored": {"ignore_index": 7},
}


def operands(dtype: torch.dtype, lead: tuple = LEAD) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((*lead, COLUMNS), (CLASSES, COLUMNS), (CLASSES,))
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for shape in shapes]
    target = torch.randint(CLASSES, lead, generator=generator)
    target.view(-1)[:4] = -100
    return tensors, target.to(DEVICE)


def eager(input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, softcap: float | None = None, **options):
    logits = functional.linear(input, weight, bias).reshape(-1, CLASSES)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    loss = functional.cross_entropy(logits, target.reshape(-1), **options)
    return loss.reshape(target.shape) if options.get("reduction") == "none" else loss


def with_gradients(function: Callable[..., Tensor], tensors: list[Tensor], target: Tensor, **options) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in tensors]
    loss = function(leaves[0], leaves[1], target, leaves[2], **options)
    # Incoming gradients, another power of two for each row, as a gradient scaler's are powers of two.
    grad_output = 2.0 ** torch.arange(loss.numel(), device=DEVICE).remainder(5).reshape(loss.shape)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, grad_output.to(loss.dtype))]


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_at_most_eagers(dtype: torch.dtype, reduction: str, options: dict) -> None:
    tensors, target = operands(dtype)
    target[target == -100] = options.get("ignore_index", -100)
    options = {"reduction": reduction, **options}
    found = with_gradients(F.linear_cross_entropy, tensors, target, chunk=7, **options)
    expected = with_gradients(eager, tensors, target, **options)
    truth = with_gradients(eager, [t.double() for t in tensors], target, **options)
    for mine, theirs, true in zip(found, expected, truth, strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        error, allowed = ((t.double() - true).abs().max() for t in (mine, theirs))
        # In float64 the truth is eager torch's result itself.
        ulps = 16 if dtype == torch.float64 else 1
        assert error <= 1.5 * allowed + ulps * torch.finfo(dtype).eps * true.abs().max()


def test_many_chunks_in_bfloat16_accumulate_in_float32() -> None:
    tensors, target = operands(torch.bfloat16, (1024,))
    found = with_gradients(F.linear_cross_entropy, tensors, target, chunk=8)
    expected = with_gradients(eager, tensors, target)
    truth = with_gradients(eager, [t.double() for t in tensors], target)
    for mine, theirs, true in zip(found, expected, truth, strict=True):
        error, allowed = ((t.double() - true).abs().max() for t in (mine, theirs))
        assert error <= 1.5 * allowed + torch.finfo(torch.bfloat16).eps * true.abs().max()


@pytest.mark.parametrize("lead", [(0,), (5,)], ids=["no rows", "all ignored"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_and_ignored_targets_give_torchs_results(reduction: str, lead: tuple) -> None:
    tensors, target = operands(torch.float32, (5,))
    tensors[0], target = tensors[0][: lead[0]], torch.full(lead, -100, device=DEVICE)
    found = with_gradients(F.linear_cross_entropy, tensors, target, reduction=reduction, chunk=2)
    expected = with_gradients(eager, tensors, target, reduction=reduction)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True)


def test_no_row_counts_gives_zero_gradients_after_a_division_by_zero() -> None:
    tensors, _ = operands(torch.float32, (5,))
    target = torch.full((5,), -100, device=DEVICE)
    leaves = [t.requires_grad_() for t in tensors]
    loss = F.linear_cross_entropy(leaves[0], leaves[1], target, leaves[2], reduction="sum") / 0
    assert loss.isnan() and not any(g.any() for g in torch.autograd.grad(loss, leaves))


def test_second_derivatives() -> None:
    tensors, _ = operands(torch.float64, (5,))
    leaves = [t[:6, :4].clone().requires_grad_() for t in tensors[:2]]
    target = torch.tensor([3, -100, 0, 5, 1], device=DEVICE)

    def loss(input: Tensor, weight: Tensor) -> Tensor:
        return F.linear_cross_entropy(input, weight, target, chunk=2, softcap=3.0)

    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice(reduction: str) -> None:
    tensors, target = operands(torch.float32)
    leaves = [t.requires_grad_() for t in tensors]
    loss = F.linear_cross_entropy(leaves[0], leaves[1], target, leaves[2], reduction=reduction, chunk=7).sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [t.clone() for t in first]
    second = torch.autograd.grad(loss, leaves)
    for before, later, given in zip(kept, second, first, strict=True):
        torch.testing.assert_close(later, before)
        assert torch.equal(given, before)


def test_keeps_operands_and_requested_gradients() -> None:
    (input, weight, bias), target = operands(torch.float32)
    tensors = {"input": input, "weight": weight, "bias": bias}
    saved_shapes: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved_shapes.append(t.shape) or t, lambda t: t):
        F.linear_cross_entropy(input.requires_grad_(), weight, target, bias, chunk=7)
    assert (7, CLASSES) not in saved_shapes
    half = [t.half() for t in (input, weight)]
    operand_bytes = half[0].nbytes + half[1].nbytes + target.nbytes + 4
    assert saved_bytes(lambda: F.linear_cross_entropy(half[0].requires_grad_(), half[1], target)) == operand_bytes
    for names in ((), ("input",), ("input", "weight"), ("weight", "bias")):
        for name, tensor in tensors.items():
            tensor.requires_grad_(name in names)
        kept = saved_bytes(lambda: F.linear_cross_entropy(input, weight, target, bias, chunk=7))
        gradients = sum(tensors[name].nbytes for name in names)
        operand_bytes = sum(t.nbytes for t in (input, weight, bias, target)) + 4
        assert kept == (operand_bytes + gradients if names else 0)
    with torch.no_grad():
        assert saved_bytes(lambda: F.linear_cross_entropy(input, weight, target, bias)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_are_never_whole(dtype: torch.dtype) -> None:
    input = torch.randn(2048, 8, device=DEVICE, dtype=dtype, requires_grad=True)
    weight = torch.randn(1000, 8, device=DEVICE, dtype=dtype, requires_grad=True)
    target = torch.randint(1000, (2048,), device=DEVICE)
    peak = peak_bytes(lambda: F.linear_cross_entropy(input, weight, target, chunk=64).backward(), DEVICE)
    # The logits of a chunk are alive four times: in their dtype, in float32, as log-probabilities, and as gradient.
    assert peak < 6 * 64 * 1000 * 4 + 4 * (input.nbytes + weight.nbytes)
    assert peak < 2048 * 1000 * 4 / 3


def test_autocast_gives_eager_dtypes_and_gradients() -> None:
    (input, weight, bias), target = operands(torch.float32)
    input.requires_grad_(), weight.requires_grad_()
    losses = []
    for function in (F.linear_cross_entropy, eager):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            loss = function(input, weight, target, bias)
        losses.append((loss, *torch.autograd.grad(loss, (input, weight))))
    for mine, theirs in zip(*losses, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-4)


def test_under_transforms_and_compile() -> None:
    tensors, target = operands(torch.float32)
    gradient = torch.func.grad(lambda x: F.linear_cross_entropy(x, tensors[1], target))(tensors[0])
    expected = torch.func.grad(lambda x: eager(x, tensors[1], target, None))(tensors[0])
    torch.testing.assert_close(gradient, expected)
    compiled = torch.compile(F.linear_cross_entropy, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*tensors[:2], target), eager(*tensors[:2], target, None))


WRONG = {
    "weight": ({"weight": torch.zeros(50, 9)}, RuntimeError, r"weight has shape \(50, 9\); expected \(out, 16\)"),
    "dtype": ({"target": torch.zeros(3, 11)}, RuntimeError, "target has dtype torch.float32; expected int64"),
    "shape": ({"target": torch.zeros(3, 9, dtype=torch.int64)}, RuntimeError, r"target has shape \(3, 9\); expected"),
    "no tensor": ({"target": 3}, TypeError, "target is int; expected a tensor"),
    "reduction": ({"reduction": "max"}, ValueError, "reduction is 'max'; expected one of mean, sum, none"),
    "device": ({"target": torch.zeros(3, 11, dtype=torch.int64, device="meta")}, RuntimeError, "target is on meta"),
    "ignored": ({"ignore_index": None}, TypeError, "ignore_index is None; expected a whole number"),
    "less than no smoothing": ({"label_smoothing": -0.1}, ValueError, "label_smoothing is -0.1; expected"),
    "negative cap": ({"softcap": -1.0}, ValueError, "softcap is -1.0; expected a positive finite number"),
    "smoothing": (
        {"label_smoothing": 1.5},
        ValueError,
        "label_smoothing is 1.5; expected a probability between 0 and 1",
    ),
    "cap": ({"softcap": 0.0}, ValueError, "softcap is 0.0; expected a positive finite number, or None"),
    "infinite cap": ({"softcap": math.inf}, ValueError, "softcap is inf; expected a positive finite number"),
    "chunk of True": ({"chunk": True}, ValueError, "chunk is True; expected a positive whole number, or None"),
    "chunk": ({"chunk": 0}, ValueError, "chunk is 0; expected a positive whole number, or None"),
}


@pytest.mark.parametrize("given,kind,message", WRONG.values(), ids=WRONG)
def test_bad_input_is_a_named_error(given: dict, kind: type[Exception], message: str) -> None:
    (input, weight, _), target = operands(torch.float32)
    arguments = {"input": input, "weight": weight, "target": target, **given}
    arguments = {n: v.to(DEVICE) if isinstance(v, Tensor) and not v.is_meta else v for n, v in arguments.items()}
    with pytest.raises(kind, match=message):
        F.linear_cross_entropy(**arguments)

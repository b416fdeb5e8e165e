"""The error of every output and gradient against float64 is at most 1.5 times eager torch's on the same operands."""

import math
from collections.abc import Callable

import pytest
import torch

from ckpt_kernels.catalogue.block import Block, Operands
from ckpt_kernels.catalogue.blocks import ACTIVATION_BLOCKS, BLOCKS, BY_NAME

from .blocks import by_block, in_float64, with_gradients
from .conftest import DEVICE, emulated, interprets, where

# The least number of values for a root mean square of errors.
ROUNDINGS = 40


def ulp(scale: float, dtype: torch.dtype) -> float:
    """One unit in the last place of `dtype` for numbers of this size."""
    return torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(max(scale, 1e-30)))


def check_against_eager(
    block: Block,
    draw: Callable[[int], Operands],
    backend: str,
    draws: int = 3,
    roundings: int = ROUNDINGS,
    summed: float = 0.0,
) -> None:
    """Asserts errors of at most 1.5 times eager torch's plus one unit in the last place of the result.

    If the terms of the input's gradient cancel, the unit is that of their magnitude, `summed`. The error is the root
    mean square over the elements of a result and over `draws` or more draws of the operands, until each result has
    `roundings` elements, since the error of a few elements is random. So is the greatest error, which may be four times
    eager torch's.
    """
    ours, eager, truth = {}, {}, {}
    for seed in range(ROUNDINGS):
        if seed >= draws and all(seed * values[0].numel() >= roundings for values in truth.values()):
            break
        operands = draw(seed)
        for results, fn, given in (
            (truth, block.eager, in_float64(operands)),
            (eager, block.eager, operands),
            (ours, block.call, operands),
        ):
            for name, value in with_gradients(fn, given).items():
                results.setdefault(name, []).append(value)
    assert ours.keys() == truth.keys()
    for name in truth:
        dtype = eager[name][0].dtype
        assert [(t.dtype, t.shape) for t in ours[name]] == [(t.dtype, t.shape) for t in eager[name]], name
        true, found, theirs = (torch.stack(results[name]).double() for results in (truth, ours, eager))
        assert found.isfinite().all(), name
        if dtype == torch.float64:
            # The truth has the same precision, so about a hundred roundings of the result's magnitude are allowed.
            assert (found - true).abs().max() <= 2e-14 * (1 + true.abs().max()), name
            continue
        # Triton's interpreter truncates to bfloat16, where hardware rounds.
        size = summed if name in ("grad input", "grad residual") else 0.0
        units = 2 if backend == "triton" and DEVICE == "cpu" and dtype == torch.bfloat16 else 1
        for measure, factor in ((_root_mean_square, 1.5), (_greatest, 4.0)):
            allowed = factor * measure(theirs - true) + units * ulp(max(measure(true), size), dtype)
            worst = measure(found - true)
            assert worst <= allowed, f"{name} errs by {worst:.3e}, eager by {measure(theirs - true):.3e}"


def _root_mean_square(values: torch.Tensor) -> float:
    return values.square().mean().sqrt().item()


def _greatest(values: torch.Tensor) -> float:
    return values.abs().max().item()


def draws_for(backend: str) -> int:
    """The least number of draws; one for emulated kernels, which are slow."""
    return 1 if emulated(backend) else 3


def is_quick(block: Block, backend: str, elements: int) -> bool:
    """Whether the test is fast enough. A gradient of one number takes many draws, which must be small for emulated
    kernels."""
    return not (block.numbers and emulated(backend) and elements > 1000)


# One block of each function: how a kernel reads partly filled vectors and samples does not depend on the activation.
ONE_OF_EACH = {block.function: block for block in BLOCKS}.values()


def has_rows(block: Block, backend: str, dtype: torch.dtype, columns: int) -> bool:
    """Whether this combination is tested. Emulated kernels with two bytes an element run on long rows in bfloat16 only,
    because tiles depend on the size of an element. Interpreted kernels run in float16, and on long rows, for one block
    of each function."""
    if emulated(backend) and dtype == torch.float16 and columns == 320:
        return False
    rare = dtype == torch.float16 or columns == 320
    if rare and interprets(backend) and block not in ONE_OF_EACH:
        return False
    return is_quick(block, backend, 2 * 9 * columns)


@where(has_rows)
@pytest.mark.parametrize("columns", [37, 320])
@by_block
def test_error_is_at_most_eagers(block: Block, columns: int, served: tuple) -> None:
    backend, dtype = served
    check_against_eager(
        block, lambda seed: block.operands((2, 9), columns, dtype, DEVICE, seed), backend, draws_for(backend)
    )


# Variants whose kernels call the same functions of an activation as the others.
ANOTHER_ORDER = ("gate first", "+add+")


def has_dtypes(block: Block, backend: str, dtype: torch.dtype) -> bool:
    """Whether this combination is tested. On a CPU, float16 runs on the native backend only. Emulated kernels compute
    activations in float32 whatever the dtype, and interpreted kernels run without variants of the same functions."""
    if interprets(backend) and any(order in block.name for order in ANOTHER_ORDER):
        return False
    if emulated(backend):
        return dtype == torch.float32
    return dtype != torch.float16 or backend == "native" or DEVICE != "cpu"


@where(has_dtypes)
@pytest.mark.parametrize("block", ACTIVATION_BLOCKS, ids=lambda block: block.name)
def test_error_is_at_most_eagers_for_every_activation(block: Block, served: tuple) -> None:
    backend, dtype = served
    # The errors of every block are measured above; here fewer values suffice for another activation.
    roundings = 10 if interprets(backend) and not block.numbers else ROUNDINGS
    check_against_eager(
        block, lambda seed: block.operands((2, 5), 40, dtype, DEVICE, seed), backend, draws_for(backend), roundings
    )


# They include more than four samples, and numbers of rows that are no multiple of four.
SIZES = (((1, 1), 1), ((1, 1), 2), ((3, 2), 1009), ((7, 1), 16), ((1, 70), 16), ((1, 3), 20011))


def has_sizes(block: Block, lead: tuple, columns: int, backend: str) -> bool:
    """Whether this combination is tested. One value per channel is an error in training, and interpreted kernels run a
    part of the sizes, for one block of each function."""
    if block.channels and lead[0] * columns == 1:
        return False
    if interprets(backend) and block not in ONE_OF_EACH:
        return False
    if not is_quick(block, backend, lead[0] * lead[1] * columns):
        return False
    return not interprets(backend) or (lead, columns) not in (((1, 1), 2), ((1, 3), 20011))


@where(has_sizes)
@pytest.mark.parametrize("lead,columns", SIZES, ids=["x".join(map(str, (*lead, n))) for lead, n in SIZES])
@by_block
def test_edge_sizes(block: Block, lead: tuple, columns: int, backend: str) -> None:
    if block.channels and columns > 5003:
        # Two channels would take many draws.
        lead, columns = (1, 8), 5003
    # Errors of elements that are read beyond the end or left out are large, so fewer values suffice, but for one or two
    # elements, whose error is random.
    roundings = 10 if emulated(backend) and columns > 2 and not block.numbers else ROUNDINGS

    def draw(seed: int) -> Operands:
        return block.operands(lead, columns, torch.float32, DEVICE, seed)

    # The gradient through a layer norm of two columns is zero but for eps: the terms, each about one over the row's
    # deviation, cancel.
    summed = 0.0
    if columns == 2 and "layer_norm" in block.name and "input" in draw(0):
        draws = [draw(seed) for seed in range(ROUNDINGS // columns)]
        rows = torch.stack([(o["input"].double() + o.get("residual", 0.0)).detach() for o in draws])
        summed = _root_mean_square(rows.var(-1, correction=0).add(1e-5).rsqrt())
    check_against_eager(block, draw, backend, draws_for(backend), roundings, summed)


@where(lambda block, backend: not interprets(backend) or block.name == "layer_norm+gelu")
@pytest.mark.parametrize("block", BLOCKS[:2], ids=lambda block: block.name)
def test_a_row_of_131072(block: Block, backend: str) -> None:
    # The slow interpreter gets a shorter row, which also takes several steps and ends within a block.
    lead, columns = ((1, 1), 20000) if interprets(backend) else ((1, 2), 131072)
    check_against_eager(block, lambda seed: block.operands(lead, columns, torch.float32, DEVICE, seed), backend, 1)


@by_block
def test_many_rows(block: Block) -> None:
    """Enough rows for several threads, several partial sums, and blocks of rows with some left over."""
    check_against_eager(block, lambda seed: block.operands((3, 411), 130, torch.float32, DEVICE, seed), "auto")


def test_huge_means_stay_accurate(backend: str) -> None:
    """Rows of 1e4 +- 1, whose variance E[x^2] - E[x]^2 would lose."""
    block = BY_NAME["layer_norm"]

    def draw(seed: int) -> Operands:
        operands = block.operands((2, 3), 1000, torch.float32, DEVICE, seed)
        operands["input"] = (operands["input"].detach() + 1e4).requires_grad_()
        return operands

    check_against_eager(block, draw, backend)


@pytest.mark.parametrize("block", BLOCKS[:4], ids=lambda block: block.name)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_weights_of_another_dtype(block: Block, weight_dtype: torch.dtype, backend: str) -> None:
    """bfloat16 activations with float32 weights, and vice versa."""
    input_dtype = torch.bfloat16 if weight_dtype == torch.float32 else torch.float32
    operands = block.operands((2, 9), 48, input_dtype, DEVICE)
    for name in block.coefficients:
        operands[name] = operands[name].detach().to(weight_dtype).requires_grad_()
    truth = with_gradients(block.eager, in_float64(operands))
    # Eager torch rejects some of these pairs, so its error is measured with all operands in bfloat16.
    narrow = {name: t.detach().bfloat16().requires_grad_() for name, t in operands.items()}
    theirs = with_gradients(block.eager, narrow)
    for name, value in with_gradients(block.call, operands).items():
        dtype = weight_dtype if name.removeprefix("grad ") in block.coefficients else input_dtype
        assert value.dtype == dtype
        # Half a unit for the rounding of the result, which the interpreter's truncation doubles.
        allowed = 1.5 * _root_mean_square(theirs[name] - truth[name]) + 2 * ulp(_greatest(truth[name]), dtype)
        assert _greatest(value - truth[name]) <= allowed, name


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("block", BLOCKS[:4], ids=lambda block: block.name)
def test_nan_and_inf_pass_through_as_torchs_do(block: Block, special: float, backend: str) -> None:
    operands = block.operands((2, 3), 40, torch.float32, DEVICE)
    with torch.no_grad():
        operands["input"][0, 1, 7] = special
    eager, ours = with_gradients(block.eager, operands), with_gradients(block.call, operands)
    for name in eager:
        assert torch.equal(ours[name].isfinite(), eager[name].isfinite()), name

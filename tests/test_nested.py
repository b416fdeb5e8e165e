"""Jagged nested tensors: row-wise and elementwise blocks give the results of plain rows."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ckpt_kernels
from ckpt_kernels import functional
from ckpt_kernels import nn as ours
from ckpt_kernels.catalogue.block import Block
from ckpt_kernels.catalogue.blocks import BLOCKS

from .blocks import in_float64

WIDTH = 6
OFFSETS = (0, 5, 5, 12)
# Samples of 3, 0 and 6 rows; the rows after each sample are no part of the tensor.
LENGTHS = (3, 0, 6)

BY_ROWS = [block for block in BLOCKS if not (block.channels or block.samples or block.tables)]


def nested(values: Tensor, lengths: bool = False) -> Tensor:
    """A nested leaf with `values`; with lengths, the samples have unused rows in between."""
    parts = (torch.tensor(OFFSETS), torch.tensor(LENGTHS) if lengths else None)
    return torch.nested.nested_tensor_from_jagged(values.detach(), *parts).requires_grad_()


def rows_of(tensor: Tensor) -> Tensor:
    """The rows of all samples."""
    return torch.cat(tensor.unbind())


def own_rows(tensor: Tensor, lengths: bool) -> Tensor:
    """The rows of `tensor`, the values of a nested tensor, that belong to samples."""
    if not lengths:
        return tensor
    return torch.cat([tensor[start : start + n] for start, n in zip(OFFSETS, LENGTHS, strict=False)])


def with_gradients(outputs: object, sources: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The rows of outputs, and the gradients of the sum of their cosines."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    rows = [rows_of(y) if y.is_nested else y for y in outputs]
    return rows, list(torch.autograd.grad(sum(y.cos().sum() for y in rows), sources))


@pytest.mark.parametrize("lengths", (False, True))
@pytest.mark.parametrize("block", BY_ROWS, ids=lambda block: block.name)
def test_blocks_equal_plain_rows(block: Block, lengths: bool) -> None:
    plain = in_float64(block.operands((1, OFFSETS[-1]), WIDTH, torch.float64, "cpu"))
    plain = {name: t.detach().flatten(0, -2) if name in block.rows else t.detach() for name, t in plain.items()}
    given = {
        name: nested(t, lengths) if name in block.rows else t.clone().requires_grad_() for name, t in plain.items()
    }
    # Nested tensors have the same size only if they share offsets.
    first = given[block.rows[0]]
    for name in block.rows[1:]:
        given[name] = torch.nested.nested_tensor_from_jagged(
            plain[name], first.offsets(), first.lengths()
        ).requires_grad_()
    leaves = {name: own_rows(t, lengths) if name in block.rows else t for name, t in plain.items()}
    leaves = {name: t.clone().requires_grad_() for name, t in leaves.items()}
    outputs = block.call(**given)
    assert all(y.layout == torch.jagged and y.shape[:2] == first.shape[:2] for y in outputs)
    found, gradients = with_gradients(outputs, list(given.values()))
    expected, theirs = with_gradients(block.eager(**leaves), list(leaves.values()))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    for ours_, gradient in zip(gradients, theirs, strict=True):
        torch.testing.assert_close(rows_of(ours_) if ours_.is_nested else ours_, gradient, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shape", ((3, 1, WIDTH), (3, WIDTH), (WIDTH,)))
def test_modulations_by_sample(shape: tuple[int, ...]) -> None:
    values, scale, shift = (torch.randn(s, dtype=torch.float64) for s in ((OFFSETS[-1], WIDTH), shape, shape))
    sample = torch.arange(3).repeat_interleave(torch.tensor(OFFSETS).diff())
    for norm, theirs in ((functional.modulated_layer_norm, F.layer_norm), (functional.modulated_rms_norm, F.rms_norm)):
        x, rows, *given = nested(values), *(t.clone().requires_grad_() for t in (values, scale, shift))
        found, gradients = with_gradients(norm(x, *given, WIDTH, activation="silu"), [x, *given])
        of_rows = [t.view(-1, WIDTH).expand(3, WIDTH)[sample] for t in given]
        expected, truth = with_gradients(F.silu(theirs(rows, (WIDTH,)) * (1 + of_rows[0]) + of_rows[1]), [rows, *given])
        torch.testing.assert_close([*found, rows_of(gradients[0]), *gradients[1:]], [*expected, *truth])


def test_rows_of_a_nested_tensor_are_one_tile() -> None:
    values, first, last = (torch.randn(s, dtype=torch.float64) for s in ((OFFSETS[-1], WIDTH), (8, WIDTH), (WIDTH, 8)))
    found = functional.mlp(nested(values), first, None, last, None, tiles=3)
    torch.testing.assert_close(rows_of(found), F.linear(F.gelu(F.linear(values, first)), last))


def models() -> dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor]]]:
    """Modules, and functions that compute the same in torch with the module's parameters."""
    return {
        "LayerNorm": (
            lambda: ours.LayerNorm(WIDTH, activation="gelu"),
            lambda m, x: F.gelu(F.layer_norm(x, (WIDTH,), m.weight, m.bias)),
        ),
        "RMSNorm": (lambda: ours.RMSNorm(WIDTH), lambda m, x: F.rms_norm(x, (WIDTH,), m.weight)),
        "GLU": (lambda: ours.GLU(), lambda m, x: x.chunk(2, -1)[0] * x.chunk(2, -1)[1].sigmoid()),
        "BiasAct": (lambda: ours.BiasAct(WIDTH, activation="silu"), lambda m, x: F.silu(x + m.bias)),
        "MLP": (lambda: ours.MLP(WIDTH, 8, recompute="all"), lambda m, x: m.fc2(F.gelu(m.fc1(x)))),
        "GatedMLP": (
            lambda: ours.GatedMLP(WIDTH, 8, recompute="output"),
            lambda m, x: m.down_proj(F.silu(m.gate_proj(x)) * m.up_proj(x)),
        ),
        "NormLinear": (
            lambda: ours.NormLinear(WIDTH, 8),
            lambda m, x: m.linear(F.layer_norm(x, (WIDTH,), m.norm.weight, m.norm.bias)),
        ),
        "converted": (
            lambda: converted(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, WIDTH))),
            lambda m, x: F.linear(
                F.gelu(F.linear(F.layer_norm(x, (WIDTH,), m[0].weight, m[0].bias), m[1].weight, m[1].bias)),
                m[3].weight,
                m[3].bias,
            ),
        ),
    }


def converted(model: nn.Module) -> nn.Module:
    ckpt_kernels.convert(model, recompute="all")
    return model


@pytest.mark.parametrize("name", models())
def test_modules_equal_plain_rows(name: str) -> None:
    make, theirs = models()[name]
    torch.manual_seed(0)
    module = make().double()
    values = torch.randn(OFFSETS[-1], WIDTH, dtype=torch.float64)
    x, rows = nested(values), values.clone().requires_grad_()
    found, gradients = with_gradients(module(x), [x, *module.parameters()])
    expected, truth = with_gradients(theirs(module, rows), [rows, *module.parameters()])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close([rows_of(gradients[0]), *gradients[1:]], truth)


def test_compiled_blocks_equal_eager() -> None:
    def blocks(x: Tensor, weight: Tensor) -> Tensor:
        y, total = functional.add_rms_norm(x, x.sin(), WIDTH, weight)
        return functional.bias_act(functional.glu(y, functional.layer_norm(total, WIDTH)), weight, activation="gelu")

    values, weight = torch.randn(OFFSETS[-1], WIDTH), torch.randn(WIDTH, requires_grad=True)
    found = []
    for function in (blocks, torch.compile(blocks, fullgraph=True, backend="aot_eager")):
        x = nested(values)
        output = function(x, weight)
        assert (output + x).shape == x.shape
        found.append(with_gradients(output, [x, weight]))
    (eager, (grad, *more)), (compiled, (compiled_grad, *compiled_more)) = found
    torch.testing.assert_close([*compiled, rows_of(compiled_grad), *compiled_more], [*eager, rows_of(grad), *more])


def test_transposed_heads() -> None:
    """The ragged dimension is the third."""
    values = torch.randn(OFFSETS[-1], 2, WIDTH)
    heads = nested(values).transpose(1, 2)
    found = functional.rms_norm(heads, WIDTH)
    assert found.shape == heads.shape
    torch.testing.assert_close(rows_of(found.transpose(1, 2)), F.rms_norm(values, (WIDTH,)))


def test_dropout_and_its_gradient() -> None:
    x = nested(torch.ones(OFFSETS[-1], 64))
    found = functional.bias_act(x, dropout_p=0.5)
    (grad,) = torch.autograd.grad(found.values().sum(), x)
    assert set(found.values().unique().tolist()) == {0.0, 2.0} and torch.equal(grad.values(), found.values())


def test_bad_input_is_a_named_error() -> None:
    x, values = nested(torch.randn(OFFSETS[-1], WIDTH)), torch.randn(OFFSETS[-1], WIDTH)
    for shape in ((x.shape[1], WIDTH), (5, WIDTH), tuple(x.shape)):
        for norm in (functional.layer_norm, functional.rms_norm):
            with pytest.raises(RuntimeError, match="expected dimensions after the ragged one"):
                norm(x, shape)
    with pytest.raises(RuntimeError, match="expected a last dimension of even length"):
        functional.packed_glu(x.transpose(1, 2))
    with pytest.raises(RuntimeError, match="value has shape"):
        functional.glu(x, nested(values))
    with pytest.raises(RuntimeError, match="residual has shape"):
        functional.add_rms_norm(x, values, WIDTH)
    longer = torch.nested.nested_tensor_from_jagged(torch.cat([values, values]), x.offsets())
    with pytest.raises(RuntimeError, match="have values of shapes"):
        functional.glu(x, longer)
    with pytest.raises(RuntimeError, match="expected none"):
        functional.group_norm(x, 1)
    with pytest.raises(RuntimeError, match="where the samples are the first dimensions of input"):
        functional.modulated_rms_norm(x, torch.ones(2, 1, WIDTH), torch.ones(2, 1, WIDTH), WIDTH)
    with pytest.raises(RuntimeError, match=r"expected one of layout torch\.jagged"):
        functional.rms_norm(torch.nested.nested_tensor([values], layout=torch.strided), WIDTH)

"""Results of elementwise blocks have the strides that eager torch gives them."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from ckpt_kernels import functional as F
from ckpt_kernels import nn as ours
from ckpt_kernels import ops, recompute
from ckpt_kernels.catalogue.block import Block
from ckpt_kernels.catalogue.blocks import BLOCKS

from .conftest import DEVICE, emulated, serving, unserved, where

ELEMENTWISE = [block for block in BLOCKS if block.function in ("bias_act", "dyt", "glu", "packed_glu")]


def ordered(*order: int) -> Callable[[Tensor], Tensor]:
    """A function that copies a tensor so that the dimensions have this order in memory."""
    back = [order.index(dim) for dim in range(len(order))]
    return lambda t: t.permute(order).contiguous().permute(back)


def sliced(lay: Callable[[Tensor], Tensor], dim: int) -> Callable[[Tensor], Tensor]:
    """A function that copies a tensor into a part of a larger tensor with this memory layout."""
    return lambda t: lay(torch.cat([t, t], dim)).narrow(dim, 0, t.shape[dim])


# The leading shape and the memory layout by name.
LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "contiguous": ((2, 3, 4), lambda t: t.contiguous()),
    "transposed": ((3, 5), ordered(0, 2, 1)),
    "rows transposed": ((3, 5), ordered(1, 0, 2)),
    "permuted": ((3, 5), ordered(2, 0, 1)),
    "channels last": ((2, 3, 4), ordered(0, 2, 3, 1)),
    "channels last, 3-D": ((2, 3, 4, 2), ordered(0, 2, 3, 4, 1)),
    "channels first": ((2, 3, 4), ordered(0, 3, 1, 2)),
    "one channel": ((2, 1, 4), ordered(0, 2, 3, 1)),
    "sliced": ((3, 5), sliced(ordered(0, 1, 2), 2)),
    "sliced rows": ((3, 5), sliced(ordered(0, 1, 2), 1)),
    "sliced channels last": ((2, 3, 4), sliced(ordered(0, 2, 3, 1), 1)),
    "sliced channels": ((2, 3, 4), sliced(ordered(0, 1, 2, 3), 1)),
    "every other": ((3, 5), lambda t: torch.stack([t, t], -1)[..., 0]),
    "expanded": ((3, 5), lambda t: t[:1].expand(t.shape)),
    "expanded columns": ((3, 5), lambda t: ordered(1, 0, 2)(t[..., :1]).expand(t.shape)),
}
INCOMING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "as the output": lambda g, output: torch.empty_like(output).copy_(g),
    "contiguous": lambda g, output: g.contiguous(),
    "reversed": lambda g, output: ordered(*reversed(range(g.dim())))(g),
    "sliced": lambda g, output: sliced(ordered(*range(g.dim())), 1)(g),
    "expanded": lambda g, output: g[:1, :1].expand(g.shape),
}

by_layout = pytest.mark.parametrize("layout", LAYOUTS)


def operands_of(block: Block, layout: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    lead, lay = LAYOUTS[layout]
    found = block.operands(lead, 6, dtype, DEVICE)
    return {name: (lay(t.detach()) if name in block.rows else t.detach()).requires_grad_() for name, t in found.items()}


def results(fn: Callable[..., Sequence[Tensor]], operands: dict[str, Tensor], incoming: str) -> dict[str, Tensor]:
    (output,) = fn(**operands)
    generator = torch.Generator().manual_seed(1)
    grad_output = INCOMING[incoming](torch.randn(output.shape, generator=generator).to(output), output.detach())
    found = torch.autograd.grad(output, list(operands.values()), grad_output)
    return {"output": output.detach()} | {f"grad {name}": g for name, g in zip(operands, found, strict=True)}


def agree(block: Block, layout: str, incoming: str) -> None:
    operands = operands_of(block, layout)
    found, expected = results(block.call, operands, incoming), results(block.eager, operands, incoming)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)
        # The strides of a dense tensor: torch may return the incoming gradient itself, which need not be dense.
        strides = torch.empty_like(value).stride()
        if block.function == "packed_glu" and name == "grad input":
            # The gradient has the input's strides; torch concatenates two halves.
            strides = torch.empty_like(operands["input"]).stride()
        assert found[name].stride() == strides, (name, layout, incoming)


# All backends view tensors as matrices in the same way, so a few layouts are enough for emulated ones.
@where(
    lambda layout, backend: not emulated(backend) or layout in ("transposed", "channels last", "sliced channels last")
)
@pytest.mark.parametrize("block", ELEMENTWISE, ids=lambda block: block.name)
@by_layout
def test_results_have_torchs_strides(block: Block, layout: str, backend: str) -> None:
    for name in INCOMING:
        agree(block, layout, name)


@pytest.mark.parametrize("activation", ["gelu", "relu", "identity"])
@by_layout
def test_dropout_masks_do_not_depend_on_strides(activation: str, layout: str) -> None:
    """The same seed drops the same elements in every memory layout, on every backend, forward and backward."""
    lead, lay = LAYOUTS[layout]
    values = lay(torch.randn(*lead, 6, device=DEVICE))
    grad_output = torch.randn_like(values, memory_format=torch.contiguous_format)
    seed = torch.tensor([11], device=DEVICE)

    def dropped(input: Tensor, grad_output: Tensor) -> list[Tensor]:
        input = input.detach().requires_grad_()
        output = torch.ops.ckpt_kernels.bias_act(input, None, seed, activation, 0.5)
        return [output.detach(), *torch.autograd.grad(output, input, grad_output)]

    with serving("reference"):
        expected = dropped(values.contiguous(), grad_output)
    for name in ("reference", "native", "triton", "cuda_on_host"):
        if unserved(name, torch.float32):
            continue
        with serving(name):
            for incoming in (grad_output, INCOMING["reversed"](grad_output, values)):
                found = dropped(values, incoming)
                assert found[0].stride() == torch.empty_like(values).stride()
                for a, b in zip(found, expected, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", ELEMENTWISE, ids=lambda block: block.name)
@by_layout
def test_dispatcher_and_fake_tensors_have_the_same_strides(block: Block, layout: str) -> None:
    operands = tuple(operands_of(block, layout).values())
    options = {
        "bias_act": (*[None] * (3 - len(operands)), "silu", 0.0),
        "dyt": (*[None] * (4 - len(operands)),),
        "glu": ops.glu.Options("silu"),
        "packed_glu": ops.glu.PackedOptions("silu", block.options.get("layout")),
    }[block.function]
    overload = getattr(torch.ops.ckpt_kernels, block.function).default
    backward = getattr(torch.ops.ckpt_kernels, f"{block.function}_backward").default
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(overload, (*operands, *options), test_utils=tests)
    fast = getattr(ops.glu if block.function == "packed_glu" else getattr(ops, block.function), block.function)
    tensors = options[: len(options) - len(fast.options._fields)]
    output = fast(*operands, *tensors, fast.options(*options[len(tensors) :]))
    assert output.stride() == overload(*operands, *options).stride()
    needs_grad = [index < len(operands) for index in range(fast.differentiable)]
    for lay in INCOMING.values():
        grad_output = lay(torch.randn_like(output).detach(), output.detach())
        given = (grad_output, *(t.detach() for t in operands), *options, needs_grad)
        torch.library.opcheck(backward, given, test_utils=tests[:2])


@pytest.mark.parametrize("dim", [1, 2, 3, -1])
@pytest.mark.parametrize("layout", ["gate_first", "value_first", "interleaved"])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 0, 1, 2)], ids=str)
def test_a_packed_dimension_anywhere(dim: int, layout: str, order: tuple[int, ...], backend: str) -> None:
    input = ordered(*order)(torch.randn(2, 4, 6, 8, device=DEVICE)).requires_grad_()
    found = ours.GLU(dim, layout=layout)(input)
    index = torch.arange(input.shape[dim], device=DEVICE)
    half = input.shape[dim] // 2
    first, second = (index[::2], index[1::2]) if layout == "interleaved" else (index[:half], index[half:])
    gate, value = (input.index_select(dim, part) for part in (first, second))
    gate, value = (value, gate) if layout == "value_first" else (gate, value)
    expected = torch.sigmoid(gate) * value
    torch.testing.assert_close(found, expected)
    assert found.stride() == ordered(*order)(expected.detach()).stride()
    grad_output = torch.randn_like(expected)
    (a,), (b,) = (torch.autograd.grad(y, input, grad_output) for y in (found, expected))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert a.stride() == input.stride()


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "sliced"])
def test_an_activation_between_transposes(dense: bool) -> None:
    """A view of the second transpose would be an error if the activation's result were contiguous."""
    x = torch.randn(2, 5, 12, device=DEVICE)
    x = x if dense else torch.cat([x, x], 1)[:, :5]
    y = F.bias_act(x.transpose(1, 2), activation="gelu").transpose(1, 2)
    assert y.is_contiguous()
    torch.testing.assert_close(y.view(2, 60), torch.nn.functional.gelu(x).reshape(2, 60))


BEFORE: dict[str, Callable[[Tensor], Tensor]] = {
    "bias_act": lambda x: F.bias_act(x, activation="gelu"),
    "dropped": lambda x: F.bias_act(x, activation="gelu", dropout_p=0.5),
    "biased": lambda x: F.bias_act(x, x.new_ones(x.shape[-1]), activation="gelu"),
    "dyt": lambda x: F.dyt(x, x.new_full((1,), 0.7), x.new_ones(x.shape[-1])),
    "glu": lambda x: F.glu(x, x.roll(1, 0)),
    "packed_glu": lambda x: F.packed_glu(torch.cat([x, x], -1)),
    "chain": lambda x: F.bias_act(F.bias_act(x, activation="silu"), activation="gelu"),
}


class _Contiguous(torch.autograd.graph.saved_tensors_hooks):
    """Unpacks contiguous copies of saved tensors, as `torch.autograd.graph.save_on_cpu` does."""

    def __init__(self) -> None:
        super().__init__(lambda t: t.detach().clone(memory_format=torch.contiguous_format), lambda t: t)


# The recomputation of outputs does not depend on the backend.
@where(lambda backend: not emulated(backend))
@pytest.mark.parametrize("hooks", [False, True], ids=["by itself", "within hooks"])
@pytest.mark.parametrize("block", BEFORE)
@pytest.mark.parametrize("reader", ["linear", "conv", "transposed linear", "product"])
def test_a_recomputed_output_has_the_outputs_strides(block: str, reader: str, hooks: bool, backend: str) -> None:
    torch.manual_seed(0)
    orders = {"conv": (0, 2, 3, 1), "linear": (3, 0, 1, 2), "transposed linear": (0, 1, 3, 2), "product": (3, 2, 1, 0)}
    x = ordered(*orders[reader])(torch.randn(2, 6, 6, 6, device=DEVICE)).requires_grad_()
    layer = (nn.Conv2d(6, 3, 3) if reader == "conv" else nn.Linear(6, 3)).to(DEVICE)

    def read(y: Tensor) -> Tensor:
        if reader == "product":
            return (y * y.transpose(0, 3).mean()).sin() + layer.weight.sum()
        return layer(y.transpose(2, 3) if reader == "transposed linear" else y)

    def gradients(discard: bool) -> list[Tensor]:
        torch.manual_seed(1)
        inputs = [x, layer.weight]
        if not discard:
            return list(torch.autograd.grad(read(BEFORE[block](x)).square().sum(), inputs))
        if hooks:
            with _Contiguous(), recompute.discard_outputs():
                loss = read(BEFORE[block](x)).square().sum()
        else:
            with recompute.discard_outputs():
                loss = read(BEFORE[block](x)).square().sum()
        return list(torch.autograd.grad(loss, inputs))

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        if hooks:
            # The hooks change the strides of other saved tensors, and sums over these round differently.
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
        else:
            assert torch.equal(found, expected)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("order", [(1, 0, 2), (2, 0, 1), (0, 2, 1)], ids=str)
def test_linear_layers_read_any_strides(order: tuple[int, ...], p: float, gated: bool, backend: str) -> None:
    """At every level; F.linear adds up products of non-contiguous tensors in another order than this package."""
    x = ordered(*order)(torch.randn(3, 4, 6, device=DEVICE)).requires_grad_()
    weight = torch.randn(5, 6, device=DEVICE, requires_grad=True)
    wide, back = (torch.randn(*s, device=DEVICE, requires_grad=True) for s in ((16, 6), (5, 8)))
    found = []
    for level in ("block", "output", "all"):
        torch.manual_seed(0)
        if gated:
            y = F.gated_mlp(x, wide, None, back, dropout_p=p, recompute=level)
            inputs = (x, wide, back)
        else:
            y = F.act_linear(x, weight, activation="gelu", dropout_p=p, recompute=level)
            inputs = (x, weight)
        found.append([y, *torch.autograd.grad(y.sin().sum(), inputs)])
    for result in found[1:]:
        for a, b in zip(result, found[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)

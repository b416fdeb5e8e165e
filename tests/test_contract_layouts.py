"""Blocks with any leading shape, any strides of operands, and any incoming gradient."""

import hypothesis
import hypothesis.strategies as st
import torch

from ckpt_kernels.catalogue.block import Block
from ckpt_kernels.catalogue.blocks import BLOCKS

from .blocks import by_block, with_gradients
from .conftest import DEVICE, serving, where


def strided(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in another memory layout."""
    values = tensor.detach()
    if layout == "sliced":
        wide = torch.full((*values.shape[:-1], values.shape[-1] + 5), float("nan"), dtype=values.dtype)
        wide = wide.to(values.device)
        wide[..., 2 : 2 + values.shape[-1]] = values
        values = wide[..., 2 : 2 + values.shape[-1]]
    elif layout == "transposed":
        values = values.transpose(-1, -2).contiguous().transpose(-1, -2)
    elif layout == "leading":
        values = values.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "every other":
        wide = torch.full((*values.shape[:-1], 2 * values.shape[-1]), float("nan"), dtype=values.dtype)
        wide = wide.to(values.device)
        wide[..., ::2] = values
        values = wide[..., ::2]
    return values.requires_grad_()


@by_block
def test_strides_do_not_matter(block: Block, backend: str) -> None:
    operands = block.operands((3, 4), 24, torch.float32, DEVICE)
    expected = with_gradients(block.call, operands)
    for layout in ("sliced", "transposed", "leading", "every other"):
        rearranged = {name: strided(t, layout) if name in block.rows else t for name, t in operands.items()}
        found = with_gradients(block.call, rearranged)
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, rtol=1e-5, atol=1e-5, msg=lambda text, at=(layout, name): f"{at}: {text}"
            )


@by_block
def test_expanded_incoming_gradients(block: Block, backend: str) -> None:
    """The backward pass of `sum` has a gradient with strides of zero."""
    operands = block.operands((3, 4), 24, torch.float32, DEVICE)
    tensors = [t for t in operands.values() if t.requires_grad]
    summed = torch.autograd.grad(sum(y.sum() for y in block.call(**operands)), tensors)
    outputs = block.call(**operands)
    plain = torch.autograd.grad(outputs, tensors, [torch.ones_like(y) for y in outputs])
    for a, b in zip(summed, plain, strict=True):
        assert torch.equal(a, b)


@by_block
def test_tensors_without_rows(block: Block, backend: str) -> None:
    operands = block.operands((0, 4), 24, torch.float32, DEVICE)
    results = with_gradients(block.call, operands)
    for name, value in results.items():
        assert value.isfinite().all(), name
        if name.removeprefix("grad ") in block.parameters:
            assert value.shape == operands[name.removeprefix("grad ")].shape and (value == 0).all()


# Blocks with samples or channels need a leading dimension.
@where(lambda block: not block.samples and not block.channels)
@by_block
def test_one_dimension_only(block: Block, backend: str) -> None:
    operands = block.operands((1, 1), 24, torch.float32, DEVICE)
    flat = {name: t.detach().reshape(-1).requires_grad_() for name, t in operands.items()}
    expected, found = with_gradients(block.call, operands), with_gradients(block.call, flat)
    for name in expected:
        assert torch.equal(found[name].reshape(-1), expected[name].reshape(-1)), name


def test_normalized_shape_of_several_dimensions(backend: str) -> None:
    from ckpt_kernels import functional

    x = torch.randn(5, 3, 4, 6, device=DEVICE, requires_grad=True)
    w, b = (torch.randn(4, 6, device=DEVICE, requires_grad=True) for _ in range(2))
    ours = functional.layer_norm(x, (4, 6), w, b)
    theirs = torch.nn.functional.layer_norm(x, (4, 6), w, b)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    g = torch.randn_like(ours)
    for a, e in zip(torch.autograd.grad(ours, (x, w, b), g), torch.autograd.grad(theirs, (x, w, b), g), strict=True):
        assert a.shape == e.shape
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


@hypothesis.given(
    data=st.data(),
    block=st.sampled_from(BLOCKS),
    samples=st.integers(1, 5),
    tokens=st.integers(1, 40),
    columns=st.integers(1, 700),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_native_equals_the_reference_for_any_shape(data, block, samples, tokens, columns, dtype) -> None:
    hypothesis.assume(not block.channels or samples * columns > 2)
    backend = "native" if DEVICE == "cpu" else "triton"
    layout = data.draw(st.sampled_from(["plain", "sliced", "leading", "every other"]))
    operands = block.operands((samples, tokens), columns, dtype, DEVICE, seed=columns)
    rearranged = {name: strided(t, layout) if name in block.rows else t for name, t in operands.items()}
    with serving("reference"):
        expected = with_gradients(block.call, rearranged)
    with serving(backend):
        found = with_gradients(block.call, rearranged)
    for name, value in expected.items():
        # Gradients of rows with few columns are differences of nearly equal numbers.
        scale = 1 + value.float().abs().max() if columns > 4 else 1e3
        error = (found[name].float() - value.float()).abs().max()
        assert error <= 4 * torch.finfo(dtype).eps * scale * (1 if columns > 4 else 10), (name, error)

"""Discarding the outputs of torch's own ops that are written to, viewed, or have other memory layouts."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor

from ckpt_kernels import functional as F

from .discarded_outputs import (
    ROWS,
    WIDTH,
    Parameters,
    assert_same_outcome,
    assert_unchanged,
    maps,  # noqa: F401, the fixture image
    normed,
    random_tensor,
    rows,  # noqa: F401, the fixture x
    shows_saved,
)

pytestmark = pytest.mark.skipif(not shows_saved, reason="this torch does not show what nodes hold")


def written(h: Tensor, write: str) -> Tensor:
    if write == "no_grad":
        with torch.no_grad():
            h.mul_(1.5)
    elif write == "detach":
        h.detach().mul_(1.5)
    elif write == "a view":
        with torch.no_grad():
            h.view(-1)[: WIDTH + 1].mul_(1.5)
    elif write == "in the graph":
        h.mul_(1.5)
    else:
        h[:, :3] += 1
    return h


def in_another_tensor(output: Tensor) -> Tensor:
    """The memory of a block's output in a tensor with a version counter of its own, as `convert` returns LayerNorm2d's
    output. Two autograd nodes lie between the two."""
    return torch.ops.aten._unsafe_view(output.unsqueeze(0), output.shape)


def written_times(h: Tensor, write: str, times: int) -> Tensor:
    for _ in range(times):
        written(h, write)
    return h


WRITES = ["no_grad", "detach", "a view", "in the graph", "a part in the graph"]
WRITTEN: dict[str, Callable[[Tensor, Parameters, str], Tensor]] = {
    "what is read": lambda x, p, how: TF.linear(written(TF.silu(x * 1) * x.sin(), how), p["a"]),
    "a block's output": lambda x, p, how: TF.linear(TF.relu(written(normed(x), how)), p["a"]),
    "a block's output, in a sum": lambda x, p, how: TF.linear(written(normed(x), how) + normed(x.sin()), p["a"]),
    "what a product gave, before a write over it": lambda x, p, how: TF.linear(
        TF.relu6(written(x @ p["b"], how), inplace=True), p["a"]
    ),
    "what a product gave, after a write over it": lambda x, p, how: TF.linear(
        written(TF.silu(x @ p["b"], inplace=True), how), p["a"]
    ),
    "what is made of a clone": lambda x, p, how: TF.linear(written(TF.relu6((x @ p["b"]).clone()), how), p["a"]),
    "what is made over a clone": lambda x, p, how: TF.linear(
        written(TF.relu6((x @ p["b"]).clone(), inplace=True), how), p["a"]
    ),
    "a block's output, before a write over it": lambda x, p, how: TF.linear(
        TF.leaky_relu(written(normed(x), how), 0.2, inplace=True), p["a"]
    ),
    "a block's output, after a write over it": lambda x, p, how: TF.linear(
        written(TF.elu(normed(x), 0.5, inplace=True), how), p["a"]
    ),
    "what is made of a block's living output": lambda x, p, how: (
        n := normed(x),
        TF.linear(written(TF.silu(n), how), p["a"]),
    )[1],
    "what is cast": lambda x, p, how: TF.linear(written(normed(x), how).double(), p["a"].double()),
    "a sum": lambda x, p, how: TF.linear(TF.relu(written(normed(x) + normed(x.sin()), how)), p["a"]),
    "a sum in place": lambda x, p, how: TF.linear(TF.relu(written(normed(x).add_(normed(x.sin())), how)), p["a"]),
    "before a sum in place": lambda x, p, how: TF.linear(written(normed(x), how).add_(normed(x.sin())).relu_(), p["a"]),
    "a block's output, before a sum": lambda x, p, how: (
        n := written(normed(x), how),
        t := n + normed(x.sin()),
        TF.linear(TF.relu(t), p["a"]),
    )[2],
    "a sum and a block": lambda x, p, how: TF.linear(
        TF.relu((n := normed(x)) + normed(x.sin())) + written(n, how).sum(), p["a"]
    ),
    "before and after": lambda x, p, how: (
        TF.linear((h := TF.silu(x * 1) * x.sin()), p["a"]).sum() + TF.linear(written(h.clone(), how), p["b"]).sum()
    ),
    "a scaled tensor": lambda x, p, how: TF.linear(written(normed(x) * 2, how) * 3, p["a"]),
    "before a product with its sigmoid": lambda x, p, how: (
        h := x * 1,
        s := h.sigmoid(),
        TF.linear(written(h, how) * s, p["a"]),
    )[2],
    "over its sigmoid's input": lambda x, p, how: (
        h := x * 1,
        s := h.sigmoid(),
        written(h, how),
        TF.linear(h.mul_(s) * 2, p["a"]),
    )[3],
    "its sigmoid's input, which is read": lambda x, p, how: (
        h := x * 1,
        s := h.sigmoid(),
        written(h, how),
        TF.linear(h.mul_(s), p["a"]),
    )[3],
    **{
        f"a block's memory in another tensor, {times} times": lambda x, p, how, times=times: TF.linear(
            written_times(in_another_tensor(normed(x)), how, times), p["a"]
        )
        for times in (1, 2, 3)
    },
    "a sigmoid": lambda x, p, how: TF.linear((h := x * 1) * written(h.sin().cos(), how), p["a"]),
}


@pytest.mark.parametrize("how", WRITES)
@pytest.mark.parametrize("model", WRITTEN.values(), ids=WRITTEN)
def test_written_tensors_give_the_same_outcome(model: Callable, how: str, x: Tensor) -> None:
    p = Parameters()
    assert_same_outcome(lambda: model(x, p, how), [x, p["a"], p["b"]])


@pytest.mark.parametrize("how", ["no_grad", "detach"])
def test_a_result_that_is_written_to_before_it_is_read(how: str, x: Tensor) -> None:
    """The pass does not run the node that keeps the result, which would detect the write."""
    p = Parameters()
    assert_same_outcome(lambda: TF.linear(-written(TF.relu(normed(x)), how), p["a"]), [p["a"]])


def test_an_operand_that_is_written_to_later(x: Tensor) -> None:
    """Eager torch does not keep the operand, so a write is allowed, and neither is the operand kept here."""
    p = Parameters()

    def call() -> Tensor:
        shortcut = TF.linear(x, p["a"])
        h = TF.relu(normed(x) + shortcut)
        y = TF.linear(h, p["b"])
        shortcut += y
        return TF.linear(shortcut, p["c"])

    assert_unchanged(call, [x, *p.values()])
    assert_unchanged(call, [x, *p.values()], temporaries=True)


SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "a slice": lambda h: h[:, 3:9],
    "every other": lambda h: h[::2, ::3],
    "a part that is scaled": lambda h: h[3:9] * h[3:9].sigmoid(),
    "expanded": lambda h: h[:1].expand(5, -1) * h[:5],
    "transposed": lambda h: h.t() * h.t().sigmoid(),
    "of two layouts": lambda h: h.t().contiguous().t() * h.view(-1).view_as(h),
    "no rows": lambda h: h[:0] * h[:0].sigmoid(),
    "one number": lambda h: h[0, 0] * h[0, 0].sigmoid(),
    "broadcast": lambda h: h * h[:1].sigmoid() * h[:, :1],
    "whole numbers": lambda h: h * torch.arange(h.shape[-1], device=h.device) * 3,
    "complex": lambda h: torch.view_as_real(torch.complex(h, h.sin()) * torch.complex(h, h)).sum(-1),
    "wide": lambda h: (h.double() * h.double().sigmoid()).float(),
    "narrow": lambda h: (h.half() * h.half().sigmoid()).float(),
    "wide and narrow": lambda h: h.bfloat16() * h.sigmoid(),
    "permuted": lambda h: TF.silu(h.view(4, 16, -1).permute(2, 0, 1)).flatten(1),
    "unbound": lambda h: torch.stack(TF.silu(h).view(4, 16, -1).unbind(1)),
    "squeezed": lambda h: (TF.silu(h).unsqueeze(1) * h.unsqueeze(1)).squeeze(1),
    "a clone that lies as it lay": lambda h: h.t().clone(),
    "a cast that lies elsewhere": lambda h: h.view(4, 4, 4, -1).to(torch.float64, memory_format=torch.channels_last),
    "detached": lambda h: TF.silu(h).detach() * h,
    "whole and detached": lambda h: (s := TF.silu(h)) * s.detach(),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_views_dtypes_and_layouts(shape: Callable, x: Tensor) -> None:
    def call() -> Tensor:
        h = shape(x * 1)
        return h.sin() * h

    assert_unchanged(call, [x])
    assert_unchanged(lambda: shape(normed(x)).float().sin(), [x], temporaries=True)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("act", [TF.silu, TF.gelu, torch.sigmoid, TF.mish], ids=lambda act: act.__name__)
def test_memory_formats_of_images(act: Callable, layout: torch.memory_format, image: Tensor) -> None:
    """A recomputed output has the original's memory layout, which its views rely on."""
    kernel = torch.nn.Parameter(random_tensor(8, 8, 3, 3) / 5)
    x = image.detach().to(memory_format=layout).requires_grad_()

    def call() -> Tensor:
        h = TF.conv2d(x, kernel)
        return TF.conv2d(act(h) * h.transpose(2, 3), kernel), (act(h).permute(3, 0, 2, 1) * h[0, 0, 0, 0]).sin()

    assert_unchanged(call, [x, kernel])


@pytest.mark.parametrize("products", [False, True], ids=["outputs", "products too"])
def test_a_written_first_operand_of_addmm(products: bool) -> None:
    """An op makes the first operand, which is then written to without autograd."""
    p = Parameters()
    x = random_tensor(16, WIDTH, seed=1).requires_grad_()

    def call() -> Tensor:
        t = -p["bias"]
        t.detach().add_(1)
        return TF.linear(F.glu(torch.addmm(t, normed(x), p["a"]), x * 1, activation="silu"), p["c"])

    assert_unchanged(call, [x, p["a"], p["c"]], products=products)


WIDER: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda h, g: h.add_(g),
    "scaled sum": lambda h, g: h.add_(g, alpha=0.3),
    "difference": lambda h, g: h.sub_(g),
    "product": lambda h, g: h.mul_(g),
    "quotient": lambda h, g: h.div_(g),
    "sum of a product": lambda h, g: h.addcmul_(g, g),
}


@pytest.mark.parametrize("products", [False, True], ids=["outputs", "products too"])
@pytest.mark.parametrize("write", WIDER.values(), ids=WIDER)
def test_a_write_of_a_wider_operand_keeps_the_dtype(write: Callable, products: bool) -> None:
    """The result is rounded to 16 bits before the next op reads the result, also if that op makes 32 bits of it."""
    x = random_tensor(ROWS, WIDTH, seed=1, dtype=torch.bfloat16).requires_grad_()
    wide = torch.nn.Parameter(random_tensor(WIDTH, seed=3).square() + 0.5)
    weight = torch.nn.Parameter(random_tensor(WIDTH, WIDTH, seed=4))

    def call() -> Tensor:
        return TF.linear(write(normed(x), wide), weight.bfloat16()), TF.linear(write(normed(x), wide).float(), weight)

    assert_unchanged(call, [x, wide, weight], products=products)

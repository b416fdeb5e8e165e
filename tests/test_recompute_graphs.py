"""Discarding outputs in random graphs, and with tensors that have no storage or a freed storage."""

import pytest
import torch
import torch.nn.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ckpt_kernels import functional as F
from ckpt_kernels import recompute
from ckpt_kernels.memory import saved_bytes

from .conftest import DEVICE
from .readers import (
    WIDTH,
    assert_same_bits,
    weights,  # noqa: F401, the fixture p
)

OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["norm", "gelu", "glu", "add_norm", "linear", "mul", "view", "join", "frozen", "no_grad"]),
        st.integers(0, 7),
        st.integers(0, 7),
    ),
    min_size=3,
    max_size=14,
)


def _random_graph(plan: list, p: dict, x: Tensor) -> Tensor:
    """A graph with branches, joins and views: each operation reads two of the values made before."""
    values = [x * 1.5]
    for name, first, second in plan:
        a, b = values[first % len(values)], values[second % len(values)]
        if name == "norm":
            values.append(F.layer_norm(a, WIDTH, p["norm"], activation="silu"))
        elif name == "gelu":
            values.append(F.bias_act(a, p["norm"], activation="gelu"))
        elif name == "glu":
            values.append(F.glu(a, b))
        elif name == "add_norm":
            values += F.add_rms_norm(a, b, WIDTH, p["norm"])
        elif name == "linear":
            values.append(TF.linear(a, p["a"] if second % 2 else p["b"]))
        elif name == "mul":
            values.append(a * b.tanh())
        elif name == "view":
            values.append(a.transpose(0, 1).reshape(8, 2, WIDTH).flip(0).transpose(0, 1))
        elif name == "join":
            values.append(torch.cat((a[:, :4], b[:, 4:]), 1))
        elif name == "frozen":
            values.append(TF.linear(F.rms_norm(a.detach(), WIDTH, p["norm"].detach()), p["c"]))
        else:
            with torch.no_grad():
                values.append(F.rms_norm(a, WIDTH, p["norm"]))
    return sum(value.sin().sum() for value in values[1:]) + x.sum()


@settings(max_examples=150)
@given(plan=OPERATIONS)
def test_random_graphs_keep_gradients_and_save_memory(plan: list) -> None:
    p = {"norm": torch.nn.Parameter(torch.linspace(0.5, 1.5, WIDTH, device=DEVICE))}
    generator = torch.Generator().manual_seed(0)
    p |= {k: torch.nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator).to(DEVICE) / 4) for k in "abc"}
    x = torch.randn(2, 8, WIDTH, generator=generator).to(DEVICE).requires_grad_()
    sources = [x, *p.values()]
    expected = torch.autograd.grad(_random_graph(plan, p, x), sources, allow_unused=True)
    with recompute.discard_outputs():
        loss = _random_graph(plan, p, x)
    assert_same_bits(list(torch.autograd.grad(loss, sources, allow_unused=True)), list(expected))
    graph = lambda x: _random_graph(plan, p, x)  # noqa: E731
    assert saved_bytes(recompute.discard_outputs()(graph), x) <= saved_bytes(graph, x)


def test_tensors_without_a_storage_pass_through() -> None:
    sparse = torch.randn(5, 8, device=DEVICE).to_sparse().requires_grad_()
    weight = torch.randn(8, 4, device=DEVICE, requires_grad=True)

    def gradients() -> tuple[torch.Tensor, ...]:
        y = torch.sparse.mm(sparse, weight)
        return torch.autograd.grad(y.sum(), (sparse, weight))

    expected = gradients()
    with recompute.discard_outputs():
        y = torch.sparse.mm(sparse, weight)
    for found, value in zip(torch.autograd.grad(y.sum(), (sparse, weight)), expected, strict=True):
        torch.testing.assert_close(found.to_dense(), value.to_dense())


def test_a_freed_weight_is_an_error() -> None:
    x, weight = torch.randn(6, 8, device=DEVICE, requires_grad=True), torch.ones(8, device=DEVICE, requires_grad=True)
    reader = torch.randn(4, 8, device=DEVICE, requires_grad=True)
    with recompute.discard_outputs():
        y = torch.nn.functional.linear(F.rms_norm(x, 8, weight, activation="silu"), reader)
    weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"a weight needed to compute again, torch.float32 \(8,\), has been freed"):
        y.sum().backward()

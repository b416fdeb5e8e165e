"""torch.func and autograd transforms of every block give the derivatives of the eager composition, in float64."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import ckpt_kernels
from ckpt_kernels import functional as F
from ckpt_kernels import use_backend
from ckpt_kernels.catalogue.block import Block
from ckpt_kernels.catalogue.blocks import BLOCKS
from ckpt_kernels.catalogue.linear import PAIRS, Pair

from .conftest import DEVICE

_ZEROS = {"allow_unused": True, "materialize_grads": True}

Function = Callable[..., tuple[Tensor, ...]]


class Case(NamedTuple):
    """A block, or a block with products at one recompute level, as functions of tensors; the first is the input."""

    name: str
    ours: Function
    eager: Function
    tensors: tuple[Tensor, ...]


def _case(block: Block | Pair, level: str = "") -> Case:
    operands = block.operands((2, 4), 3, torch.float64, DEVICE)
    names = list(operands)
    call = block.at(level) if level else block.call

    def by_place(function: Callable[..., Sequence[Tensor]]) -> Function:
        return lambda *tensors: tuple(function(**dict(zip(names, tensors, strict=True))))

    tensors = tuple(t.detach() for t in operands.values())
    name = f"{block.name} {level}".rstrip()
    return Case(name, by_place(call), by_place(block.eager), tensors)


CASES = [_case(block) for block in BLOCKS] + [_case(pair, "all") for pair in PAIRS]
# The other levels record other autograd graphs, which matters for transforms of a recorded graph.
LEVELS = [_case(pair, level) for pair in PAIRS for level in ("block", "output")]


def _loss(function: Function) -> Callable[..., Tensor]:
    """A scalar function of the outputs with nonzero second derivatives."""

    def loss(*tensors: Tensor) -> Tensor:
        outputs = function(*tensors)
        weights = [torch.arange(1, y.numel() + 1, device=y.device).view(y.shape) for y in outputs]
        return sum((y.square() * w).sum() for y, w in zip(outputs, weights, strict=True))

    return loss


def _like(tensors: Sequence[Tensor], seed: int, *lead: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn((*lead, *t.shape), generator=generator, dtype=t.dtype).to(t.device) for t in tensors)


def _leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.clone().requires_grad_() for t in tensors]


def _batched_input(f: Function, tensors: tuple[Tensor, ...]) -> Any:
    return vmap(f, (1, *[None] * (len(tensors) - 1)))(torch.stack([tensors[0], tensors[0] + 1], 1), *tensors[1:])


def _nested_vmap(f: Function, tensors: tuple[Tensor, ...]) -> Any:
    inner = vmap(f, (0, *[None] * (len(tensors) - 1)))
    return vmap(inner, (1, *[0] * (len(tensors) - 1)))(*_like(tensors[:1], 1, 2, 3), *_like(tensors[1:], 2, 3))


def _per_sample_gradients(f: Function, tensors: tuple[Tensor, ...]) -> Any:
    every = tuple(range(len(tensors)))
    in_dims = (0, *[None] * (len(tensors) - 1))
    return vmap(grad(_loss(f), every), in_dims)(*_like(tensors[:1], 1, 3), *tensors[1:])


def _jvp(f: Function, tensors: tuple[Tensor, ...]) -> Any:
    return jvp(f, tensors, _like(tensors, 1))


def _jacobians(f: Function, tensors: tuple[Tensor, ...]) -> Any:
    return [jacobian(f, tuple(range(len(tensors))))(*tensors) for jacobian in (jacfwd, jacrev)]


def _hessian(f: Function, tensors: tuple[Tensor, ...]) -> Any:
    return hessian(_loss(f), len(tensors) - 1)(*tensors), jacrev(jacrev(_loss(f)), len(tensors) - 1)(*tensors)


def _vjp_of_vjp(f: Function, tensors: tuple[Tensor, ...]) -> Any:
    outputs, pull = vjp(f, *tensors)

    def first(cotangents: tuple[Tensor, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        return vjp(f, *tensors)[1](cotangents)

    found, second = vjp(first, _like(outputs, 1), *tensors)
    return outputs, pull(_like(outputs, 1)), second(_like(found, 2))


def _grads_batched(f: Function, tensors: tuple[Tensor, ...]) -> Any:
    leaves = _leaves(tensors)
    outputs = f(*leaves)
    first = torch.autograd.grad(outputs, leaves, _like(outputs, 1, 2), is_grads_batched=True, retain_graph=True)
    # Gradients of some operands.
    some = torch.autograd.grad(outputs[-1], leaves[-1:], _like(outputs, 2, 2)[-1], is_grads_batched=True, **_ZEROS)
    assert not any(g.requires_grad for g in (*first, *some))
    return first, some


def _grads_batched_twice(f: Function, tensors: tuple[Tensor, ...]) -> Any:
    leaves = _leaves(tensors)
    outputs = f(*leaves)
    first = torch.autograd.grad(outputs, leaves, _like(outputs, 1, 2), is_grads_batched=True, create_graph=True)
    return torch.autograd.grad(
        sum((g * t).square().sum() for g, t in zip(first, leaves, strict=True)), leaves, **_ZEROS
    )


def _vmap_over_autograd(f: Function, tensors: tuple[Tensor, ...]) -> Any:
    found = []
    # Gradients of all operands, and of the input with constants, which keeps fewer tensors.
    for leaves in (_leaves(tensors), _leaves(tensors[:1])):
        outputs = f(*leaves, *tensors[len(leaves) :])
        pull = functools.partial(torch.autograd.grad, outputs, leaves, retain_graph=True)
        found.append(vmap(lambda *g, pull=pull: pull(g))(*_like(outputs, 1, 2)))
    return found


def _vectorized_jacobian(f: Function, tensors: tuple[Tensor, ...]) -> Any:
    jacobian = torch.autograd.functional.jacobian
    return [jacobian(f, tensors, vectorize=True, strategy=strategy) for strategy in ("reverse-mode", "forward-mode")]


def _vectorized_hessian(f: Function, tensors: tuple[Tensor, ...]) -> Any:
    def of_last(last: Tensor) -> Tensor:
        return _loss(f)(*tensors[:-1], last)

    outer = ("reverse-mode", "forward-mode")
    hessian = torch.autograd.functional.hessian
    return [hessian(of_last, tensors[-1], vectorize=True, outer_jacobian_strategy=strategy) for strategy in outer]


def _forward_mode(f: Function, tensors: tuple[Tensor, ...]) -> Any:
    found = []
    for is_grad_enabled in (True, False):
        with torch.set_grad_enabled(is_grad_enabled), fwAD.dual_level():
            dual = tuple(map(fwAD.make_dual, tensors, _like(tensors, 1)))
            # Tangents of all operands, and of one.
            found += [tuple(fwAD.unpack_dual(y)) for y in (*f(*dual), f(*tensors[:-1], dual[-1])[0])]
    return found


def _forward_over_reverse(f: Function, tensors: tuple[Tensor, ...]) -> Any:
    leaves = _leaves(tensors)
    with fwAD.dual_level():
        outputs = f(*map(fwAD.make_dual, leaves, _like(tensors, 1)))
        found = torch.autograd.grad(outputs, leaves, _like(outputs, 2))
        return [tuple(fwAD.unpack_dual(g)) for g in found]


def _forward_over_recorded(f: Function, tensors: tuple[Tensor, ...]) -> Any:
    """The backward pass of an ordinary graph with incoming gradients that carry tangents."""
    leaves = _leaves(tensors)
    outputs = f(*leaves)
    with fwAD.dual_level():
        incoming = list(map(fwAD.make_dual, _like(outputs, 1), _like(outputs, 2)))
        return [tuple(fwAD.unpack_dual(g)) for g in torch.autograd.grad(outputs, leaves, incoming)]


TRANSFORMS = {
    "vmap of the input": _batched_input,
    "vmap of vmap": _nested_vmap,
    "per-sample gradients": _per_sample_gradients,
    "jvp": _jvp,
    "jacfwd and jacrev": _jacobians,
    "hessian": _hessian,
    "vjp of vjp": _vjp_of_vjp,
    "is_grads_batched": _grads_batched,
    "is_grads_batched twice": _grads_batched_twice,
    "vmap of autograd.grad": _vmap_over_autograd,
    "jacobian vectorize": _vectorized_jacobian,
    "hessian vectorize": _vectorized_hessian,
    "forward mode": _forward_mode,
    "forward over reverse": _forward_over_reverse,
    "forward over a recorded graph": _forward_over_recorded,
}


THROUGH_A_RECORDED_GRAPH = (
    "is_grads_batched",
    "is_grads_batched twice",
    "vmap of autograd.grad",
    "forward over a recorded graph",
)
# Transforms that torch lacks for these functions, so that there is no reference.
TORCH_LACKS = {
    "is_grads_batched twice": ("group_norm",),
    "hessian vectorize": ("group_norm",),
    "forward over reverse": ("group_norm", "silu", "packed, "),
    "forward over a recorded graph": ("group_norm", "silu", "packed, "),
}


@pytest.mark.parametrize(
    "case,transform",
    [
        pytest.param(case, transform, id=f"{case.name} {transform}")
        for transform in TRANSFORMS
        for case in CASES + (LEVELS if transform in THROUGH_A_RECORDED_GRAPH else [])
        if not any(name in case.name for name in TORCH_LACKS.get(transform, ()))
    ],
)
def test_transforms_equal_those_of_eager_torch(case: Case, transform: str) -> None:
    apply = TRANSFORMS[transform]
    try:
        expected = apply(case.eager, case.tensors)
    except NotImplementedError as error:
        if DEVICE == "cpu":
            raise
        # For example, rms_norm is one op on GPUs, whose backward has no forward-mode derivative.
        pytest.skip(f"torch lacks: {error}")
    torch.testing.assert_close(apply(case.ours, case.tensors), expected)


@pytest.mark.parametrize("transform", ("is_grads_batched", "is_grads_batched twice"))
@pytest.mark.parametrize("case", [case for case in CASES if "+" in case.name or "(" in case.name], ids=lambda c: c.name)
def test_batches_of_gradients_in_the_reference(case: Case, transform: str) -> None:
    """The reference serves float64 on GPUs, and all calls if there is no other backend. The dispatcher passes it single
    gradients, below autograd."""
    if any(name in case.name for name in TORCH_LACKS.get(transform, ())):
        pytest.skip("torch lacks the transform of the eager composition")
    with use_backend("reference"):
        found = TRANSFORMS[transform](case.ours, case.tensors)
    torch.testing.assert_close(found, TRANSFORMS[transform](case.eager, case.tensors))


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w: F.batch_norm(x, None, None, w, w, True),
        lambda x, w: F.group_norm(x, 2, w, w),
        lambda x, w: F.instance_norm(x, None, None, w, w),
        lambda x, w: F.layer_norm(x, x.shape[-1]),
        lambda x, w: F.rms_norm(x, x.shape[1:]),
    ],
)
def test_symbolic_sizes_are_traced(call: Callable[..., Tensor]) -> None:
    x, w = torch.randn(3, 4, 5), torch.randn(4)
    traced = make_fx(call, tracing_mode="symbolic")(x, w)
    torch.testing.assert_close(traced(x, w), call(x, w))


class EnergyLayer(torch.nn.Module):
    """A layer whose forward pass takes a gradient by torch.func."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = torch.nn.LayerNorm(8), torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(self.norm(x)).sin()
        return x + torch.func.grad(lambda z: self.linear(self.norm(z)).sin().square().sum())(x)


@pytest.mark.parametrize("level", ["checkpoint", "output, offload"])
@pytest.mark.filterwarnings("ignore:the model is on the CPU")
def test_gradients_within_checkpointed_and_offloaded_layers(level: str) -> None:
    model, x = torch.nn.Sequential(EnergyLayer(), EnergyLayer()).double(), torch.randn(4, 8).double()
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    ckpt_kernels.convert(model, recompute={"*": level})
    found = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)

"""Transforms of torch's: whatever sees through torch's own layers sees through every block, with the same derivatives.

In float64, against the eager composition under the same transform.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from .blocks import BLOCKS, Block
from .conftest import DEVICE
from .pairs import PAIRS, Pair

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


CASES = [_case(block) for block in BLOCKS]
CASES += [_case(pair, level) for pair in PAIRS for level in ("block", "output", "all")]
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def _loss(function: Function) -> Callable[..., Tensor]:
    """A number whose derivatives of any order are not zero."""

    def loss(*tensors: Tensor) -> Tensor:
        return sum((y.square() * torch.arange(1, y.numel() + 1).view(y.shape)).sum() for y in function(*tensors))

    return loss


def _like(tensors: Sequence[Tensor], seed: int, *lead: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn((*lead, *t.shape), generator=generator, dtype=t.dtype).to(t.device) for t in tensors)


def _leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.clone().requires_grad_() for t in tensors]


def _batched_input(f: Function, tensors: tuple[Tensor, ...]) -> Any:
    return vmap(f, (1, *[None] * (len(tensors) - 1)))(torch.stack([tensors[0], tensors[0] + 1], 1), *tensors[1:])


def _batched_all(f: Function, tensors: tuple[Tensor, ...]) -> Any:
    return vmap(f)(*_like(tensors, 1, 2))


def _nested_vmap(f: Function, tensors: tuple[Tensor, ...]) -> Any:
    inner = vmap(f, (0, *[None] * (len(tensors) - 1)))
    return vmap(inner, (None, *[0] * (len(tensors) - 1)))(*_like(tensors[:1], 1, 2), *_like(tensors[1:], 2, 2))


def _per_sample_gradients(f: Function, tensors: tuple[Tensor, ...]) -> Any:
    every = tuple(range(len(tensors)))
    in_dims = (0, *[None] * (len(tensors) - 1))
    return vmap(grad(_loss(f), every), in_dims)(*_like(tensors[:1], 1, 3), *tensors[1:])


def _jvp(f: Function, tensors: tuple[Tensor, ...]) -> Any:
    return jvp(f, tensors, _like(tensors, 1))


def _jacfwd(f: Function, tensors: tuple[Tensor, ...]) -> Any:
    return jacfwd(f, tuple(range(len(tensors))))(*tensors)


def _jacrev(f: Function, tensors: tuple[Tensor, ...]) -> Any:
    return jacrev(f, tuple(range(len(tensors))))(*tensors)


def _hessian(f: Function, tensors: tuple[Tensor, ...]) -> Any:
    return hessian(_loss(f), len(tensors) - 1)(*tensors), jacrev(jacrev(_loss(f)), len(tensors) - 1)(*tensors)


def _vjp_of_vjp(f: Function, tensors: tuple[Tensor, ...]) -> Any:
    outputs, pull = vjp(f, *tensors)

    def first(cotangents: tuple[Tensor, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        return vjp(f, *tensors)[1](cotangents)

    found, again = vjp(first, _like(outputs, 1), *tensors)
    return outputs, pull(_like(outputs, 1)), again(_like(found, 2))


def _grads_batched(f: Function, tensors: tuple[Tensor, ...]) -> Any:
    leaves = _leaves(tensors)
    outputs = f(*leaves)
    first = torch.autograd.grad(outputs, leaves, _like(outputs, 1, 2), is_grads_batched=True, retain_graph=True)
    # Gradients of some operands alone.
    some = torch.autograd.grad(outputs[0], leaves[-1], _like(outputs, 2, 2)[0], is_grads_batched=True)
    assert not any(g.requires_grad for g in (*first, *some))
    return first, some


def _grads_batched_twice(f: Function, tensors: tuple[Tensor, ...]) -> Any:
    leaves = _leaves(tensors)
    outputs = f(*leaves)
    first = torch.autograd.grad(outputs, leaves, _like(outputs, 1, 2), is_grads_batched=True, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), leaves, allow_unused=True)


def _vmap_over_autograd(f: Function, tensors: tuple[Tensor, ...]) -> Any:
    leaves = _leaves(tensors)
    outputs = f(*leaves)
    return vmap(lambda *g: torch.autograd.grad(outputs, leaves, g, retain_graph=True))(*_like(outputs, 1, 2))


def _vectorized_jacobian(f: Function, tensors: tuple[Tensor, ...]) -> Any:
    jacobian = torch.autograd.functional.jacobian
    return [jacobian(f, tensors, vectorize=True, strategy=strategy) for strategy in ("reverse-mode", "forward-mode")]


def _vectorized_hessian(f: Function, tensors: tuple[Tensor, ...]) -> Any:
    def of_last(last: Tensor) -> Tensor:
        return _loss(f)(*tensors[:-1], last)

    outer = ("reverse-mode", "forward-mode")
    hessian = torch.autograd.functional.hessian
    return [hessian(of_last, tensors[-1], vectorize=True, outer_jacobian_strategy=strategy) for strategy in outer]


def _forward_mode(f: Function, tensors: tuple[Tensor, ...], grads: bool) -> Any:
    with torch.set_grad_enabled(grads), fwAD.dual_level():
        outputs = f(*map(fwAD.make_dual, tensors, _like(tensors, 1)))
        return [tuple(fwAD.unpack_dual(y)) for y in outputs]


def _tangent_of_one(f: Function, tensors: tuple[Tensor, ...]) -> Any:
    with torch.no_grad(), fwAD.dual_level():
        outputs = f(*tensors[:-1], fwAD.make_dual(tensors[-1], _like(tensors, 1)[-1]))
        return [fwAD.unpack_dual(y).tangent for y in outputs[:1]]


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
    "vmap": _batched_all,
    "vmap of vmap": _nested_vmap,
    "per-sample gradients": _per_sample_gradients,
    "jvp": _jvp,
    "jacfwd": _jacfwd,
    "jacrev": _jacrev,
    "hessian": _hessian,
    "vjp of vjp": _vjp_of_vjp,
    "is_grads_batched": _grads_batched,
    "is_grads_batched twice": _grads_batched_twice,
    "vmap of autograd.grad": _vmap_over_autograd,
    "jacobian vectorize": _vectorized_jacobian,
    "hessian vectorize": _vectorized_hessian,
    "forward mode": lambda f, tensors: _forward_mode(f, tensors, grads=True),
    "forward mode without gradients": lambda f, tensors: _forward_mode(f, tensors, grads=False),
    "forward mode of one operand": _tangent_of_one,
    "forward over reverse": _forward_over_reverse,
    "forward over a recorded graph": _forward_over_recorded,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@by_case
def test_transforms_give_what_they_give_of_eager_torch(case: Case, transform: str) -> None:
    apply = TRANSFORMS[transform]
    torch.testing.assert_close(apply(case.ours, case.tensors), apply(case.eager, case.tensors))

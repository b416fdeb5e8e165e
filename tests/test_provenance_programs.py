"""Discarding the outputs of torch's own ops, in random programs."""

import random

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor

from ckpt_kernels import functional as F

from .discarded_outputs import Parameters, assert_same_outcome, random_tensor, shows_saved

pytestmark = pytest.mark.skipif(not shows_saved, reason="this torch does not show what nodes hold")

ONES = [TF.silu, TF.gelu, TF.relu, torch.sigmoid, torch.tanh, torch.sin, torch.square, torch.neg, TF.softplus, TF.mish]
VIEWS = [
    lambda t: t.t(),
    lambda t: t.view(4, -1).t().reshape(16, 16),
    lambda t: t.transpose(0, 1).contiguous(),
    lambda t: t.unsqueeze(0).expand(2, 16, 16)[1],
    lambda t: torch.cat(t.chunk(2, 1)[::-1], 1),
    lambda t: t.clone(),
    lambda t: t.flip(0),
]
TYPES = [torch.bfloat16, torch.float64, torch.float32]


def random_program(seed: int, x: Tensor, p: Parameters, length: int) -> Tensor:
    """A sum of losses after random ops, some of which write to values, with or without autograd."""
    choose = random.Random(seed)
    values, losses = [x * 1.5], []
    for _ in range(length):
        kind = choose.choice(
            "one one one two two number view cast block sum in_place in_place unseen read read".split()
        )
        a, b = choose.choice(values), choose.choice(values)
        if kind == "one":
            values.append(choose.choice(ONES)(a))
        elif kind == "two":
            values.append(choose.choice([torch.mul, torch.add, torch.sub, torch.minimum])(a, b))
        elif kind == "number":
            values.append(choose.choice([lambda t: t * 0.7, lambda t: t + 1, lambda t: t / 3, lambda t: 1 - t])(a))
        elif kind == "view":
            values.append(choose.choice(VIEWS)(a))
        elif kind == "cast":
            values.append(a.to(choose.choice(TYPES)))
        elif kind == "block":
            a, b = a.float(), b.float()
            blocks = [
                lambda a=a: F.layer_norm(a, 16, activation="silu"),
                lambda a=a, b=b: F.glu(a, b),
                lambda a=a: F.bias_act(a, activation="gelu"),
            ]
            values.append(choose.choice(blocks)())
        elif kind == "sum":
            values.append(TF.relu(F.layer_norm(a.float(), 16) + b))
        elif kind == "write":
            writes = [
                lambda a, b: a.add_(b),
                lambda a, b: a.mul_(0.9),
                lambda a, b: a.relu_(),
                lambda a, b: a.sigmoid_(),
            ]
            choose.choice(writes)(a, b)
        elif kind == "unseen":
            with torch.no_grad():
                a.mul_(1.25)
        else:
            losses.append(TF.linear(a.float(), p[choose.choice("ab")]).sin().sum())
    losses += [TF.linear(value.float(), p["a"]).sin().sum() for value in choose.sample(values, min(3, len(values)))]
    return sum(losses)


class Square(Parameters):
    def __missing__(self, name: str) -> torch.nn.Parameter:
        self[name] = torch.nn.Parameter(random_tensor(16, 16, seed=ord(name)) / 4)
        return self[name]


@pytest.mark.parametrize("part", range(8))
def test_random_programs_have_the_same_outcome(part: int) -> None:
    p = Square()
    sources = [random_tensor(16, 16).requires_grad_(), p["a"], p["b"]]
    for seed in range(part * 75, part * 75 + 75):
        call = lambda seed=seed: random_program(seed, sources[0], p, 3 + seed % 20)  # noqa: E731
        assert_same_outcome(call, sources, products=seed % 2 == 1)

"""Helpers for the tests of plans: a small language model, the peak of a step, and a plan from parts."""

from typing import Any

import torch
from torch import Tensor, nn

from ckpt_kernels import Plan, memory
from ckpt_kernels.plan.bench import default_loss

WIDTH, TOKENS = 32, 64


class Layer(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention_norm, self.norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(self.attention_norm(x)).chunk(3, -1)
        )
        a = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.drop(self.out(a.transpose(1, 2).flatten(-2)))
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    """A small language model."""

    def __init__(self, layers: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, WIDTH)
        self.layers = nn.ModuleList(Layer(dropout) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 50, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def loss_of(logits: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), torch.zeros(2 * (TOKENS - 1), dtype=torch.long))


def made(**options: Any) -> tuple[Model, Tensor]:
    torch.manual_seed(0)
    return Model(**options).train(), torch.randint(0, 50, (2, TOKENS))


def peak(model: nn.Module, *inputs: Any, loss: Any = default_loss) -> int:
    """The peak in bytes of a step that accumulates into existing gradients."""

    def step() -> None:
        output = model(*inputs)
        loss(output).backward()

    step()
    return memory.peak_bytes(step)


def plan_of(model: nn.Module, found: Any, parts: tuple) -> Plan:
    from ckpt_kernels.plan.bench import StepCost
    from ckpt_kernels.plan.plan import structure_of

    nothing = StepCost(0, 0.0)
    return Plan(
        None, parts, nothing, nothing, {}, 0.0, [], found.stages, found.layers, structure_of(model), found.shapes
    )

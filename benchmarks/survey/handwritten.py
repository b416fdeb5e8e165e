"""Modules with side effects, which conversion must preserve."""

import dataclasses
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import handwritten_blocks as blocks
from .entry import Entry, Shape


def _mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class Teacher(nn.Module):
    """A frozen copy without gradients, which follows the model slowly."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.student = _mlp(width)
        self.teacher = _mlp(width).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                slow.lerp_(fast, 0.01)
            aim = self.teacher(x)
        return F.mse_loss(self.student(x), aim)


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


class Reversal(nn.Module):
    """Gradient reversal: the body unlearns the task of the second head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = _mlp(width)
        self.heads = nn.ModuleList([_mlp(width), _mlp(width)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        inner = self.body(x)
        return self.heads[0](inner), self.heads[1](_Reverse.apply(inner))


class Checkpointed(nn.Module):
    """Checkpoints every other layer."""

    def __init__(self, width: int, reentrant: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([blocks.Block(width) for _ in range(2)])
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.layers[0], x, use_reentrant=self.reentrant)
        return self.layers[1](x)


class Losses(nn.Module):
    """Appends each expert's balance loss to a list that the caller reads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([blocks.Experts(width) for _ in range(2)])
        self.losses: list[Tensor] = []

    def forward(self, x: Tensor) -> dict[str, Any]:
        self.losses.clear()
        for layer in self.layers:
            out, scores = layer(x)
            self.losses.append(scores.mean(0).square().sum())
            x = x + out
        return {"out": x, "losses": list(self.losses)}


class Counting(nn.Module):
    """Counts its calls in an attribute, its tokens in a buffer, and remembers the last mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = _mlp(width)
        self.calls = 0
        self.seen: dict[str, int] = {}
        self.register_buffer("tokens", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen[str(tuple(x.shape))] = self.seen.get(str(tuple(x.shape)), 0) + 1
        self.tokens += x.shape[0] * x.shape[1]
        inner = self.mlp(x)
        self.mean = inner.detach().mean((0, 1))
        return inner * (1.0 + 0.1 * self.calls)


class Pair(NamedTuple):
    out: Tensor
    norm: Tensor


@dataclasses.dataclass
class Result:
    out: Tensor
    states: tuple[Tensor, ...]
    note: str = "as written"


class Returning(nn.Module):
    """Returns outputs in a given structure."""

    def __init__(self, width: int, kind: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second = _mlp(width), blocks.Block(width, before=False)
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        state = self.first(x)
        return self.kind(self.second(state), state)


def _model_output(out: Tensor, state: Tensor) -> Any:
    from transformers.modeling_outputs import BaseModelOutput

    return BaseModelOutput(last_hidden_state=out, hidden_states=(state, out))


class Dropping(nn.Module):
    """Dropout by torch's generator, a dropped path by Python's, and noise by numpy's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_mlp(width) for _ in range(3)])
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if random.random() < 0.9:
                x = x + self.dropout(layer(x))
        return x * float(1 + 0.01 * numpy.random.rand())


class InPlace(nn.Module):
    """Writes to tensors that were just computed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.product = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.product(self.norm(x))
        F.silu(inner, inplace=True)
        inner = inner.clone().mul_(2).add_(x)
        inner[:, 0] = 0
        return inner


class Shared(nn.Module):
    """Calls one layer three times, has one weight in two places, and branches on data."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = blocks.Block(width)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.layer(x)
        x = self.second(F.relu(self.first(x)))
        return x if float(x.detach().mean()) > 1e6 else x * 0.5


class Hooked(nn.Module):
    """Has hooks that keep activations and change them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = _mlp(width)
        self.kept: list[tuple[int, ...]] = []
        self.mlp[2].register_forward_hook(lambda module, args, out: self.kept.append(tuple(out.shape)))
        self.mlp[0].register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
        self.mlp[1].register_full_backward_hook(lambda module, grads, outs: (grads[0] * 0.5,))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x) + self.mlp(x * 2)


def entries() -> list[Entry]:
    passages: dict[str, Callable[[int], nn.Module]] = {
        "swiglu_chunked": blocks.ChunkedSwiGLU,
        "swiglu": blocks.SwiGLU,
        "glu": blocks.GatedByGLU,
        "norms": blocks.Norms,
        "block_pre": blocks.Block,
        "block_post": lambda width: blocks.Block(width, before=False),
        "mixer": blocks.Mixer,
        "gmlp": blocks.GMLP,
        "experts": blocks.Experts,
        "teacher": Teacher,
        "reversal": Reversal,
        "checkpointed": lambda width: Checkpointed(width, reentrant=False),
        "checkpointed_reentrant": lambda width: Checkpointed(width, reentrant=True),
        "losses": Losses,
        "counting": Counting,
        "named_tuple": lambda width: Returning(width, Pair),
        "dataclass": lambda width: Returning(width, lambda out, state: Result(out, (state, state * 2))),
        "model_output": lambda width: Returning(width, _model_output),
        "dropping": Dropping,
        "drawing": Dropping,
        "in_place": InPlace,
        "shared": Shared,
        "hooked": Hooked,
    }
    images = {
        "convnext_block": blocks.ConvNeXtBlock,
        "resnet_basic": blocks.Basic,
        "resnet_bottleneck": blocks.Bottleneck,
        "squeeze_excite": blocks.SqueezeExcite,
    }
    wide = ("swiglu", "block_pre", "block_post", "norms", "glu")

    def row(name: str, model: Callable[[int], nn.Module], image: bool) -> Entry:
        # Inputs are as wide as the model, which is made in two widths.
        def inputs(made: nn.Module, shape: Shape) -> dict[str, Any]:
            sizes = (made.survey_width, 12, 12) if image else (shape.length, made.survey_width)
            return {"x": torch.randn(shape.batch, *sizes)}

        def build(width: int) -> nn.Module:
            made = model(width)
            made.survey_width = width
            return made

        return Entry(f"handwritten/{name}", build, inputs, name in wide, random=name == "dropping", differentiable=True)

    return [row(name, model, False) for name, model in passages.items()] + [
        row(name, model, True) for name, model in images.items()
    ]

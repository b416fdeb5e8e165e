"""Trains a small pre-norm transformer language model on the sources of Python's standard library, as bytes."""

import functools
import pathlib
import sys
import sysconfig

import torch
import torch.nn.functional as F
from side_by_side import main
from torch import Tensor, nn

import ckpt_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTH, LAYERS, HEADS, CONTEXT, BATCH = (768, 8, 12, 512, 16) if DEVICE == "cuda" else (256, 3, 4, 128, 8)


class EagerAddNorm(nn.LayerNorm):
    """The sum of residual and input, and the norm of the sum, as two steps of eager torch."""

    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + input
        return super().forward(total), total


class EagerMLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, level: str) -> None:
        super().__init__()
        add_norm = EagerAddNorm if level == "eager" else ckpt_kernels.nn.AddLayerNorm
        self.norm1, self.norm2 = add_norm(WIDTH), add_norm(WIDTH)
        self.attention = Attention()
        if level == "eager":
            self.mlp = EagerMLP(WIDTH, 4 * WIDTH)
        else:
            self.mlp = ckpt_kernels.nn.MLP(WIDTH, 4 * WIDTH, activation="gelu_tanh", recompute=level)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        y, residual = self.norm1(x, residual)
        y, residual = self.norm2(self.attention(y), residual)
        return self.mlp(y), residual


class LanguageModel(nn.Module):
    """Takes bytes and returns the loss of predicting the next byte."""

    def __init__(self, level: str) -> None:
        super().__init__()
        self.token = nn.Embedding(256, WIDTH)
        self.position = nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.ModuleList(Layer(level) for _ in range(LAYERS))
        self.norm = (EagerAddNorm if level == "eager" else ckpt_kernels.nn.AddLayerNorm)(WIDTH)
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        x = self.token(inputs)
        residual = self.position.weight.expand_as(x)
        for layer in self.layers:
            x, residual = layer(x, residual)
        logits = self.head(self.norm(x, residual)[0])
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@functools.cache
def corpus() -> Tensor:
    """The sources of the standard library, concatenated."""
    files = sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"\n".join(path.read_bytes() for path in files)), dtype=torch.uint8)


def draw_batch(generator: torch.Generator) -> tuple[Tensor]:
    text = corpus()
    starts = torch.randint(len(text) - CONTEXT - 1, (BATCH, 1), generator=generator)
    return (text[starts + torch.arange(CONTEXT + 1)].long(),)


if __name__ == "__main__":
    sys.exit(main(__doc__, LanguageModel, draw_batch, DEVICE, steps=120))

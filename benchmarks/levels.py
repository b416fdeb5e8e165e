"""`python -m benchmarks.levels`: kept tensors, peak and step of transformers' Llama, by level and checkpointed.

The kept tensors of a layer and the peak are in units of (tokens, width); the time of a step is a multiple of eager's.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import ckpt_kernels
from ckpt_kernels import memory
from ckpt_kernels.cli_arguments import positive

WIDTH, HIDDEN, HEADS, BATCH = 512, 1376, 8, 2


class Llama(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaModel

        sizes = {"hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_hidden_layers": layers, "vocab_size": 32}
        heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "_attn_implementation": "sdpa"}
        self.model = LlamaModel(LlamaConfig(**sizes, **heads))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(inputs_embeds=x, use_cache=False).last_hidden_state


def checkpointed(model: Llama) -> None:
    model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def providers() -> dict[str, Callable[[Llama], object]]:
    """The changes to the model, by name."""
    found: dict[str, Callable[[Llama], object]] = {"eager": lambda model: None}
    for level in ("output", "all", "layer"):
        found[level] = lambda model, level=level: ckpt_kernels.convert(model, recompute=level)
    return found | {"checkpoint": checkpointed}


def step(model: nn.Module, x: Tensor) -> None:
    model.zero_grad()
    model(x).square().mean().backward()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.levels", description=__doc__)
    parser.add_argument("--layers", type=positive, default=2)
    parser.add_argument("--tokens", type=positive, default=512)
    parser.add_argument("--rounds", type=positive, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    base = Llama(options.layers).train()
    x = torch.randn(BATCH, options.tokens, WIDTH, requires_grad=True)
    models = {name: copy.deepcopy(base) for name in providers()}
    for name, change in providers().items():
        change(models[name])
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for name, model in models.items():
        step(model, x)
        kept = memory.saved_bytes(model, x) / x.nbytes / options.layers
        peak = memory.peak_bytes(lambda model=model: step(model, x)) / x.nbytes
        print(f"{name:12} kept a layer {kept:6.2f}   peak {peak:6.1f}", flush=True)
    for _ in range(options.rounds):
        for name, model in models.items():
            start = time.perf_counter()
            step(model, x)
            seconds[name].append(time.perf_counter() - start)
    eager = statistics.median(seconds["eager"])
    for name, times in seconds.items():
        print(f"{name:12} step, x eager {statistics.median(times) / eager:.2f}")


if __name__ == "__main__":
    main()

"""Finds the longest sequence and the largest batch of a Llama that fit a given memory: unconverted, at each level,
checkpointed, and planned.

    python examples/fit_a_budget.py --budget 48MiB

Needs transformers. Runs on the CPU, in a few minutes, with a small model of random weights; only the ratios matter.
"""

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import ckpt_kernels
from ckpt_kernels import memory
from ckpt_kernels.levels import OF_MODELS
from ckpt_kernels.plan.budget import bytes_of

WIDTH, LAYERS, VOCABULARY = 128, 6, 256


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=344,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        use_cache=False,
    )
    return LlamaForCausalLM(config).train()


def inputs(batch: int, tokens: int) -> dict[str, Any]:
    ids = torch.randint(0, VOCABULARY, (batch, tokens))
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def peak(model: nn.Module, batch: int, tokens: int) -> int:
    given = inputs(batch, tokens)

    def step() -> None:
        output = model(**given)
        output.loss.backward()

    step()
    return memory.peak_bytes(step)


def plans(model: nn.Module, budget: int) -> Callable[[int, int], bool]:
    def fits(batch: int, tokens: int) -> bool:
        try:
            ckpt_kernels.plan(model, budget=budget, **inputs(batch, tokens))
        except ckpt_kernels.DoesNotFit:
            return False
        return True

    return fits


def largest(fits: Callable[[int], bool], step: int) -> int:
    """The largest multiple of `step` that fits, to within an eighth of the result."""
    low, high = 0, step
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(step, low // 8):
        middle = (low + high) // (2 * step) * step
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="48MiB")
    options = parser.parse_args()
    budget = bytes_of(options.budget, 1, torch.device("cpu"))
    assert budget is not None
    base = llama()
    ways: dict[str, Callable[[int, int], bool]] = {}
    models = {"as it is": copy.deepcopy(base)}
    for level in OF_MODELS:
        models[f"convert, {level!r}"] = copy.deepcopy(base)
        ckpt_kernels.convert(models[f"convert, {level!r}"], recompute=level)
    models["layers checkpointed"] = copy.deepcopy(base)
    models["layers checkpointed"].gradient_checkpointing_enable({"use_reentrant": False})
    for name, model in models.items():
        ways[name] = lambda batch, tokens, model=model: peak(model, batch, tokens) <= budget
    ways["planned"] = plans(base, budget)
    print(f"a Llama of {LAYERS} layers and width {WIDTH} in {options.budget} beside its gradients, float32")
    print(f"{'':24} {'longest sequence, batch 1':>26} {'largest batch, 128 tokens':>26}", flush=True)
    for name, fits in ways.items():
        tokens = largest(lambda tokens, fits=fits: fits(1, tokens), 32)
        batch = largest(lambda batch, fits=fits: fits(batch, 128), 1)
        print(f"{name:24} {tokens:>26} {batch:>26}", flush=True)


if __name__ == "__main__":
    main()

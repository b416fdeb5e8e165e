"""`python -m benchmarks.logits`: a step of a causal language model, with whole logits and with logits in chunks.

Measures the peak and the time of a step (forward and backward) of a Llama of transformers: eager, converted, and
converted with `logits="lm_head"`. Steps are timed in turn.
"""

import argparse
import copy
import statistics
import time

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import ckpt_kernels
from ckpt_kernels.cli_arguments import device, positive
from ckpt_kernels.memory import peak_bytes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.logits", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocabulary", type=positive, default=32000)
    parser.add_argument("--width", type=positive, default=256)
    parser.add_argument("--layers", type=positive, default=2)
    parser.add_argument("--tokens", type=positive, default=2048)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--turns", type=positive, default=5)
    given = parser.parse_args()
    config = LlamaConfig(
        vocab_size=given.vocabulary,
        hidden_size=given.width,
        intermediate_size=8 * given.width // 3,
        num_hidden_layers=given.layers,
        num_attention_heads=max(1, given.width // 64),
        num_key_value_heads=max(1, given.width // 64),
        use_cache=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(given.device, DTYPES[given.dtype])
    ids = torch.randint(given.vocabulary, (1, given.tokens), device=given.device)
    models = {"eager": model, "output": copy.deepcopy(model), 'output, logits="lm_head"': copy.deepcopy(model)}
    ckpt_kernels.convert(models["output"])
    ckpt_kernels.convert(models['output, logits="lm_head"'], logits="lm_head")

    def step(model: nn.Module) -> float:
        model.zero_grad()
        begin = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        loss.item()
        return time.perf_counter() - begin

    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(given.turns + 1):
        for name, each in models.items():
            seconds = step(each)
            if turn:
                times[name].append(seconds)
    print(f"{'model':28} {'peak, MiB':>10} {'step, ms':>10}")
    for name, each in models.items():
        peak = peak_bytes(lambda each=each: step(each), given.device)
        print(f"{name:28} {peak / 2**20:10.1f} {1e3 * statistics.median(times[name]):10.1f}")


if __name__ == "__main__":
    main()

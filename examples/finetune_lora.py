"""Fine-tunes a Llama with LoRA: unconverted, checkpointed, converted, and planned for a memory budget.

    python examples/finetune_lora.py --recompute checkpoint output 16MiB

Needs transformers and PEFT. The base has random weights, so nothing is downloaded. The text is the sources of Python's
standard library, as bytes.
"""

import sys

import torch
from peft import LoraConfig, get_peft_model
from side_by_side import arrange, main
from torch import Tensor, nn
from train_lm import draw_batch
from transformers import LlamaConfig, LlamaForCausalLM

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTH, LAYERS, HEADS = (1024, 16, 16) if DEVICE == "cuda" else (192, 4, 4)
WAYS = ("checkpoint", "output", "0.4")


class Tuned(nn.Module):
    """Takes bytes and returns the loss."""

    def __init__(self, way: str) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=256, hidden_size=WIDTH, intermediate_size=8 * WIDTH // 3, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, use_cache=False,
        )  # fmt: skip
        adapters = LoraConfig(r=8, target_modules="all-linear", lora_dropout=0.0)
        self.model = get_peft_model(LlamaForCausalLM(config), adapters).to(DEVICE)
        (tokens,) = draw_batch(torch.Generator().manual_seed(0))
        arrange(self.model, way, self.inputs(tokens.to(DEVICE)))

    def inputs(self, tokens: Tensor) -> dict[str, Tensor | bool]:
        return {"input_ids": tokens, "labels": tokens, "use_cache": False}

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(**self.inputs(tokens)).loss


if __name__ == "__main__":
    sys.exit(main(__doc__, Tuned, draw_batch, DEVICE, steps=60, learning_rate=1e-2, ways=WAYS))

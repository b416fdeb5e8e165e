"""Trains a Llama of transformers, as it is and converted by one line, on the sources of Python's standard library."""

import sys

import torch
from side_by_side import main
from torch import Tensor, nn
from train_lm import draw_batch
from transformers import LlamaConfig, LlamaForCausalLM

import ckpt_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTH, LAYERS, HEADS = (768, 8, 12) if DEVICE == "cuda" else (256, 3, 4)


class LanguageModel(nn.Module):
    """Takes bytes and returns the loss."""

    def __init__(self, level: str) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=WIDTH,
            intermediate_size=8 * WIDTH // 3,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            use_cache=False,
        )
        self.model = LlamaForCausalLM(config)
        if level != "eager":
            ckpt_kernels.convert(self.model, recompute=level)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, labels=tokens).loss


if __name__ == "__main__":
    sys.exit(main(__doc__, LanguageModel, draw_batch, DEVICE, steps=200, learning_rate=5e-4))

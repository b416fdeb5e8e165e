"""Models of a size at which a step is more than the overhead of calls, for `ckpt-kernels convert-check`:

    ckpt-kernels convert-check benchmarks.larger:llama_bfloat16

Each function returns (model, inputs by name), with random weights and without dropout.
"""

import functools
from collections.abc import Callable

import torch
import transformers

from .architectures import Built, tokens

_WIDTH, _LAYERS, _HEADS, _VOCABULARY, _LENGTH = 512, 4, 8, 1024, 256


def _text() -> torch.Tensor:
    return tokens(4, _LENGTH, _VOCABULARY)


def llama(dtype: torch.dtype = torch.float32) -> Built:
    config = transformers.LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=_WIDTH,
        intermediate_size=1376,
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config).to(dtype), {"input_ids": _text()}


def gpt2(dtype: torch.dtype = torch.float32) -> Built:
    config = transformers.GPT2Config(
        vocab_size=_VOCABULARY,
        n_embd=_WIDTH,
        n_layer=_LAYERS,
        n_head=_HEADS,
        n_positions=_LENGTH,
        use_cache=False,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.GPT2LMHeadModel(config).to(dtype), {"input_ids": _text()}


def bert(dtype: torch.dtype = torch.float32) -> Built:
    config = transformers.BertConfig(
        vocab_size=_VOCABULARY,
        hidden_size=_WIDTH,
        intermediate_size=4 * _WIDTH,
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForMaskedLM(config).to(dtype), {"input_ids": _text()}


def resnet(dtype: torch.dtype = torch.float32) -> Built:
    config = transformers.ResNetConfig(embedding_size=64, hidden_sizes=[256, 512], depths=[2, 2], num_labels=10)
    model = transformers.ResNetForImageClassification(config)
    return model.to(dtype), {"pixel_values": torch.randn(8, 3, 96, 96, dtype=dtype)}


def _in_bfloat16(build: Callable[[torch.dtype], Built]) -> Callable[[], Built]:
    return functools.partial(build, torch.bfloat16)


llama_bfloat16, gpt2_bfloat16 = _in_bfloat16(llama), _in_bfloat16(gpt2)
bert_bfloat16, resnet_bfloat16 = _in_bfloat16(bert), _in_bfloat16(resnet)

"""Models so large that a step takes longer than the overhead of calls, for `python -m benchmarks.models` and for
`ckpt-kernels convert-check`:

    ckpt-kernels convert-check benchmarks.larger:llama_bfloat16

Each function returns (model, inputs by name), with random weights and without dropout.
"""

import functools
from collections.abc import Callable

import torch
import transformers

from .architectures import Built, tokens

_WIDTH, _LAYERS, _HEADS, _VOCABULARY, _LENGTH = 512, 4, 8, 1024, 256


def _text(batch: int) -> torch.Tensor:
    return tokens(batch, _LENGTH, _VOCABULARY)


def llama(dtype: torch.dtype = torch.float32, batch: int = 4) -> Built:
    config = transformers.LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=_WIDTH,
        intermediate_size=1376,
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config).to(dtype), {"input_ids": _text(batch)}


def gpt2(dtype: torch.dtype = torch.float32, batch: int = 4) -> Built:
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
    return transformers.GPT2LMHeadModel(config).to(dtype), {"input_ids": _text(batch)}


def bert(dtype: torch.dtype = torch.float32, batch: int = 4) -> Built:
    config = transformers.BertConfig(
        vocab_size=_VOCABULARY,
        hidden_size=_WIDTH,
        intermediate_size=4 * _WIDTH,
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForMaskedLM(config).to(dtype), {"input_ids": _text(batch)}


def resnet(dtype: torch.dtype = torch.float32, batch: int = 8) -> Built:
    config = transformers.ResNetConfig(embedding_size=64, hidden_sizes=[256, 512], depths=[2, 2], num_labels=10)
    model = transformers.ResNetForImageClassification(config)
    return model.to(dtype), {"pixel_values": torch.randn(batch, 3, 96, 96, dtype=dtype)}


def vit(dtype: torch.dtype = torch.float32, batch: int = 4) -> Built:
    config = transformers.ViTConfig(
        hidden_size=384,
        intermediate_size=4 * 384,
        num_hidden_layers=6,
        num_attention_heads=6,
        image_size=96,
        patch_size=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=10,
    )
    model = transformers.ViTForImageClassification(config)
    return model.to(dtype), {"pixel_values": torch.randn(batch, 3, 96, 96, dtype=dtype)}


def unet(dtype: torch.dtype = torch.float32, batch: int = 4) -> Built:
    import diffusers

    model = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 128),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    inputs = {
        "sample": torch.randn(batch, 4, 16, 16, dtype=dtype),
        "timestep": torch.arange(batch),
        "encoder_hidden_states": torch.randn(batch, 16, 128, dtype=dtype),
    }
    # Cast only if the dtype differs: diffusers warns at each cast.
    return model if dtype == torch.float32 else model.to(dtype), inputs


def _in_bfloat16(build: Callable[..., Built]) -> Callable[[], Built]:
    return functools.partial(build, torch.bfloat16)


llama_bfloat16, gpt2_bfloat16 = _in_bfloat16(llama), _in_bfloat16(gpt2)
bert_bfloat16, resnet_bfloat16 = _in_bfloat16(bert), _in_bfloat16(resnet)

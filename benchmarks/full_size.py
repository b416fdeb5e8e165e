"""Models at the sizes that people train on a GPU, in bfloat16, for `python -m benchmarks.models`.

Each function returns (model, inputs by name), with random weights and without dropout. The Llama has half the layers of
Llama-3.2 with a billion parameters; the UNet is that of Stable Diffusion 1.5.
"""

import torch
import transformers

from .architectures import Built, tokens

_DTYPE = torch.bfloat16


def llama(batch: int) -> Built:
    config = transformers.LlamaConfig(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=8,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config).to(_DTYPE), {"input_ids": tokens(batch, 2048, 32_000)}


def vit(batch: int) -> Built:
    config = transformers.ViTConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    images = torch.randn(batch, 3, 224, 224, dtype=_DTYPE)
    return transformers.ViTForImageClassification(config).to(_DTYPE), {"pixel_values": images}


def resnet(batch: int) -> Built:
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig())
    images = torch.randn(batch, 3, 224, 224, dtype=_DTYPE).to(memory_format=torch.channels_last)
    return model.to(_DTYPE, memory_format=torch.channels_last), {"pixel_values": images}


def unet(batch: int) -> Built:
    import diffusers

    model = diffusers.UNet2DConditionModel(cross_attention_dim=768, sample_size=64).to(_DTYPE)
    inputs = {
        "sample": torch.randn(batch, 4, 64, 64, dtype=_DTYPE),
        "timestep": torch.arange(batch),
        "encoder_hidden_states": torch.randn(batch, 77, 768, dtype=_DTYPE),
    }
    return model, inputs

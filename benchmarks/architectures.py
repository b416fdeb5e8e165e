"""Common model architectures, at toy size and with random weights, on which `convert` is measured.

Each function returns (model, inputs by name); `why_not` tells which cannot be built because a package is missing.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ckpt_kernels.nested_values import tensors_in

Built = tuple[nn.Module, dict[str, Any]]

_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
}
_DECODER = _TEXT | {"num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


def tokens(batch: int = 2, length: int = 48, vocabulary: int = 128) -> torch.Tensor:
    return torch.randint(3, vocabulary, (batch, length))


def _decoder(name: str, **settings: Any) -> Built:
    import transformers

    config = getattr(transformers, f"{name}Config")(**_DECODER | settings)
    return getattr(transformers, f"{name}ForCausalLM")(config), {"input_ids": tokens(), "use_cache": False}


def llama() -> Built:
    return _decoder("Llama")


def mistral() -> Built:
    return _decoder("Mistral")


def qwen2() -> Built:
    return _decoder("Qwen2")


def qwen3() -> Built:
    return _decoder("Qwen3")


def gemma2() -> Built:
    return _decoder("Gemma2")


def gemma3() -> Built:
    import transformers

    config = transformers.Gemma3TextConfig(**_DECODER, layer_types=["sliding_attention", "full_attention"])
    return transformers.Gemma3ForCausalLM(config), {"input_ids": tokens(), "use_cache": False}


def phi3() -> Built:
    return _decoder("Phi3")


def olmo2() -> Built:
    return _decoder("Olmo2")


# At the width of the other models the router's tensors would be a tenth of all.
_EXPERTS = {"hidden_size": 256, "num_experts_per_tok": 2, "experts_implementation": "grouped_mm"}


def mixtral() -> Built:
    return _decoder("Mixtral", **_EXPERTS, num_local_experts=4, intermediate_size=896)


def qwen3_moe() -> Built:
    return _decoder("Qwen3Moe", **_EXPERTS, num_experts=8, moe_intermediate_size=96)


def gpt2() -> Built:
    import transformers

    config = transformers.GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    return transformers.GPT2LMHeadModel(config), {"input_ids": tokens(), "use_cache": False}


def gpt_neox() -> Built:
    import transformers

    config = transformers.GPTNeoXConfig(**_TEXT, max_position_embeddings=64)
    return transformers.GPTNeoXForCausalLM(config), {"input_ids": tokens(), "use_cache": False}


def bert() -> Built:
    import transformers

    config = transformers.BertConfig(**_TEXT, max_position_embeddings=64)
    return transformers.BertForMaskedLM(config), {"input_ids": tokens()}


def roberta() -> Built:
    import transformers

    config = transformers.RobertaConfig(**_TEXT, max_position_embeddings=64)
    return transformers.RobertaForMaskedLM(config), {"input_ids": tokens()}


def t5() -> Built:
    import transformers

    config = transformers.T5Config(
        vocab_size=128,
        d_model=64,
        d_kv=16,
        d_ff=172,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )
    inputs = {"input_ids": tokens(), "decoder_input_ids": tokens(length=24), "use_cache": False}
    return transformers.T5ForConditionalGeneration(config), inputs


def whisper() -> Built:
    import transformers

    config = transformers.WhisperConfig(
        vocab_size=128,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        num_mel_bins=16,
        max_source_positions=32,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    inputs = {"input_features": torch.randn(2, 16, 64), "decoder_input_ids": tokens(length=24), "use_cache": False}
    return transformers.WhisperForConditionalGeneration(config), inputs


def vit() -> Built:
    import transformers

    config = transformers.ViTConfig(**_VISION, num_labels=10)
    return transformers.ViTForImageClassification(config), {"pixel_values": torch.randn(2, 3, 32, 32)}


def clip() -> Built:
    import transformers

    text = _TEXT | {"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=32)
    inputs = {"input_ids": tokens(), "pixel_values": torch.randn(2, 3, 32, 32)}
    return transformers.CLIPModel(config), inputs


def convnext() -> Built:
    import transformers

    config = transformers.ConvNextConfig(hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 2, 1], num_labels=10)
    return transformers.ConvNextForImageClassification(config), {"pixel_values": torch.randn(2, 3, 64, 64)}


def resnet() -> Built:
    import transformers

    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[32, 64], depths=[2, 2], layer_type="bottleneck", num_labels=10
    )
    return transformers.ResNetForImageClassification(config), {"pixel_values": torch.randn(2, 3, 64, 64)}


def unet() -> Built:
    import diffusers

    model = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    inputs = {
        "sample": torch.randn(2, 4, 16, 16),
        "timestep": torch.tensor([3, 7]),
        "encoder_hidden_states": torch.randn(2, 8, 32),
    }
    return model, inputs


def dit() -> Built:
    import diffusers

    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=16,
        norm_num_groups=4,
        num_embeds_ada_norm=10,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 16, 16),
        "timestep": torch.tensor([3, 7]),
        "class_labels": torch.tensor([1, 2]),
    }
    return model, inputs


def flux() -> Built:
    import diffusers

    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )
    inputs = {
        "hidden_states": torch.randn(2, 16, 4),
        "encoder_hidden_states": torch.randn(2, 8, 32),
        "pooled_projections": torch.randn(2, 32),
        "timestep": torch.tensor([0.5, 0.7]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(8, 3),
    }
    return model, inputs


def transformer_encoder() -> Built:
    layer = nn.TransformerEncoderLayer(64, 4, 172, activation="gelu", batch_first=True, norm_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), {"src": torch.randn(2, 48, 64)}


def torchvision_resnet() -> Built:
    import torchvision

    return torchvision.models.resnet18(num_classes=10), {"x": torch.randn(2, 3, 64, 64)}


def timm_vit() -> Built:
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=10)
    return model, {"x": torch.randn(2, 3, 32, 32)}


_PACKAGES: dict[str, tuple[Callable[[], Built], ...]] = {
    "torch": (transformer_encoder,),
    "transformers": (
        llama,
        mistral,
        qwen2,
        qwen3,
        gemma2,
        gemma3,
        phi3,
        olmo2,
        mixtral,
        qwen3_moe,
        gpt2,
        gpt_neox,
        bert,
        roberta,
        t5,
        whisper,
        vit,
        clip,
        convnext,
        resnet,
    ),
    "diffusers": (unet, dit, flux),
    "torchvision": (torchvision_resnet,),
    "timm": (timm_vit,),
}
WITH_EXPERTS = ("mixtral", "qwen3_moe")
PACKAGE_OF = {build.__name__: package for package, builders in _PACKAGES.items() for build in builders}
ARCHITECTURES = {build.__name__: build for builders in _PACKAGES.values() for build in builders}


@functools.cache
def why_not(name: str) -> str | None:
    """The reason why the model of this name cannot be built here; None if it can."""
    package = PACKAGE_OF.get(name, "torch")
    try:
        importlib.import_module(package)
    except Exception as error:
        return f"{package} does not import: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return None


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Built:
    """The model of this name, with inputs, in `dtype`, without dropout, in training mode."""
    torch.manual_seed(seed)
    model, inputs = ARCHITECTURES[name]()
    if dtype == torch.float64 and name in WITH_EXPERTS:
        # Grouped products exist for narrower dtypes alone; the loop over experts computes the same.
        model.set_experts_implementation("eager")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for attribute in ("dropout", "attention_dropout", "activation_dropout", "dropout_prob", "drop_prob"):
            if isinstance(vars(module).get(attribute), float):
                setattr(module, attribute, 0.0)
    wide = {
        key: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in inputs.items()
    }
    return model.to(dtype).train(), wide


def outputs_of(model: nn.Module, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """All floating-point tensors that a call returns."""
    return [tensor for tensor in tensors_in(model(**inputs)) if tensor.is_floating_point()]

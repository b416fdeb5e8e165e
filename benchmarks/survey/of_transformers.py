"""Models of transformers: one of every type in `AutoModel`, with the head with which the type is trained."""

import functools
import re
from typing import Any

from torch import nn

from .entry import Entry, Shape
from .shrink import shrunk
from .transformers_inputs import Inputs, inputs
from .transformers_special import SPECIAL

# The class of a type is that of the first of these tasks with a model of the type; else the bare model.
_TASKS = (
    "SEQ_TO_SEQ_CAUSAL_LM",
    "MASKED_LM",
    "SPEECH_SEQ_2_SEQ",
    "CAUSAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "CTC",
    "IMAGE_CLASSIFICATION",
    "AUDIO_CLASSIFICATION",
    "VIDEO_CLASSIFICATION",
    "OBJECT_DETECTION",
    "SEMANTIC_SEGMENTATION",
    "DEPTH_ESTIMATION",
)

# A type whose name is another type's plus one of these suffixes is a part of that other type.
_PART = re.compile(r"(.+)_(vision|audio|encoder|decoder|vision_model|text_model)")

_RESNET = {"model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}
_DETR = {"use_timm_backbone": False, "backbone_config": _RESNET | {"out_features": ["stage2"]}}

# Settings for which the rules give wrong values.
_SETTINGS: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 16},
    "blip-2": {"num_query_tokens": 8},
    "bit": {"num_groups": 8},
    "conditional_detr": _DETR,
    "deepseek_v2": {"num_experts_per_tok": 2},
    "detr": _DETR,
    "donut-swin": {"embed_dim": 48, "window_size": 2},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "dots1": {"n_routed_experts": 4},
    "efficientnet": {"hidden_dim": 1280, "width_coefficient": 1.0, "depth_coefficient": 1.0},
    "esm": {"vocab_size": 128, "mask_token_id": 120, "pad_token_id": 1},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128},
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma3n_text": {"intermediate_size": 128, "activation_sparsity_pattern": [0.0, 0.0], "num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 16, "layer_types": ["mamba", "attention"]},
    "groupvit": {"vision_config": {"image_size": 64}},
    "hiera": {"image_size": [64, 64]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 8},
    "maskformer-swin": {"embed_dim": 48, "window_size": 2},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "pvt": {"image_size": 64},
    "layoutlmv3": {"coordinate_size": 10, "shape_size": 12, "input_size": 32},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"channel_shrink_ratio": 2, "hidden_size": 48, "max_2d_position_embeddings": 128},
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [4, 6]},
    "swin": {"embed_dim": 48, "window_size": 2, "image_size": 64, "patch_size": 4},
    "swin2sr": {"embed_dim": 48, "window_size": 2},
    "swinv2": {"embed_dim": 48, "window_size": 2, "image_size": 64, "patch_size": 4},
    "table-transformer": _DETR,
    "wav2vec2-bert": {"vocab_size": 32},
    "wav2vec2-conformer": {"vocab_size": 32},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"layers_block_type": ["hybrid", "hybrid"]},
}


_SERIES = {"prediction_length": 8, "context_length": 16, "lags_sequence": [1, 2, 3], "num_time_features": 2}
_SETTINGS |= dict.fromkeys(("autoformer", "informer", "time_series_transformer"), _SERIES)

# The same models called in other common ways: (type, settings, inputs).
_VARIANTS: dict[str, tuple[str, dict[str, Any], Inputs]] = {
    "bert-as-tuple": ("bert", {}, {"return_dict": False}),
    "bert-all-states": ("bert", {}, {"output_hidden_states": True}),
    "bert-chunked": ("bert", {"chunk_size_feed_forward": 4}, {}),
    "gpt2-with-cache": ("gpt2", {}, {"use_cache": True}),
    "llama-with-cache": ("llama", {}, {"use_cache": True}),
    "llama-all-states": ("llama", {}, {"output_hidden_states": True}),
    "t5-gated": ("t5", {"feed_forward_proj": "gated-gelu"}, {}),
}

# Types that are not in the catalogue, by reason.
_LEFT_OUT: dict[str, str] = {
    "the rule's settings do not fit one another": """
        apertus1p5 aria chameleon cohere_compass cohere_compass_text csm cvt d_fine dab-detr deepseek_ocr2
        deformable_detr depth_pro diffusion_gemma dots1 dots3_note dots3_note_text efficientloftr
        embedding_gemma2 embedding_gemma2_text emu3 fast_vlm fun_asr_nano gemma3n gemma3n_text gemma4
        gemma4_text gemma4_unified gemma4_unified_text glm5_next glm5_next_text gradium_phonon_tts
        granite4_vision granite_docling hunyuan_vl hunyuan_vl_text hy_v4_vl hy_v4_vl_text inkling2
        inkling2_loop kimi_k25 kyutai_speech_to_text lfm2_vl llama4 llava_next llava_next_video
        llava_onevision lw_detr mimi molmo2 moonshine_streaming muse_glimmer muse_spark musicgen
        musicgen_melody neomme omdet-turbo paddleocr_vl perception_lm pocket_tts pocket_tts_audio_tokenizer
        pp_ocrv6_medium_det qwen3_5 qwen3_5_moe qwen4_exp sapiens2 t5gemma2 timm_backbone unlimited_ocr
        video_llama_3 vipllava voxtral_realtime_text wavtokenizer zamba
    """,
    "the rule's inputs do not fit it": """
        align blip-2 blip_2_qformer canary clap clvp cohere_asr deepseek_vl deepseek_vl_hybrid deimv2 dia
        dpt edgetam ernie4_5_vl_moe fastspeech2_conformer fastspeech2_conformer_with_hifigan fuyu glm_image
        grounding-dino hgnet_v2 idefics instructblip instructblipvideo janus kosmos-2 lasr_encoder lightglue
        longcat_flash mask2former mistral3 mistral_large4 mm-grounding-dino mobilevitv2 modernvbert
        muse_glimmer_assistant nemo_speechlm nemotron3_5_asr nemotron3_5_transcribe_asr_audio
        nemotron3_5_transcribe_audio
        nemotron3_5_transcribe_word_timestamp nemotron3_diarization nemotron_asr_streaming nemotron_h
        neucodec omniasr_ctc oneformer parakeet_encoder parakeet_rnnt parakeet_tdt pe_audio pi0
        pp_doclayout_v3 pp_doclayout_v4 pp_ocrv5_mobile_rec pp_ocrv5_server_rec pp_ocrv6_small_det rf_detr
        rt_detr rt_detr_v2 sam sam2 sam2_hiera_det_model sam3_tracker sam_hq seggpt step3p7 textnet timesfm
        timesfm2_5 tvp ultravbert univnet uvdoc vits voxtral_realtime xcodec xcodec2
    """,
    "is not trained by calling it": """
        bark edgetam_video glm_image_vqmodel sam2_video sam3_tracker_video sam3_video timm_wrapper
    """,
    "is too large or slow even so": """
        blt pe_audio_video pe_video perceiver vibevoice vibevoice_acoustic_tokenizer vibevoice_asr
    """,
    "needs a package that is not here": """
        dinat higgs_audio_v2_tokenizer inkling_mm_model layoutlmv2
    """,
}


def class_of(model_type: str) -> type[nn.Module]:
    import transformers
    from transformers.models.auto import modeling_auto

    mappings = [getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES") for task in _TASKS]
    mappings.append(modeling_auto.MODEL_MAPPING_NAMES)
    name = next(mapping[model_type] for mapping in mappings if model_type in mapping)
    return getattr(transformers, name if isinstance(name, str) else name[0])


def _model(model_type: str, settings: dict[str, Any], width: int) -> nn.Module:
    from transformers import CONFIG_MAPPING

    given = _SETTINGS.get(model_type, {}) | settings
    return class_of(model_type)(shrunk(CONFIG_MAPPING[model_type], width, given))


def _inputs(model_type: str, given: Inputs, model: nn.Module, shape: Shape) -> Inputs:
    special = SPECIAL.get(model_type)
    found = special(model.config, shape) if special else inputs(model, shape)
    return found | given


@functools.cache
def left_out() -> dict[str, str]:
    """Types that are not in the catalogue, with the reason for each."""
    from transformers.models.auto import modeling_auto

    known = modeling_auto.MODEL_MAPPING_NAMES
    parts = {name: found[1] for name in known if (found := _PART.fullmatch(name)) and found[1] in known}
    reasons = {name: reason for reason, names in _LEFT_OUT.items() for name in names.split()}
    return {f"transformers/{name}": f"is a part of {whole}" for name, whole in parts.items()} | {
        f"transformers/{name}": reason for name, reason in reasons.items() if name in known
    }


def entries() -> list[Entry]:
    from transformers.models.auto import modeling_auto

    rows = {name: (name, {}, {}) for name in sorted(modeling_auto.MODEL_MAPPING_NAMES)} | _VARIANTS
    return [
        Entry(
            f"transformers/{name}",
            functools.partial(_model, model_type, settings),
            functools.partial(_inputs, model_type, given),
            has_wide=name in _WIDE,
        )
        for name, (model_type, settings, given) in rows.items()
        if f"transformers/{name}" not in left_out()
    ]


# The timed models: those of each kind that are trained most.
_WIDE = frozenset(
    """
    albert arcee bart bert cohere deberta-v2 deit distilbert electra ernie4_5 falcon gemma gemma2 glm4 gpt2 gpt_neox
    gptj granite llama mamba mistral mixtral modernbert mpt olmo2 opt phi phi3 qwen2 qwen2_moe qwen3 roberta smollm3
    stablelm starcoder2 t5 vit wav2vec2 whisper xlnet
    """.split()
)

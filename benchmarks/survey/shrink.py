"""Shrinks a configuration of transformers to toy size, by the names of the settings.

Every configuration class of transformers is a dataclass whose defaults are those of a real model. The rules below map
the name of a setting to a kind: a width, a number of layers, of heads, of experts, a size of a vocabulary or an image.
Settings without a rule keep their defaults.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

VOCABULARY = 128
LAYERS = 2
HEADS = 4
IMAGE = 32
PATCH = 8
POSITIONS = 128

Size = Callable[[Any, int], Any]


def _at_most(bound: int) -> Size:
    """The bound, or the default if that is less."""
    return lambda value, width: min(value, bound)


def _exactly(number: int) -> Size:
    return lambda value, width: number


def _widths(times: float) -> Size:
    """A multiple of the width. In a sequence, a quarter or an eighth of each entry, so that ratios stay."""

    def size(value: Any, width: int) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(_part(v, max(value), width) for v in value)
        return int(times * width)

    return size


def _part(value: Any, largest: Any, width: int) -> Any:
    if not isinstance(value, int) or largest <= width:
        return value
    return max(8, value // (8 if largest >= 1024 else 4))


def _depths(value: Any, width: int) -> Any:
    """Two layers. In a sequence, one in each stage."""
    return type(value)(1 for _ in value) if isinstance(value, list | tuple) else min(value, LAYERS)


def _heads(value: Any, width: int) -> Any:
    return value if isinstance(value, list | tuple) else min(value, HEADS)


def _zero(value: Any, width: int) -> Any:
    """Zero, for dropout and similar settings."""
    return type(value)(0.0 for _ in value) if isinstance(value, list | tuple) else type(value)(0)


def _image(value: Any, width: int) -> Any:
    return type(value)(IMAGE for _ in value) if isinstance(value, list | tuple) else min(value, IMAGE)


def _patch(value: Any, width: int) -> Any:
    return type(value)(min(v, PATCH) for v in value) if isinstance(value, list | tuple) else min(value, PATCH)


# The first pattern that matches a whole name decides. Sizes of heads precede numbers of heads, and both widths.
_RULES: tuple[tuple[str, Size], ...] = (
    (r".*drop(?!less).*|.*pdrop|.*jitter_noise|mask_(time|feature)_prob", _zero),
    (r"(.*_)?vocab_size|number_output_channels", _at_most(VOCABULARY)),
    (r"(.*_)?(max_position_embeddings|n_positions|max_(source|target)_positions|max_seq_len|seq_length|n_ctx)",
     _at_most(POSITIONS)),
    (r"qk_rope_head_dim|rotary_dim", _exactly(8)),
    (r"qk_nope_head_dim|(global_|swa_|linear_|index_|mamba_)?(key_|value_|v_|qk_)?head_dim|d_kv|d_head"
     r"|(linear|global)_(key|value)_head_dim|attention_head_dim|kv_channels|mamba_d_head",
     lambda value, width: width // HEADS),
    (r"(kv|q|o)_lora_rank|.*lora_rank|.*rank", lambda value, width: width // 2),
    (r".*(key_value|kv)_heads?|num_kv_heads|n_kv_heads", _at_most(2)),
    (r"(.*_)?(num_|n_)?(attention_)?heads?(_num)?|(.*_)?num_attention_heads|.*_attention_heads|.*num_.*_heads"
     r"|n_heads?", _heads),
    (r".*experts_per_tok(en)?|moe_topk|moe_k|top_k_experts|num_selected_experts", _at_most(2)),
    (r"n_group|topk_group|num_expert_group(s)?", _exactly(1)),
    (r"(.*_)?(num_|n_)(local_|routed_)?experts|moe_num_experts|num_moe_experts", _at_most(4)),
    (r"first_k_dense_replace|moe_layer_start_index|num_dense_layers", _at_most(1)),
    (r"(moe_|shared_expert_|.*expert.*_)intermediate_size|expert_ffn_hidden_size", _widths(1)),
    (r"(.*_)?(intermediate_(size|dim)|ffn_dim|ffn_hidden_size|d_ff|dff|dim_ff|mlp_dim|n_inner|d_inner"
     r"|dim_feedforward|feedforward_dim|feed_forward_hidden_size|mlp_hidden_size)", _widths(2)),
    (r"(.*_)?(hidden_sizes?|hidden_dim|d_model|n_embd|embed_dims?|emb_dim|embedding_size|embedding_dim|projection_dim"
     r"|projection_size|model_dim|embeds?_hidden_size|output_proj_dims|out_hidden_size|lru_width|conv_dim"
     r"|project_dim|adapter_out_dim|vision_output_dim|output_channels|fusion_hidden_size|neck_hidden_sizes"
     r"|encoder_in_channels|decoder_in_channels|classifier_proj_size|tdnn_dim|xvector_output_dim)", _widths(1)),
    (r"(.*_)?(depths?|num_(hidden_)?(layers|blocks)|n_layers?|encoder_layers|decoder_layers|layers|num_.*_layers)",
     _depths),
    (r"(pretrain_)?image_size|input_size|img_size", _image),
    (r"patch_size", _patch),
    (r"num_(queries|denoising|proposals)|two_stage_num_proposals", _at_most(20)),
    (r"num_mel_bins", _at_most(16)),
    (r"(max_)?num_frames", _at_most(4)),
)  # fmt: skip
_COMPILED = tuple((re.compile(pattern), size) for pattern, size in _RULES)


def _turns(config: Any) -> bool:
    """Whether the rotary embedding has sections for time, height and width."""
    return "mrope_section" in getattr(config, "ignore_keys_at_rope_validation", ())


def _sections(rope: dict[str, Any], width: int) -> list[int]:
    """The rotated pairs of a head, divided among time, height and width."""
    pairs = int(width // HEADS * rope.get("partial_rotary_factor", 1.0)) // 2
    return [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]


def _is_number(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and all(_is_number(item) and not isinstance(item, list | tuple) for item in value)
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_token(name: str) -> bool:
    return re.search(r"token_(id|index)$", name) is not None


def shrunk(config_class: type, width: int = 64, given: dict[str, Any] | None = None, like: Any = None) -> Any:
    """A configuration of this class at toy size.

    `given` overrides the rules, and may contain "vision_config" and similar parts. The settings of the instance `like`
    replace the defaults: for a part of a model, `like` is the part that the whole model configures.
    """
    given = dict(given or {})
    like = like if like is not None else config_class()
    settings: dict[str, Any] = {}
    # From the top of the vocabulary down, because the first tokens have other special meanings.
    special = iter(range(VOCABULARY - 1, VOCABULARY // 2, -1))
    for field in dataclasses.fields(config_class):
        if not field.init or field.name == "transformers_version":
            continue
        value = getattr(like, field.name, None)
        # A part of another type that is given as an instance is not shrunk.
        if hasattr(value, "to_dict") and "model_type" not in given.get(field.name, ()):
            settings[field.name] = shrunk(type(value), width, given.pop(field.name, None), value)
            continue
        if field.name == "rope_parameters" and isinstance(value, dict) and _turns(like):
            settings[field.name] = (value or {}) | {"mrope_section": _sections(value or {}, width)}
            continue
        # Settings with the default None follow from the others.
        if field.default is None or not _is_number(value):
            continue
        if _is_token(field.name):
            settings[field.name] = next(special) if not isinstance(value, int) or value >= VOCABULARY // 2 else value
            continue
        rule = next((size for pattern, size in _COMPILED if pattern.fullmatch(field.name)), None)
        if rule is not None:
            settings[field.name] = rule(value, width)
    # As many as heads of queries, or fewer, as in the defaults.
    if "num_key_value_heads" in settings and like.num_key_value_heads == getattr(like, "num_attention_heads", 0):
        settings["num_key_value_heads"] = settings.get("num_attention_heads", HEADS)
    return config_class(**settings | given)

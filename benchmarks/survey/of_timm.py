"""Models of timm by timm's names, with few blocks and for small images.

A row is a name and the settings beside those of the family. Transformers take a depth and a size of image and patch.
Convolutional networks are narrow, with one block in each stage, if their classes allow this.
"""

from typing import Any

import torch
from torch import nn

from .entry import NARROW, Entry, Shape

# The settings that make the models of a family small.
_PLAIN = {"img_size": 32, "patch_size": 8, "depth": 2}
_STAGES = {"depths": (1, 1, 1, 1)}
_MIXER = {"img_size": 64}
_RESNET = {"layers": (1, 1, 1, 1)}
_VIT = {"embed_dim": NARROW, "num_heads": 4}

# Names by the settings that all of them share, then the settings of each.
_FAMILIES: tuple[tuple[dict[str, Any], dict[str, dict[str, Any]]], ...] = (
    (
        _PLAIN,
        {
            "vit_tiny_patch16_224": _VIT,
            "vit_small_patch16_rope_224": _VIT,
            "vit_base_patch16_siglip_224": _VIT,
            "vit_base_patch16_clip_224": _VIT,
            "vit_small_patch14_dinov2": _VIT,
            "vit_small_patch14_reg4_dinov2": _VIT,
            "vit_giant_patch14_dinov2": _VIT | {"mlp_ratio": 4.0},
            "vit_medium_patch16_gap_240": _VIT,
            "vit_base_patch16_rpn_224": _VIT,
            "vit_srelpos_small_patch16_224": _VIT,
            "deit_tiny_distilled_patch16_224": _VIT,
            "deit3_small_patch16_224": _VIT,
            "beit_base_patch16_224": _VIT,
            "beitv2_base_patch16_224": _VIT,
            "eva02_tiny_patch14_224": _VIT,
            "eva_giant_patch14_224": _VIT,
            "cait_xxs24_224": _VIT,
            "xcit_nano_12_p8_224": _VIT,
        },
    ),
    (
        {},
        {
            "visformer_tiny": {},
            "convit_tiny": {"depth": 2},
            "crossvit_tiny_240": {},
            "tnt_s_patch16_224": {"depth": 2},
            "pit_ti_224": {},
        },
    ),
    (
        {"img_size": 64, **_STAGES},
        {
            "swin_tiny_patch4_window7_224": {"window_size": 2, "embed_dim": 24},
            "swinv2_tiny_window8_256": {"window_size": 2, "embed_dim": 24},
            "swin_s3_tiny_224": {"window_size": (2, 2, 2, 2), "embed_dim": 24},
            "twins_svt_small": {},
            "twins_pcpvt_small": {},
        },
    ),
    (
        _MIXER,
        {
            "mixer_s16_224": {},
            "gmlp_ti16_224": {},
            "resmlp_12_224": {},
            "gmixer_12_224": {},
        },
    ),
    (
        _STAGES,
        {
            "convnext_atto": {"dims": (16, 24, 32, 40)},
            "convnext_atto_ols": {"dims": (16, 24, 32, 40)},
            "convnextv2_atto": {"dims": (16, 24, 32, 40)},
            "convnext_tiny_hnf": {"dims": (16, 24, 32, 40)},
            "inception_next_atto": {},
            "edgenext_xx_small": {},
            "mambaout_femto": {},
            "efficientformer_l1": {},
            "davit_tiny": {},
            "starnet_s1": {},
        },
    ),
    (
        _RESNET,
        {
            "resnet18": {},
            "resnet26d": {},
            "resnet50": {"base_width": 16},
            "resnext50_32x4d": {},
            "seresnet18": {},
            "ecaresnet26t": {},
            "resnetblur18": {},
            "skresnet18": {},
            "resnetv2_50": {"channels": (32, 64, 64, 64)},
            "wide_resnet50_2": {"base_width": 32},
        },
    ),
    (
        {},
        {
            "regnetx_002": {},
            "pvt_v2_b0": {},
            "poolformer_s12": {},
            "poolformerv2_s12": {},
            "fastvit_t8": {},
            "repvit_m0_9": {},
            "tiny_vit_5m_224": {},
            "focalnet_tiny_srf": {},
            "hiera_tiny_224": {"img_size": 64, "stages": (1, 1, 1, 1)},
            "regnety_002": {},
            "regnetz_005": {},
            "mobilenetv2_035": {},
            "mobilenetv3_small_050": {},
            "mobilenetv4_conv_small_035": {},
            "efficientnet_lite0": {},
            "tf_efficientnetv2_b0": {},
            "mnasnet_small": {},
            "ghostnet_050": {},
            "lcnet_035": {},
            "tinynet_e": {},
            "densenet121": {"block_config": (1, 1, 1, 1), "growth_rate": 16},
            "dla34": {},
            "nf_resnet26": {},
            "hrnet_w18_small": {},
            "cspresnet50": {},
            "cs3darknet_s": {},
            "vovnet39a": {},
            "botnet26t_256": {},
            "lambda_resnet26t": {},
            "gernet_s": {},
            "repvgg_a0": {},
            "mobileone_s0": {},
            "mobilevit_xxs": {},
            "mobilevitv2_050": {},
            "coatnet_nano_rw_224": {"img_size": 64},
            "maxvit_pico_rw_256": {"img_size": 64},
            "levit_128s": {},
            "efficientvit_b0": {},
            "efficientvit_m0": {},
            "coat_tiny": {},
            "nest_tiny": {"img_size": 64},
            "ghostnetv2_100": {},
            "shvit_s1": {},
            "vitamin_small_224": {"img_size": 64},
        },
    ),
)
_ROWS = {name: common | own for common, rows in _FAMILIES for name, own in rows.items()}
# Models with a batch norm after pooling to a point: over two values the gradient is only rounding.
_POOLED = ("skresnet18",)
# The models that take a width, which are timed.
_WIDE = frozenset(name for name in _ROWS if "embed_dim" in _ROWS[name] and "img_size" in _ROWS[name])


def _model(name: str, settings: dict[str, Any], width: int) -> nn.Module:
    import timm

    wide = {"embed_dim": width} if settings.get("embed_dim") == NARROW else {}
    return timm.create_model(name, num_classes=10, **settings | wide)


def _inputs(name: str, model: nn.Module, shape: Shape) -> dict[str, Any]:
    size = _ROWS[name].get("img_size") or _size(model)
    return {"x": torch.randn(shape.batch * (2 if name in _POOLED else 1), 3, size, size)}


def _size(model: nn.Module) -> int:
    """The image size for which the model was made; 64 if any size fits."""
    fixed = model.default_cfg.get("fixed_input_size", False)
    return model.default_cfg["input_size"][-1] if fixed else 64


def entries() -> list[Entry]:
    return [
        Entry(
            f"timm/{name}",
            lambda width, name=name, settings=settings: _model(name, settings, width),
            lambda model, shape, name=name: _inputs(name, model, shape),
            has_wide=name in _WIDE,
        )
        for name, settings in _ROWS.items()
    ]

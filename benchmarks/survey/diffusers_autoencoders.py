"""Autoencoders of diffusers: the arguments and inputs of each."""

from .diffusers_rows import CLIP, PIXELS, Row, noise

_KL = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
}

# fmt: off
AUTOENCODERS: dict[str, Row] = {
    "kl": Row("AutoencoderKL", _KL, {"sample": PIXELS}, True),
    "kl_asymmetric": Row("AsymmetricAutoencoderKL", {"in_channels": 3, "out_channels": 3,
        "down_block_out_channels": (32, 64), "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_out_channels": (32, 64), "up_block_types": ("UpDecoderBlock2D",) * 2, "layers_per_down_block": 1,
        "layers_per_up_block": 1}, {"sample": PIXELS}),
    "kl_temporal": Row("AutoencoderKLTemporalDecoder", {"in_channels": 3, "out_channels": 3,
        "block_out_channels": (32, 64), "down_block_types": ("DownEncoderBlock2D",) * 2}, {"sample": PIXELS,
        "num_frames": lambda shape: 1}),
    "kl_cogvideox": Row("AutoencoderKLCogVideoX", {"in_channels": 3, "out_channels": 3, "block_out_channels": (8, 8,
        16, 16), "latent_channels": 4, "norm_num_groups": 4}, {"sample": CLIP}),
    "kl_hunyuan_video": Row("AutoencoderKLHunyuanVideo", {"in_channels": 3, "out_channels": 3, "latent_channels": 4,
        "block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4}, {"sample": CLIP}),
    "kl_ltx": Row("AutoencoderKLLTXVideo", {"in_channels": 3, "out_channels": 3, "latent_channels": 8,
        "block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8), "layers_per_block": (1, 1, 1,
        1, 1), "decoder_layers_per_block": (1, 1, 1, 1, 1)}, {"sample": noise(3, 9, 32, 32)}),
    "kl_wan": Row("AutoencoderKLWan", {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1,
        "in_channels": 3, "out_channels": 3}, {"sample": CLIP}),
    "kl_qwen_image": Row("AutoencoderKLQwenImage", {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1}, {"sample": noise(3, 1, 32, 32)}),
    "dc": Row("AutoencoderDC", {"in_channels": 3, "latent_channels": 4, "attention_head_dim": 2,
        "encoder_block_types": ("ResBlock", "EfficientViTBlock"), "decoder_block_types": ("ResBlock",
        "EfficientViTBlock"), "encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8),
        "encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1), "encoder_qkv_multiscales": ((),
        (5,)), "decoder_qkv_multiscales": ((), (5,)), "decoder_act_fns": ["silu", "silu"],
        "decoder_norm_types": ["rms_norm", "rms_norm"], "upsample_block_type": "interpolate",
        "downsample_block_type": "stride_conv"}, {"sample": PIXELS}),
    "tiny": Row("AutoencoderTiny", {"in_channels": 3, "out_channels": 3, "encoder_block_out_channels": (32, 32),
        "decoder_block_out_channels": (32, 32), "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)},
        {"sample": PIXELS}, True),
    "vq": Row("VQModel", _KL | {"latent_channels": 3}, {"sample": PIXELS}, True),
    "oobleck": Row("AutoencoderOobleck", {"encoder_hidden_size": 8, "downsampling_ratios": [2, 4],
        "channel_multiples": [1, 2], "decoder_channels": 8, "decoder_input_channels": 4}, {"sample": noise(2,
        256)}),
    "consistency_decoder": Row("ConsistencyDecoderVAE", {"encoder_block_out_channels": (32, 64),
        "encoder_down_block_types": ("DownEncoderBlock2D",) * 2, "encoder_layers_per_block": 1,
        "encoder_norm_num_groups": 8, "decoder_block_out_channels": (32, 64),
        "decoder_down_block_types": ("ResnetDownsampleBlock2D",) * 2,
        "decoder_up_block_types": ("ResnetUpsampleBlock2D",) * 2, "decoder_layers_per_block": 1,
        "decoder_norm_num_groups": 8}, {"sample": PIXELS}),
}
# fmt: on

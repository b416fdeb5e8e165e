"""Inputs of the transformers models that the general rules do not fit."""

from collections.abc import Callable
from typing import Any

import torch

from .entry import Shape
from .transformers_inputs import Inputs, find, images, tokens, videos


def _frames(config: Any, shape: Shape) -> Inputs:
    """Sound with the frequency bands last."""
    bands = getattr(config, "num_mel_bins", None) or getattr(config, "input_feat_per_channel", 80)
    return {"input_features": torch.randn(shape.batch, 64, bands)}


def _encoded_frames(config: Any, shape: Shape) -> Inputs:
    """Sound for an encoder that is a part of a model."""
    return {"input_features": torch.randn(shape.batch, 128, find(config, "num_mel_bins", "feature_size", otherwise=80))}


def _spoken(config: Any, shape: Shape) -> Inputs:
    return _frames(config, shape) | {"decoder_input_ids": tokens(shape), "use_cache": False}


def _film(config: Any, shape: Shape) -> Inputs:
    """A sequence of images."""
    return {"pixel_values": videos(config, shape)}


def _read_film(config: Any, shape: Shape) -> Inputs:
    return _film(config, shape) | {"input_ids": tokens(shape)}


def _queried(config: Any, shape: Shape) -> Inputs:
    """Fewer tokens than for most models."""
    return {"pixel_values": images(config, shape), "input_ids": tokens(Shape(shape.batch, 16))}


def _packed(config: Any, shape: Shape) -> Inputs:
    """Images as rows of patches."""
    return {
        "input_ids": tokens(shape),
        "pixel_values": torch.randn(shape.batch, 16, 3 * config.vision_config.patch_size**2),
        "pixel_attention_mask": torch.ones(shape.batch, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4]] * shape.batch),
    }


def _regions(config: Any, shape: Shape) -> Inputs:
    """The regions found by a detector."""
    return {
        "input_ids": tokens(shape),
        "visual_feats": torch.randn(shape.batch, 10, config.visual_feat_dim),
        "visual_pos": torch.rand(shape.batch, 10, 4),
    }


def _past(config: Any, shape: Shape) -> Inputs:
    return {"past_values": torch.randn(shape.batch, config.context_length, config.num_input_channels)}


def _wave(config: Any, shape: Shape) -> Inputs:
    return {"input_values": torch.randn(shape.batch, 1, 1280)}


def _series(config: Any, shape: Shape) -> Inputs:
    length = config.context_length + max(config.lags_sequence)
    ahead = config.prediction_length
    features = max(1, config.num_time_features)
    return {
        "past_values": torch.randn(shape.batch, length),
        "past_time_features": torch.randn(shape.batch, length, features),
        "past_observed_mask": torch.ones(shape.batch, length),
        "future_values": torch.randn(shape.batch, ahead),
        "future_time_features": torch.randn(shape.batch, ahead, features),
    }


def _decisions(config: Any, shape: Shape) -> Inputs:
    batch, length = shape
    return {
        "states": torch.randn(batch, length, config.state_dim),
        "actions": torch.randn(batch, length, config.act_dim),
        "rewards": torch.randn(batch, length, 1),
        "returns_to_go": torch.randn(batch, length, 1),
        "timesteps": torch.arange(length).expand(batch, -1),
        "attention_mask": torch.ones(batch, length),
    }


# For each type, the function that makes all inputs.
SPECIAL: dict[str, Callable[[Any, Shape], Inputs]] = {
    "audio-spectrogram-transformer": lambda c, s: {"input_values": torch.randn(s.batch, c.max_length, c.num_mel_bins)},
    "autoformer": _series,
    "clap": lambda c, s: {"input_features": torch.randn(s.batch, 1, 64, 64), "is_longer": torch.ones(s.batch, 1)},
    "dac": _wave,
    "decision_transformer": _decisions,
    "encodec": _wave,
    "informer": _series,
    "reformer": lambda c, s: {"input_ids": tokens(Shape(s.batch, 24))},
    "lasr_ctc": _encoded_frames,
    "parakeet_ctc": _encoded_frames,
    "lxmert": _regions,
    "owlv2": _queried,
    "owlvit": _queried,
    "patchtsmixer": _past,
    "patchtst": _past,
    "siglip2": _packed,
    "speech_to_text": _spoken,
    "timesformer": _film,
    "videomae": _film,
    "vivit": _film,
    "wav2vec2-bert": lambda c, s: {"input_features": torch.randn(s.batch, 64, c.feature_projection_input_dim)},
    "xclip": _read_film,
    "xcodec": _wave,
    "time_series_transformer": _series,
}

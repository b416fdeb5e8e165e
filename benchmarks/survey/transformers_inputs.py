"""Inputs of a transformers model, by the names of the parameters of forward, and the configuration."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .entry import Shape
from .shrink import VOCABULARY

Inputs = dict[str, Any]

# The range of tokens: the first few and the upper half of a vocabulary may be special.
_PLAIN = (3, VOCABULARY // 2)


def tokens(shape: Shape) -> Tensor:
    return torch.randint(*_PLAIN, (shape.batch, shape.length))


def find(config: Any, *names: str, otherwise: Any = None) -> Any:
    """The first setting of these names in a configuration or one of the parts."""
    parts = [config, *(value for value in vars(config).values() if hasattr(value, "to_dict"))]
    for name in names:
        for part in parts:
            value = getattr(part, name, None)
            if value is not None:
                return value
    return otherwise


def image_size(config: Any) -> int:
    """The image size of the model; 64 for a model with stages, so that the last stage has more than one pixel."""
    found = find(config, "image_size", "input_size", otherwise=64)
    size = max(found) if isinstance(found, list | tuple) else found
    staged = isinstance(find(config, "depths", "hidden_sizes", "block_channels"), list | tuple)
    return max(64, size) if staged else size


def _channels(config: Any) -> int:
    found = find(config, "num_channels", "in_channels", "in_chans", otherwise=3)
    return found if isinstance(found, int) else 3


def images(config: Any, shape: Shape) -> Tensor:
    size = image_size(config)
    return torch.randn(shape.batch, _channels(config), size, size)


def videos(config: Any, shape: Shape) -> Tensor:
    size = image_size(config)
    frames = find(config, "num_frames", "frames_per_clip", otherwise=4)
    return torch.randn(shape.batch, frames, _channels(config), size, size)


def _boxes(config: Any, shape: Shape) -> Tensor:
    corner = torch.randint(0, 50, (shape.batch, shape.length, 2))
    return torch.cat((corner, corner + 20), -1)


def _features(config: Any, shape: Shape) -> Tensor:
    """Features of sound: most models have frames last, and as many as there are positions."""
    bands = find(config, "num_mel_bins", "feature_size", "input_feat_per_channel", otherwise=80)
    positions = find(config, "max_source_positions")
    return torch.randn(shape.batch, bands, 2 * positions if positions else 64)


# The inputs for parameters of these names.
_BY_NAME: dict[str, Callable[[Any, Shape], Any]] = {
    "input_ids": lambda config, shape: tokens(shape),
    "decoder_input_ids": lambda config, shape: tokens(Shape(shape.batch, shape.length // 2)),
    "pixel_values": images,
    "bbox": _boxes,
    "use_cache": lambda config, shape: False,
}
# The inputs for parameters that are passed only if the model cannot be called otherwise.
_MAIN: dict[str, Callable[[Any, Shape], Any]] = {
    "input_values": lambda config, shape: torch.randn(shape.batch, 64 * shape.length),
    "input_features": _features,
    "pixel_values_videos": videos,
}
_LABELLED = ("ForCausalLM", "ForMaskedLM", "LMHeadModel")


def inputs(model: nn.Module, shape: Shape) -> Inputs:
    """The inputs by the general rules."""
    config = model.config
    parameters = inspect.signature(model.forward).parameters
    found = {name: make(config, shape) for name, make in _BY_NAME.items() if name in parameters}
    if not getattr(config, "is_encoder_decoder", False):
        found.pop("decoder_input_ids", None)
    main = {name: make for name, make in _MAIN.items() if name in parameters}
    required = [name for name, p in parameters.items() if p.default is p.empty]
    for name, make in main.items():
        if name in required or name == getattr(model, "main_input_name", None) or not found.keys() - {"use_cache"}:
            found[name] = make(config, shape)
    if "pixel_values" in found and "image_grid_thw" in parameters:
        found |= _patches(config, shape)
    if "pixel_values" in found and "pixel_attention_mask" in parameters:
        # An example may have several images.
        found["pixel_values"] = found["pixel_values"].unsqueeze(1)
    if "pixel_values" in found and "input_ids" in found:
        found = _with_images(model, found)
    if "labels" in parameters and type(model).__name__.endswith(_LABELLED):
        found["labels"] = found["input_ids"].clone()
    return found


def _patches(config: Any, shape: Shape) -> Inputs:
    """Images as rows of pixels, patch by patch: four by four patches for each example."""
    vision = getattr(config, "vision_config", config)
    patch, frames = getattr(vision, "patch_size", 14), getattr(vision, "temporal_patch_size", 1)
    values = torch.randn(16 * shape.batch, _channels(vision) * frames * patch**2)
    return {"pixel_values": values, "image_grid_thw": torch.tensor([[1, 4, 4]] * shape.batch)}


def _with_images(model: nn.Module, found: Inputs) -> Inputs:
    """The inputs with image tokens in the place of the first tokens, if the model has image tokens."""
    token = find(model.config, "image_token_id", "image_token_index")
    if token is None or not hasattr(model, "get_image_features"):
        return found
    with torch.no_grad():
        known = inspect.signature(model.get_image_features).parameters
        if "image_sizes" in known and "image_sizes" in inspect.signature(model.forward).parameters:
            found["image_sizes"] = torch.tensor([found["pixel_values"].shape[-2:]] * len(found["pixel_values"]))
        given = {name: value for name, value in found.items() if name in known and name != "input_ids"}
        features = model.get_image_features(**given)
    features = getattr(features, "pooler_output", features)
    if isinstance(features, list | tuple):
        features = torch.cat([f.flatten(0, -2) for f in features])
    batch = len(found["input_ids"])
    each = features.numel() // features.shape[-1] // batch
    ids = found["input_ids"]
    ids = torch.cat((ids[:, :1], torch.full((batch, each), token), ids[:, 1:]), 1)
    found = found | {"input_ids": ids}
    # 1 at image tokens.
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        found["mm_token_type_ids"] = (ids == token).long()
    return found

"""Models of torch.nn: transformers, recurrent networks, and one-line compositions of layers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .entry import Entry, Shape


def _layer(kind: type[nn.Module], width: int, **settings: Any) -> nn.Module:
    return kind(width, 4, 2 * width, batch_first=True, dropout=0.0, **settings)


def _encoder(**settings: Any) -> Callable[[int], nn.Module]:
    def model(width: int) -> nn.Module:
        layer = _layer(nn.TransformerEncoderLayer, width, **settings)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    return model


def _decoder(**settings: Any) -> Callable[[int], nn.Module]:
    return lambda width: nn.TransformerDecoder(_layer(nn.TransformerDecoderLayer, width, **settings), 2)


def _transformer(**settings: Any) -> Callable[[int], nn.Module]:
    return lambda width: nn.Transformer(width, 4, 2, 2, 2 * width, 0.0, batch_first=True, **settings)


def _width(model: nn.Module) -> int:
    """The width of the first weight that has one."""
    return next(p.shape[-1] for p in model.parameters() if p.dim() > 1)


def _passage(model: nn.Module, shape: Shape) -> torch.Tensor:
    return torch.randn(shape.batch, shape.length, _width(model))


def _given(*names: str) -> Callable[[nn.Module, Shape], dict[str, Any]]:
    return lambda model, shape: {name: _passage(model, shape) for name in names}


def _image(channels: int) -> Callable[[nn.Module, Shape], dict[str, Any]]:
    return lambda model, shape: {"input": torch.randn(shape.batch, channels, 16, 16)}


def _convolutions(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, width, 3, padding=1),
        nn.GroupNorm(8, width),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 10),
    )


def _perceptron(width: int) -> nn.Module:
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.RMSNorm(width)
    )


def _activations(width: int) -> nn.Module:
    kinds = (nn.ELU, nn.Mish, nn.Hardswish, nn.LeakyReLU, nn.Softplus, nn.Tanh, nn.SELU, nn.PReLU, nn.Sigmoid)
    layers = [layer for kind in kinds for layer in (nn.Linear(width, width), kind())]
    return nn.Sequential(*layers)


def entries() -> list[Entry]:
    src = _given("src")
    pair = _given("tgt", "memory")
    both = _given("src", "tgt")
    single = _given("input")
    rows: dict[str, tuple[Callable[[int], nn.Module], Callable[[nn.Module, Shape], dict[str, Any]]]] = {
        "encoder_pre_gelu": (_encoder(activation="gelu", norm_first=True), src),
        "encoder_post_relu": (_encoder(activation="relu"), src),
        "encoder_silu": (_encoder(activation=nn.functional.silu, norm_first=True), src),
        "encoder_no_bias": (_encoder(activation="gelu", bias=False), src),
        "decoder_pre_gelu": (_decoder(activation="gelu", norm_first=True), pair),
        "decoder_post_relu": (_decoder(activation="relu"), pair),
        "transformer_post": (_transformer(), both),
        "transformer_pre_gelu": (_transformer(norm_first=True, activation="gelu"), both),
        "attention": (lambda width: nn.MultiheadAttention(width, 4, batch_first=True), _given("query", "key", "value")),
        "lstm": (lambda width: nn.LSTM(width, width, 2, batch_first=True), single),
        "gru": (lambda width: nn.GRU(width, width, 2, batch_first=True, bidirectional=True), single),
        "convolutions": (_convolutions, _image(3)),
        "perceptron": (_perceptron, single),
        "activations": (_activations, single),
        "layer_norm": (nn.LayerNorm, lambda model, shape: {"input": torch.randn(*shape, model.normalized_shape[0])}),
    }
    wide = {name for name in rows if name.startswith(("encoder", "decoder", "transformer", "perceptron"))}
    return [
        Entry(f"torch/{name}", model, inputs, has_wide=name in wide, differentiable=True)
        for name, (model, inputs) in rows.items()
    ]

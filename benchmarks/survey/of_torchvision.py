"""Models of torchvision for small images, with one block in each stage if their classes allow this."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .entry import Entry, Shape


def _named(name: str, **settings: Any) -> Callable[[int], nn.Module]:
    def model(width: int) -> nn.Module:
        import torchvision

        return getattr(torchvision.models, name)(num_classes=10, **settings)

    return model


def _resnet(block: str, width: int, **settings: Any) -> nn.Module:
    from torchvision.models import resnet

    return resnet.ResNet(getattr(resnet, block), [1, 1, 1, 1], num_classes=10, **settings)


def _convnext(width: int) -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    sizes = (16, 24, 32, 40, None)
    return ConvNeXt([CNBlockConfig(i, o, 1) for i, o in itertools.pairwise(sizes)], num_classes=10)


def _swin(width: int) -> nn.Module:
    from torchvision.models import SwinTransformer

    return SwinTransformer([4, 4], 24, [1, 1], [2, 4], [2, 2], stochastic_depth_prob=0.0, num_classes=10)


def _densenet(width: int) -> nn.Module:
    from torchvision.models import DenseNet

    return DenseNet(growth_rate=16, block_config=(2, 2, 2), num_init_features=32, num_classes=10)


def _vit(width: int) -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, num_layers=2, num_heads=4, hidden_dim=width, mlp_dim=2 * width, num_classes=10)


def entries() -> list[Entry]:
    rows: dict[str, Callable[[int], nn.Module]] = {
        "resnet_basic": functools.partial(_resnet, "BasicBlock"),
        "resnet_bottleneck": functools.partial(_resnet, "Bottleneck", width_per_group=16),
        "resnext": functools.partial(_resnet, "Bottleneck", groups=8, width_per_group=4),
        "squeezenet1_1": _named("squeezenet1_1"),
        "densenet": _densenet,
        "mobilenet_v2": _named("mobilenet_v2", width_mult=0.25),
        "mobilenet_v3_small": _named("mobilenet_v3_small", width_mult=0.5),
        "shufflenet_v2_x0_5": _named("shufflenet_v2_x0_5"),
        "efficientnet_b0": _named("efficientnet_b0"),
        "regnet_y_400mf": _named("regnet_y_400mf"),
        "mnasnet0_5": _named("mnasnet0_5"),
        "convnext": _convnext,
        "swin": _swin,
        "vit": _vit,
    }

    def images(model: nn.Module, shape: Shape) -> dict[str, Any]:
        size = getattr(model, "image_size", 64)
        return {"x": torch.randn(shape.batch, 3, size, size)}

    return [Entry(f"torchvision/{name}", model, images, has_wide=name == "vit") for name, model in rows.items()]

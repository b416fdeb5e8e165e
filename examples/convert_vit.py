"""Trains a vision transformer of transformers: unconverted, checkpointed, converted, and planned for a memory budget.

    python examples/convert_vit.py --recompute checkpoint output 0.4

Needs transformers. The model learns to tell wide rectangles from tall ones, in images that are generated during
training.
"""

import sys

import torch
from side_by_side import arrange, main
from torch import Tensor, nn
from train_unet import SIZE
from train_unet import draw_batch as draw_images
from transformers import ViTConfig, ViTForImageClassification

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTH, LAYERS, HEADS = (768, 12, 12) if DEVICE == "cuda" else (192, 4, 3)
WAYS = ("checkpoint", "output", "0.4")


class Classifier(nn.Module):
    """Takes images and labels, and returns the loss."""

    def __init__(self, way: str) -> None:
        super().__init__()
        config = ViTConfig(
            image_size=SIZE, patch_size=4, num_channels=1, hidden_size=WIDTH, intermediate_size=4 * WIDTH,
            num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_labels=2,
        )  # fmt: skip
        self.model = ViTForImageClassification(config).to(DEVICE)
        images, labels = draw_batch(torch.Generator().manual_seed(0))
        arrange(self.model, way, {"pixel_values": images.to(DEVICE), "labels": labels.to(DEVICE)})

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.model(pixel_values=images, labels=labels).loss


def draw_batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    images, _, _ = draw_images(generator)
    inside = images[:, 0] > 0
    return images, (inside.any(1).sum(1) > inside.any(2).sum(1)).long()


if __name__ == "__main__":
    sys.exit(main(__doc__, Classifier, draw_batch, DEVICE, steps=60, learning_rate=2e-4, ways=WAYS))

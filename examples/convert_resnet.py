"""Trains a ResNet of transformers, unconverted and converted by one line, to tell from which of four pictures a piece
comes: a photograph, a drawn flower and two maps of heights, which are part of matplotlib."""

import functools
import sys

import matplotlib.cbook
import numpy
import torch
import torch.nn.functional as F
from PIL import Image
from side_by_side import main
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

import ckpt_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZE, BATCH, CHANNELS = (96, 128, 256) if DEVICE == "cuda" else (64, 16, 128)


class WhichPicture(nn.Module):
    """Takes pieces and the numbers of their pictures, and returns the loss."""

    def __init__(self, level: str) -> None:
        super().__init__()
        config = ResNetConfig(
            num_channels=1,
            embedding_size=CHANNELS // 2,
            hidden_sizes=[CHANNELS, 2 * CHANNELS],
            depths=[2, 2],
            num_labels=4,
        )
        self.model = ResNetForImageClassification(config)
        if level != "eager":
            ckpt_kernels.convert(self.model, recompute=level)

    def forward(self, pieces: Tensor, numbers: Tensor) -> Tensor:
        return F.cross_entropy(self.model(pixel_values=pieces).logits, numbers)


@functools.cache
def pictures() -> list[Tensor]:
    """The pictures, each (height, width), of mean 0 and deviation 1."""
    found = []
    for name in ("grace_hopper.jpg", "Minduka_Present_Blue_Pack.png"):
        with matplotlib.cbook.get_sample_data(name, asfileobj=True) as file:
            found.append(numpy.asarray(Image.open(file).convert("L")))
    found.append(matplotlib.cbook.get_sample_data("jacksboro_fault_dem.npz")["elevation"])
    found.append(matplotlib.cbook.get_sample_data("topobathy.npz")["topo"])
    wide = [torch.from_numpy(picture.astype(numpy.float32)) for picture in found]
    return [(picture - picture.mean()) / picture.std() for picture in wide]


def draw_batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    numbers = torch.randint(4, (BATCH,), generator=generator)
    pieces = []
    for number in numbers.tolist():
        picture = pictures()[number]
        top, left = (int(torch.randint(length - SIZE, (), generator=generator)) for length in picture.shape)
        piece = picture[top : top + SIZE, left : left + SIZE]
        # Noise makes the task take more than a few steps.
        pieces.append(piece - piece.mean() + torch.randn(SIZE, SIZE, generator=generator))
    return torch.stack(pieces).unsqueeze(1), numbers


if __name__ == "__main__":
    sys.exit(main(__doc__, WhichPicture, draw_batch, DEVICE, steps=200, learning_rate=1e-4))

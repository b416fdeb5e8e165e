"""Trains a diffusion UNet of diffusers: unconverted, checkpointed, converted, and planned for a memory budget.

    python examples/convert_unet.py --recompute checkpoint output 0.5

Needs diffusers. The model learns to find the noise in images of rectangles, which are generated during training.
"""

import sys

import torch
from diffusers import DDPMScheduler, UNet2DModel
from side_by_side import arrange, main
from torch import Tensor, nn
from train_unet import draw_batch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTHS = (128, 256, 256) if DEVICE == "cuda" else (16, 32, 32)
WAYS = ("checkpoint", "output", "0.7")


class Denoiser(nn.Module):
    """Takes images, noise and times from 0 to 1, and returns the loss of finding the noise."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.schedule = DDPMScheduler()
        self.model = UNet2DModel(
            in_channels=1, out_channels=1, block_out_channels=WIDTHS, norm_num_groups=8, layers_per_block=1,
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        ).to(DEVICE)  # fmt: skip
        images, noise, times = (tensor.to(DEVICE) for tensor in draw_batch(torch.Generator().manual_seed(0)))
        arrange(self.model, way, self.inputs(images, noise, times))

    def inputs(self, images: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        steps = (times * len(self.schedule)).long()
        return self.schedule.add_noise(images, noise, steps), steps

    def forward(self, images: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        return nn.functional.mse_loss(self.model(*self.inputs(images, noise, times)).sample, noise)


if __name__ == "__main__":
    sys.exit(main(__doc__, Denoiser, draw_batch, DEVICE, steps=30, ways=WAYS))

"""The strides of a hand-written norm's output: those of the input, or contiguous ones."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..code.snapshots import NotTriable


def keeps_transposed(compute: Callable[[Tensor], Tensor], sizes: tuple[int, ...]) -> bool:
    """Whether the output of transposed rows is transposed. Raises `NotTriable` for other strides."""
    return _keeps_strides(compute, torch.ones(sizes, device="cpu").transpose(0, 1))


def keeps_channels_last(compute: Callable[[Tensor], Tensor], sizes: tuple[int, ...]) -> bool:
    """Whether the output of a map whose channels are last has them last too. Raises `NotTriable` for other strides."""
    samples, channels, *space = sizes
    return _keeps_strides(compute, torch.ones((samples, *space, channels), device="cpu").movedim(-1, 1))


def _keeps_strides(compute: Callable[[Tensor], Tensor], input: Tensor) -> bool:
    output = compute(input)
    if not output.is_contiguous() and output.stride() != input.stride():
        raise NotTriable("returns strides that none of our norms returns")
    return not output.is_contiguous()

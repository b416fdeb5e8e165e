"""The memory layout of a channel norm's input and output: as planes, or channels last."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from ..backends import reference

# The number of pieces in which the rows of a channels-last tensor are summed: enough to keep every processor busy, few
# enough that adding up the pieces costs little. Fixed for a device, so that results do not depend on the number of
# threads.
_PIECES = {"cpu": 64}
_PIECES_ELSEWHERE = 512
_LEAST_ROWS = 64


class Maps(NamedTuple):
    """The layout of feature maps, (samples, channels, *space), in memory.

    As planes, (samples * channels, size), each channel of a sample is a row; channels last is (samples * size,
    channels).
    """

    planes: bool
    samples: int
    channels: int
    size: int
    piece_rows: int  # rows of a sample that are summed together; the whole plane if `planes`

    @property
    def sizes(self) -> tuple[bool, int, int]:
        """The sizes that kernels for a whole norm take."""
        return self.planes, self.samples, self.piece_rows

    def count(self, groups: int) -> int:
        """The number of elements that share statistics."""
        return self.size * (self.channels // groups if groups else self.samples)

    @property
    def pieces(self) -> int:
        """The number of pieces in which a channel of a sample is summed."""
        return 1 if self.planes else -(-self.size // self.piece_rows)

    def matrix(self, tensor: Tensor | None) -> Tensor | None:
        """The tensor as a contiguous matrix: a view if the tensor has this layout, else a copy."""
        if tensor is None:
            return None
        if self.planes:
            return tensor.contiguous().view(self.samples * self.channels, self.size)
        rows = self.samples * self.size
        if tensor.stride() == last_strides(tensor.shape):
            # One view instead of three, which matters for small inputs.
            return tensor.as_strided((rows, self.channels), (self.channels, 1))
        return tensor.movedim(1, -1).contiguous().view(rows, self.channels)

    def empty(self, like: Tensor) -> Tensor:
        """Allocates a result of this shape and layout.

        The result is no view: autograd accumulates gradients in place only if nothing else shares their memory.
        """
        strides = last_strides(like.shape)
        # If a channel has one element in each sample, both layouts are the same in memory, and only the strides tell
        # which is meant. To torch, tensors of three dimensions are never channels last.
        if self.planes or (like.is_contiguous() and (like.dim() == 3 or like.stride() != strides)):
            return torch.empty(like.shape, dtype=like.dtype, device=like.device)
        return torch.empty_strided(like.shape, strides, dtype=like.dtype, device=like.device)

    def statistics(self, count: int, like: Tensor) -> Tensor:
        """Allocates `count` numbers for each piece of each channel: (count, samples, pieces, channels)."""
        shape = (count, self.samples, self.pieces, self.channels)
        return torch.empty(shape, dtype=reference.compute_dtype(like.dtype), device=like.device)


def last_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a dense (samples, channels, *space) with channels last."""
    strides, step = [], shape[1]
    for size in reversed(shape[2:]):
        strides.append(step)
        step = step * size
    return (step, 1, *reversed(strides))


def maps_of(input: Tensor, groups: int) -> Maps:
    """The layout for the computation and the output: channels last if torch's memory format of the input is.

    A batch norm (no groups) treats all samples of a channels-last tensor as one.
    """
    last = (
        not input.is_contiguous()
        and input.dim() in (4, 5)
        # The first comparison is usually true, and cheaper.
        and (input.stride() == last_strides(input.shape) or suggest_memory_format(input) != torch.contiguous_format)
    )
    arguments = (tuple(input.shape), last, groups, input.device.type)
    try:
        return layout(*arguments)
    except TypeError:  # sizes are symbolic under torch.compile, and no cache can hold them
        return layout.__wrapped__(*arguments)


@functools.lru_cache(maxsize=1024)
def layout(shape: tuple[int, ...], last: bool, groups: int, device: str) -> Maps:
    """The layout for a shape, in channels_last or not."""
    samples, channels = shape[:2]
    size = math.prod(shape[2:])
    if not (last or len(shape) == 2 or size == 1):
        return Maps(True, samples, channels, size, size)
    if groups == 0:
        samples, size = 1, samples * size
    most = max(_PIECES.get(device, _PIECES_ELSEWHERE) // max(samples, 1), 1)
    least = min(max(-(-size // most), _LEAST_ROWS), max(size, 1))
    # Equal pieces, unless that makes them much larger: they merge in fewer steps.
    even = next((rows for rows in range(least, 2 * least) if size % rows == 0), least)
    return Maps(False, samples, channels, size, even)

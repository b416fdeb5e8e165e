"""The inputs on which norms are tried: their shapes, and such strides that an output may have them too."""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..code.snapshots import NotTriable
from .trial import Outline

# The numbers of dimensions of the inputs over whose rows norms are tried.
ROW_DIMENSIONS = (2, 3, 4, 5)
# The sizes of inputs, by turns, so that code that computes with the number of dimensions or with a size shows.
_SIZES = ((2, 3, 5, 4, 6), (3, 2, 4, 5, 2))
# Inputs over rows have so many elements at least: roundings are compared by the share of elements that differ.
_ELEMENTS = 4096


def input_shapes(outline: Outline, channels_first: bool, dimensions: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Two shapes or more for each row length, with these numbers of dimensions."""
    counts = dimensions if len(dimensions) > 1 else dimensions * 2
    sized = list(zip(counts, itertools.cycle(_SIZES), strict=False))
    make = _map_shape if channels_first else _row_shape
    return [make(columns, *each) for columns in _columns(outline) for each in sized]


def _map_shape(channels: int, count: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    batch, *space = sizes
    return batch, channels, *space[: count - 2]


def _row_shape(columns: int, count: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    lead = sizes[: count - 2]
    rows = -(-_ELEMENTS // (columns * math.prod(lead)))
    return *lead, max(sizes[0] + 2, rows), columns


def keeps_strides(compute: Callable[[Tensor], Tensor], sizes: tuple[int, ...], channels_first: bool) -> bool:
    """Whether the output of transposed rows, or of a map whose channels are last, has the strides of the input.

    Raises `NotTriable` for strides that are neither these nor contiguous.
    """
    if channels_first:
        samples, channels, *space = sizes
        input = torch.ones((samples, *space, channels), device="cpu").movedim(-1, 1)
    else:
        input = torch.ones(sizes, device="cpu").transpose(0, 1)
    output = compute(input)
    if not output.is_contiguous() and output.stride() != input.stride():
        raise NotTriable("returns strides that none of our norms returns")
    return not output.is_contiguous()


def spatial_dimensions(outline: Outline) -> int:
    """The number of spatial dimensions: those after the first of a weight such as (C, 1, 1), else two."""
    (columns, *_), shapes = _columns(outline), outline.parameters.values()
    return max((len(shape) - 1 - shape.index(columns) for shape in shapes), default=0) or 2


def _columns(outline: Outline) -> list[int]:
    """The row lengths to try: two for a norm without parameters and `normalized_shape`."""
    shapes = list(outline.parameters.values())
    shape = dict(outline.settings).get("normalized_shape")
    columns = [math.prod(shape) if isinstance(shape, tuple) else shape] if shape else [48, 77]
    return [shapes[0].numel()] if shapes else columns

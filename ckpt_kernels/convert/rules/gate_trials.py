"""Recognises gates of the two halves of a tensor, `act(min(gate, limit)) * (clamp(value, -limit, limit) + offset)`, by
a trial.

Values and gradients are compared with those of the gates that `packed_glu` computes, in float64, where different
formulas for the same gate agree, and then in every dtype.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import functional as F
from ...activations import NAMES
from ...backends import reference
from ...ops.glu import LAYOUTS, unpack
from .activation_trials import contains_function, sample_points
from .trial import GATES, InputRefused, count_apart, in_own_thread, recording_saved_tensors, result_of

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The numbers of columns and the leading sizes of the tensors in a trial.
_COLUMNS = (*range(2, 18, 2), 34)
_LEADS = ((), (3,), (2, 3), (2, 2, 3))
_LARGE = 1e30
# A function that casts to float32 rounds at most so often there.
_ROUNDED = 4 * torch.finfo(torch.float32).eps


class GateForm(NamedTuple):
    """The options of `packed_glu`."""

    activation: str
    layout: str
    limit: float | None
    offset: float

    def compute(self, packed: Tensor) -> Tensor:
        """The gate, by the fused function."""
        return F.packed_glu(packed, **self._asdict())

    def reference(self, packed: Tensor) -> Tensor:
        """The gate, by operations of torch."""
        limit = math.inf if self.limit is None else self.limit
        return reference.glu(*unpack(packed, self.layout), self.activation, limit, self.offset)

    def __str__(self) -> str:
        limit = "" if self.limit is None else f", limit {self.limit:g}"
        return f"{self.activation}{limit}{f', offset {self.offset:g}' if self.offset else ''}"


class GateTrial(NamedTuple):
    """A gate that a function computes: for tensors of so many `dims`, and for the dtypes in `keeps_input`, which has
    whether torch saves the input for backward."""

    form: GateForm
    dims: tuple[int, ...]
    keeps_input: dict[torch.dtype, bool]


Function = Callable[[Tensor], Tensor]


@in_own_thread
def gate_by_trial(function: Function, numbers: Collection[float]) -> GateTrial | None:
    """The gate that a function of one tensor computes; None if the function computes anything else.

    `numbers` are those that the code of the function names: limits and offsets are among them. Raises `NotTriable`.
    """

    def compute(packed: Tensor) -> Tensor:
        output = result_of(function, packed, GATES, of_parts=True)
        if output.dtype != packed.dtype or output.shape != (*packed.shape[:-1], packed.shape[-1] // 2):
            raise InputRefused("returns another kind of tensor than a gate")
        return output

    for form in _candidates(compute, numbers):
        packed = _packed(_pairs(form), form.layout)
        found = _compared(compute, form, packed)
        if found is None or not found.are_within(_ROUNDED, 4 * _ROUNDED):
            continue
        dims = tuple(len(lead) + 1 for lead in _LEADS if all(_has_form(compute, form, (*lead, n)) for n in _COLUMNS))
        keeps_input = {torch.float64: found.keeps_input} if found.are_within(1e-14, 1e-14) else {}
        near = packed[: len(_near(form)) ** 2 // 4]
        for dtype in _DTYPES:
            narrow = _compared(compute, form, near.to(dtype))
            bound = 16 * torch.finfo(dtype).eps
            if narrow is not None and narrow.are_within(bound, bound):
                keeps_input[dtype] = narrow.keeps_input
        return GateTrial(form, dims, keeps_input) if dims and keeps_input else None
    return None


def _candidates(compute: Function, numbers: Collection[float]) -> Iterator[GateForm]:
    """The gates that have the function's values at a few points."""
    limits = [abs(n) for n in numbers if n and math.isfinite(n)]
    offsets = [0.0, *(float(n) * sign for n in numbers if math.isfinite(n) for sign in (1, -1))]
    values = (0.0, 0.5, _LARGE, -_LARGE)
    points = torch.tensor([(1.0, v) for v in values], dtype=torch.float64, device="cpu")
    sample = torch.linspace(-2.9, 3.1, 14, dtype=torch.float64, device="cpu")
    for layout in LAYOUTS:
        at_0, at_half, at_large, at_minus_large = compute(_packed(points, layout)).flatten().tolist()
        slope = (at_half - at_0) * 2
        if not slope or not math.isfinite(slope):
            continue
        offset, limit = at_0 / slope, (at_large - at_minus_large) / (2 * slope)
        offset = min(offsets, key=lambda n: abs(n - offset))
        near = min(limits, key=lambda n: abs(n - limit), default=math.inf)
        is_limited = math.isclose(near, limit, rel_tol=1e-5)
        for activation in NAMES[1:]:
            form = GateForm(activation, layout, float(near) if is_limited else None, offset)
            packed = _packed(torch.cartesian_prod(sample, sample), layout)
            if torch.allclose(compute(packed), form.reference(packed), rtol=1e-6, atol=1e-6):
                yield form


def _packed(pairs: Tensor, layout: str) -> Tensor:
    """Rows of four gates and four values each, as the layout packs them."""
    gate, value = (part.reshape(-1, 4) for part in pairs.unbind(-1))
    if layout == "interleaved":
        return torch.stack((gate, value), -1).flatten(-2)
    return torch.cat((gate, value) if layout == "gate_first" else (value, gate), -1)


def _near(form: GateForm) -> Tensor:
    """Points near 0, without the kink there, and on both sides of the limits."""
    points = torch.linspace(-11.75, 12.25, 97, dtype=torch.float64, device="cpu")
    limit = form.limit or 7.0
    around = torch.tensor((-1.5 * limit, -limit, limit, 1.5 * limit), dtype=torch.float64, device="cpu")
    return torch.cat((points[points != 0], around))


def _pairs(form: GateForm) -> Tensor:
    """Pairs of gate and value: all pairs of points near 0, and points over the whole range of float32 with a few
    others."""
    near, far = _near(form), sample_points()
    far = far[len(far) % 4 :]
    pairs = [torch.cartesian_prod(near, near)]
    for other in (-1.5, 0.75):
        same = torch.full_like(far, other)
        pairs += [torch.stack((far, same), -1), torch.stack((same, far), -1)]
    return torch.cat(pairs)


class _Comparison(NamedTuple):
    """Results and gradients of a function beside the expected ones."""

    results: Sequence[Tensor]
    expected: Sequence[Tensor]
    keeps_input: bool

    def are_within(self, *bounds: float) -> bool:
        """Whether results and gradients agree but for these bounds. A gradient may differ where a gate is 0, at the
        kink of relu."""
        pairs = zip(self.results, self.expected, bounds, strict=True)
        of_results, of_gradients = (count_apart(*pair) for pair in pairs)
        return of_results == 0 and of_gradients <= 2


def _compared(compute: Function, form: GateForm, packed: Tensor) -> _Comparison | None:
    """The comparison with a gate in float64; None if the function refuses the tensor, or makes another kind of
    tensor."""
    input = packed.clone().requires_grad_()
    try:
        with recording_saved_tensors() as is_saved:
            output = compute(input)
    except InputRefused:
        return None
    if not output.requires_grad or not output.is_contiguous() or contains_function(output):
        return None
    wide = packed.double().requires_grad_()
    expected = form.reference(wide)
    (gradient,) = torch.autograd.grad(output.sum(), input)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), wide)
    return _Comparison((output.detach(), gradient), (expected.detach(), expected_gradient), is_saved(input))


def _has_form(compute: Function, form: GateForm, shape: tuple[int, ...]) -> bool:
    """Whether the function is the gate for a tensor of that shape."""
    generator = torch.Generator("cpu").manual_seed(0)
    packed = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    found = _compared(compute, form, packed)
    return found is not None and found.are_within(_ROUNDED, 4 * _ROUNDED)

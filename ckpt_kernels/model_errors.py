"""Errors of a model and of its converted copy against float64, and whether rounding explains them."""

from dataclasses import dataclass

import torch
from torch import Tensor

# The converted model's error may be this many times the model's own error, plus this many ulps. For a single tensor,
# whose error is less certain, the last factor applies.
_TIMES = 3
_ULPS = 32
_WORST = 64


@dataclass(frozen=True)
class Errors:
    """Relative errors of all outputs together, or of all gradients.

    Attributes:
        what: "outputs" or "gradients".
        eager: the norm of the model's error, divided by the norm of the float64 truth.
        converted: the same for the converted model.
        difference: the norm of the difference between the two, divided by the norm of the truth.
        worst: the tensor with the largest ratio of the converted model's error to the model's own error; "" if no
            element is finite, so that there is nothing to compare; "none has elements" if all tensors are empty.
        worst_ratio: that ratio.
    """

    what: str
    eager: float
    converted: float
    difference: float
    worst: str
    worst_ratio: float


def errors_of(
    what: str, prefix: str, truth: dict[str, Tensor], eager: dict[str, Tensor], ours: dict[str, Tensor]
) -> Errors:
    """The errors of the outputs or of the gradients, whose names start with `prefix`."""
    names = [name for name in truth if name.startswith(prefix) and name in eager and name in ours]
    if not any(truth[name].numel() for name in names):
        return Errors(what, 0.0, 0.0, 0.0, "none has elements", 1.0)
    # `_compared` has checked that the same elements are nan or infinite; they have no error.
    finite = {n: truth[n].isfinite() & eager[n].isfinite() & ours[n].isfinite() for n in names}
    if not any(mask.any() for mask in finite.values()):
        return Errors(what, 0.0, 0.0, 0.0, "", 1.0)
    truth, eager, ours = ({n: torch.where(finite[n], each[n], 0) for n in names} for each in (truth, eager, ours))
    total = float(sum(truth[name].norm() ** 2 for name in names)) ** 0.5 or 1.0

    def error(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
        return float(sum((left[n].double() - right[n].double()).norm() ** 2 for n in names)) ** 0.5 / total

    # Below an ulp of the largest tensor a ratio means nothing.
    floor = torch.finfo(eager[names[0]].dtype).eps * float(max(truth[name].norm() for name in names)) + 1e-300

    def ratio(name: str) -> float:
        own_error, eager_error = (float((x[name].double() - truth[name]).norm()) for x in (ours, eager))
        return (own_error + floor) / (eager_error + floor)

    worst = max(names, key=ratio)
    return Errors(what, error(eager, truth), error(ours, truth), error(ours, eager), worst, ratio(worst))


def lowest_precision(tensors: dict[str, Tensor]) -> float:
    """The epsilon of the dtype with the lowest precision."""
    return max(torch.finfo(tensor.dtype).eps for tensor in tensors.values())


def beyond_rounding(errors: Errors, eps: float) -> str:
    """A description of errors that the model's own errors and some ulps do not explain; "" if they do."""
    if not errors.worst:
        return f"{errors.what} are nowhere finite: there is nothing to compare"
    if errors.converted <= _TIMES * errors.eager + _ULPS * eps and errors.worst_ratio <= _WORST:
        return ""
    return (
        f"{errors.what} are other numbers: an error of {errors.converted:.1e}, where the model's own is "
        f"{errors.eager:.1e}; the worst, {errors.worst_ratio:.0f}x, in {errors.worst}"
    )

"""A model as it is against itself converted, at each level: what it computes, what it changes, what it keeps and takes.

Both run on copies; the model that is checked is not touched.
"""

import functools
import json
import pathlib
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import memory
from .convert import Report, convert, revert
from .model_copies import copy_of
from .model_state import different, state_of, types_in
from .model_steps import (
    call,
    draws_random_numbers,
    each_of,
    in_double,
    outputs_of,
    projection,
    reordered,
    seconds_of_step,
    step,
)
from .palette import color_of
from .target import Inputs

# Times that spread more than that from step to step are not worth comparing.
WIDE_SPREAD = 0.15

# How many times its own error a model's error may be when converted, and how many ulps beside; and how many times that
# of a single tensor, which is less sure.
_TIMES = 3
_ULPS = 32
_WORST = 64


@dataclass(frozen=True)
class Errors:
    """Relative errors of all outputs together, or of all gradients.

    Attributes:
        what: "outputs" or "gradients".
        eager: the norm of the model's error over that of the float64 truth.
        converted: the same of the converted model.
        difference: the norm of the difference between the two over that of the truth.
        worst: the tensor for which the converted model's error is the largest multiple of the model's own.
        worst_ratio: that multiple.
    """

    what: str
    eager: float
    converted: float
    difference: float
    worst: str
    worst_ratio: float


@dataclass(frozen=True)
class Check:
    """What `check` found at one level. Pairs are (as it is, converted).

    Attributes:
        report: what `convert` said.
        mode: "training" or "evaluation", in which the errors were taken.
        errors: of the outputs, and of the gradients.
        changed: what the converted model does that the model does not, other than rounding, numbers among it; [] is
            well.
        kept: bytes kept for backward.
        peak: bytes at the peak of a step.
        seconds: of a step.
        noise: how far steps spread in time: half of what lies between the quartiles over the median, of the one that
            spreads more; None of a single step of each, which cannot say.
    """

    report: Report
    mode: str
    errors: list[Errors]
    changed: list[str]
    kept: tuple[int, int]
    peak: tuple[int, int]
    seconds: tuple[float, float]
    noise: float | None

    def as_dict(self) -> dict[str, Any]:
        """All of it as data."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [str(self.report), "", f"errors against float64, in {self.mode} mode:"]
        rows: list[tuple[str, ...]] = [("", "as it is", "converted", "between them", "worst tensor")]
        rows += [
            (e.what, f"{e.eager:.2e}", f"{e.converted:.2e}", f"{e.difference:.2e}", f"{e.worst_ratio:.2f}x  {e.worst}")
            for e in self.errors
        ]
        lines += _columns(rows)
        lines += [
            "",
            "numbers but for rounding, types of outputs, buffers, attributes, random numbers: "
            + ("changed" if self.changed else "alike"),
        ]
        lines += [f"  {change}" for change in self.changed]
        lines += ["", "a step, forward and backward, in training mode:"]
        rows = [("", "as it is", "converted", "ratio")]
        for name, (before, after), unit, scale in (
            ("kept for backward", self.kept, "MiB", 2**20),
            ("peak", self.peak, "MiB", 2**20),
            ("time", self.seconds, "ms", 1e-3),
        ):
            ratio = f"{after / before:.2f}" if before else "-"
            rows.append((name, f"{before / scale:.2f} {unit}", f"{after / scale:.2f} {unit}", ratio))
        lines += _columns(rows)
        if self.noise is None:
            lines.append("  a single step of each: nothing says how far times spread, nor that they mean anything")
        elif self.noise > WIDE_SPREAD:
            lines.append(f"  too noisy for the times to mean anything: steps spread by {self.noise:.0%}")
        return "\n".join(lines)


def check(model: nn.Module, inputs: Inputs, *, recompute: str = "output", turns: int = 5) -> Check:
    """Runs copies of `model` on `inputs`, as it is and converted, and leaves the model as it was.

    Each runs twice, the second time on a batch with its samples in another order. Errors are those of the first,
    against a float64 copy, of the outputs and of the gradients of a random projection of them. Where the model draws
    random numbers in training mode they are taken in evaluation mode. Times are medians of `turns` steps each, taken in
    turn.

    Args:
        model: a module.
        inputs: what the model is called with, a tuple or a dict by name.
        recompute: the level at which the copy is converted.
        turns: how many steps of each are timed; of one nothing tells how noisy it is.

    Returns:
        A `Check`, which prints as a table.

    Raises:
        ValueError: no output has a gradient, the level is unknown, or the model is on meta.

    Example:
        >>> from ckpt_kernels.check import check
        >>> model = torch.nn.Sequential(torch.nn.LayerNorm(64), torch.nn.GELU(), torch.nn.Linear(64, 64))
        >>> found = check(model, (torch.randn(8, 64),), turns=1)
        >>> found.changed
        []
        >>> found.kept[1] < found.kept[0]
        True
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type == "meta":
        raise ValueError("the model is on meta, where nothing is computed; expected a device that computes")
    plain = copy_of(model).train()
    revert(plain)
    mode = "evaluation" if draws_random_numbers(copy_of(plain), inputs) else "training"
    plain.train(mode == "training")
    twin = copy_of(plain)
    before = state_of(twin)
    report = convert(twin, recompute=recompute)
    changed = [f"convert itself changed {name}" for name in different(before, state_of(twin))]
    truth = _results(copy_of(plain).double(), each_of(inputs, in_double))[0]
    runs, states = [], []
    for which in (plain, twin):
        found = [_alike(functools.partial(_results, which, batch)) for batch in (inputs, reordered(inputs))]
        runs.append([(*result, drawn) for result, drawn in found])
        states.append(state_of(which))
    for turn, (theirs, ours) in enumerate(zip(*runs, strict=True)):
        changed += [f"{what}, call {turn + 1}" for what in _compared(theirs, ours)]
    changed += [f"{name} is another afterwards" for name in different(*states)]
    kinds = (("outputs", "output"), ("gradients", "grad"))
    errors = [_errors(what, prefix, truth, runs[0][0][0], runs[1][0][0]) for what, prefix in kinds]
    changed += [told for found in errors if (told := _beyond_rounding(found, _eps(runs[0][0][0])))]
    plain.train(), twin.train()
    kept = _kept(plain, inputs), _kept(twin, inputs)
    peak = _peak(plain, inputs, device), _peak(twin, inputs, device)
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(turns):
        for index, timed in enumerate((plain, twin)):
            seconds[index].append(seconds_of_step(timed, inputs, device))
    medians = statistics.median(seconds[0]), statistics.median(seconds[1])
    noise = max(map(_spread, seconds)) if turns > 1 else None
    return Check(report, mode, errors, changed, kept, peak, medians, noise)


def _kept(model: nn.Module, inputs: Inputs) -> int:
    return memory.saved_bytes(lambda: outputs_of(call(model, inputs)))


def _peak(model: nn.Module, inputs: Inputs, device: torch.device) -> int:
    return memory.peak_bytes(lambda: step(model, inputs), device)


def _spread(times: Sequence[float]) -> float:
    low, middle, high = statistics.quantiles(times, n=4)
    return (high - low) / 2 / middle


# What a run does


def _results(model: nn.Module, inputs: Inputs) -> tuple[dict[str, Tensor], Any]:
    """Outputs and gradients by name, and the types of what the model returns."""
    value = call(model, inputs)
    loss = projection(outputs_of(value))
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    results = {f"output {i}": y.detach() for i, y in enumerate(outputs_of(value))}
    results |= {f"grad {name}": g for name, g in zip(named, found, strict=True) if g is not None}
    return results, types_in(value)


def _alike(run: Callable[[], Any]) -> tuple[Any, list[Any]]:
    """The result of a run, and the states of all random numbers after it, which begin alike for each."""
    numpy = sys.modules.get("numpy")
    with memory.random_numbers_kept():
        torch.manual_seed(0)
        random.seed(0)
        if numpy:
            numpy.random.seed(0)
        result = run()
        return result, [torch.get_rng_state().tolist(), random.getstate(), numpy and list(numpy.random.get_state()[1])]


def _compared(theirs: tuple, ours: tuple) -> Iterator[str]:
    (their_results, their_types, their_draws), (our_results, our_types, our_draws) = theirs, ours
    if their_types != our_types:
        yield f"returns {our_types}, not {their_types}"
    if their_results.keys() != our_results.keys():
        yield f"other tensors have gradients: {sorted(their_results.keys() ^ our_results.keys())}"
    if their_draws != our_draws:
        yield "random numbers are drawn otherwise"
    for name in their_results.keys() & our_results.keys():
        a, b = their_results[name], our_results[name]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            yield f"{name} is {b.dtype} {tuple(b.shape)}, not {a.dtype} {tuple(a.shape)}"
        elif not torch.equal(a.isfinite(), b.isfinite()):
            yield f"{name} is finite elsewhere"


def _errors(
    what: str, prefix: str, truth: dict[str, Tensor], eager: dict[str, Tensor], ours: dict[str, Tensor]
) -> Errors:
    names = [name for name in truth if name.startswith(prefix) and name in eager and name in ours]
    # Whether the same elements are nan or infinite has been asked; of these there is no error.
    finite = {n: truth[n].isfinite() & eager[n].isfinite() & ours[n].isfinite() for n in names}
    truth, eager, ours = ({n: torch.where(finite[n], each[n], 0) for n in names} for each in (truth, eager, ours))
    total = float(sum(truth[name].norm() ** 2 for name in names)) ** 0.5 or 1.0

    def error(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
        return float(sum((left[n].double() - right[n].double()).norm() ** 2 for n in names)) ** 0.5 / total

    # Below an ulp of the largest tensor a ratio says nothing.
    floor = torch.finfo(eager[names[0]].dtype).eps * float(max(truth[name].norm() for name in names)) + 1e-300

    def ratio(name: str) -> float:
        mine, usual = (float((x[name].double() - truth[name]).norm()) for x in (ours, eager))
        return (mine + floor) / (usual + floor)

    worst = max(names, key=ratio)
    return Errors(what, error(eager, truth), error(ours, truth), error(ours, eager), worst, ratio(worst))


def _eps(tensors: dict[str, Tensor]) -> float:
    """Of the dtype with the fewest digits."""
    return max(torch.finfo(tensor.dtype).eps for tensor in tensors.values())


def _beyond_rounding(found: Errors, eps: float) -> str:
    """In words, if errors are larger than those that the model makes itself, and than some ulps, explain."""
    if found.converted <= _TIMES * found.eager + _ULPS * eps and found.worst_ratio <= _WORST:
        return ""
    return (
        f"{found.what} are other numbers: an error of {found.converted:.1e}, where the model's own is "
        f"{found.eager:.1e}; the worst, {found.worst_ratio:.0f}x, in {found.worst}"
    )


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def to_json(checks: Mapping[str, Check], path: str | pathlib.Path) -> None:
    """Writes the checks, by level, as data."""
    pathlib.Path(path).write_text(json.dumps({level: found.as_dict() for level, found in checks.items()}, indent=1))


def draw(checks: Mapping[str, Check], path: str | pathlib.Path) -> None:
    """A PNG: what is kept, the peak and the time of a step, as fractions of the model's own. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = ("kept", "peak", "seconds")
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    width = 0.8 / len(checks)
    for index, (level, found) in enumerate(checks.items()):
        ratios = [pair[1] / pair[0] if pair[0] else 0.0 for pair in (getattr(found, name) for name in names)]
        places = [place + (index - (len(checks) - 1) / 2) * width for place in range(len(names))]
        bars = axis.bar(places, ratios, width * 0.92, label=f'"{level}"', color=color_of(f"ours, {level}"))
        axis.bar_label(bars, fmt="%.2f", fontsize=9, padding=2)
    axis.axhline(1.0, color="gray", linewidth=1)
    axis.set_xticks(range(len(names)), ("kept for backward", "peak of a step", "time of a step"))
    axis.set(ylabel="as a fraction of the model as it is", title="Converted, against the model as it is")
    axis.margins(y=0.15)
    axis.legend(title="recompute", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=110)
    plt.close(figure)

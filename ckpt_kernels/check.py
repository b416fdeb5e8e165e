"""Compares a model with its converted copy at each level: results, side effects, kept memory, peak and time.

Both run on copies; the model itself is not touched.
"""

import contextlib
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

from . import memory, random_draws
from .convert import Report, convert, revert
from .convert.report import in_columns
from .model_argument import check_model
from .model_copies import copy_of
from .model_errors import Errors, beyond_rounding, errors_of, lowest_precision
from .model_state import different, state_of, types_in
from .model_steps import (
    another_batch,
    call,
    draws_random_numbers,
    each_of,
    in_double,
    outputs_of,
    projection,
    seconds_of_step,
    step,
)
from .palette import color_of
from .target import Inputs

# If times spread more than this from step to step, a comparison says nothing.
WIDE_SPREAD = 0.15


@dataclass(frozen=True)
class Check:
    """The result of `check` at one level. Pairs are (original, converted).

    Attributes:
        report: the report of `convert`.
        mode: "training" or "evaluation", the mode in which the errors were measured.
        errors: those of the outputs, and those of the gradients.
        changed: differences in behavior between the two models, and errors beyond rounding; [] if there are none.
        kept: bytes kept for backward.
        peak: bytes at the peak of a step.
        seconds: the time of a step.
        noise: the spread of the times: half the interquartile range divided by the median, the larger of the two
            models'; None if one step of each was timed.
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
        """The result as data."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [str(self.report), "", f"errors against float64, in {self.mode} mode:"]
        rows: list[tuple[str, ...]] = [("", "as it is", "converted", "between them", "worst tensor")]
        rows += [
            (e.what, f"{e.eager:.2e}", f"{e.converted:.2e}", f"{e.difference:.2e}", f"{e.worst_ratio:.2f}x  {e.worst}")
            for e in self.errors
        ]
        lines += in_columns(rows)
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
        lines += in_columns(rows)
        if self.noise is None:
            lines.append("  a single step of each: nothing says how far times spread, nor that they mean anything")
        elif self.noise > WIDE_SPREAD:
            lines.append(f"  too noisy for the times to mean anything: steps spread by {self.noise:.0%}")
        return "\n".join(lines)


def check(model: nn.Module, inputs: Inputs, *, recompute: str = "output", turns: int = 5) -> Check:
    """Runs copies of `model` on `inputs`, one unchanged and one converted. The model itself stays unchanged.

    Each copy runs twice, the second time on a batch with the samples in another order, or with other values where that
    is the same batch (a batch of one sample). The numbers of both runs are compared with those of a float64 copy with
    the same random numbers: of the outputs, and of the gradients of a random projection of the outputs. The errors in
    the table are those of the first run. They are measured in evaluation mode if the model draws random numbers in
    training mode. Times are medians of `turns` steps of each copy, taken alternately.

    Args:
        model: a module.
        inputs: the inputs of the model, a tuple or a dict by name.
        recompute: the level at which the copy is converted.
        turns: the number of timed steps of each copy; the noise of a single step is unknown.

    Returns:
        A `Check`, which prints as a table.

    Raises:
        TypeError: `model` is no module, or is compiled already.
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
    check_model(model, "convert")
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
    batches = (inputs, another_batch(inputs))
    truths = _truths(plain, batches)
    runs, states = [], []
    for which in (plain, twin):
        results = [_from_same_seeds(functools.partial(_results, which, batch)) for batch in batches]
        runs.append([(*result, generators) for result, generators in results])
        states.append(state_of(which))
    for turn, (theirs, ours) in enumerate(zip(*runs, strict=True)):
        changed += [f"{what}, call {turn + 1}" for what in _compared(theirs, ours)]
    changed += [f"{name} is another afterwards" for name in different(*states)]
    kinds = (("outputs", "output"), ("gradients", "grad"))
    by_call = [
        [errors_of(what, prefix, truth, theirs[0], ours[0]) for what, prefix in kinds]
        for truth, theirs, ours in zip(truths, *runs, strict=True)
    ]
    eps = lowest_precision(runs[0][0][0])
    # Of the outputs and of the gradients, the first call in which they differ.
    for both in zip(*by_call, strict=True):
        messages = [
            f"{text}, call {turn}" for turn, error in enumerate(both, 1) if (text := beyond_rounding(error, eps))
        ]
        changed += messages[:1]
    plain.train(), twin.train()
    kept = _kept(plain, inputs), _kept(twin, inputs)
    peak = _peak(plain, inputs, device), _peak(twin, inputs, device)
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(turns):
        for index, timed in enumerate((plain, twin)):
            seconds[index].append(seconds_of_step(timed, inputs, device))
    medians = statistics.median(seconds[0]), statistics.median(seconds[1])
    noise = max(map(_spread, seconds)) if turns > 1 else None
    return Check(report, mode, by_call[0], changed, kept, peak, medians, noise)


def _kept(model: nn.Module, inputs: Inputs) -> int:
    return memory.saved_bytes(lambda: outputs_of(call(model, inputs)))


def _peak(model: nn.Module, inputs: Inputs, device: torch.device) -> int:
    return memory.peak_bytes(lambda: step(model, inputs), device)


def _spread(times: Sequence[float]) -> float:
    low, middle, high = statistics.quantiles(times, n=4)
    return (high - low) / 2 / middle


# Results and side effects of a run


def _results(model: nn.Module, inputs: Inputs) -> tuple[dict[str, Tensor], Any]:
    """Outputs and gradients by name, and the types in the model's result."""
    value = call(model, inputs)
    loss = projection(outputs_of(value))
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    results = {f"output {i}": y.detach() for i, y in enumerate(outputs_of(value))}
    results |= {f"grad {name}": g for name, g in zip(named, grads, strict=True) if g is not None}
    return results, types_in(value)


def _truths(model: nn.Module, batches: Sequence[Inputs]) -> list[dict[str, Tensor]]:
    """The results of a float64 copy for one batch after the other, with the random numbers that the model draws.

    Raises ValueError for a model that does not run in float64.
    """
    draws_any = draws_random_numbers(copy_of(model), batches[0])
    plain, exact = copy_of(model), copy_of(model).double()
    truths = []
    for batch in batches:
        draws: list[Tensor] = []
        if draws_any:
            with random_draws.recorded(draws):
                _from_same_seeds(functools.partial(_results, plain, batch))
        with random_draws.repeated(draws) if draws else contextlib.nullcontext():
            try:
                (results, _), _ = _from_same_seeds(functools.partial(_results, exact, each_of(batch, in_double)))
            except RuntimeError as error:
                raise ValueError(
                    f"model does not run in float64: {error}; expected a model that takes the dtype of its tensors "
                    "from parameters and inputs, because the results of a float64 copy count as the truth"
                ) from error
        truths.append(results)
    return truths


def _from_same_seeds(run: Callable[[], Any]) -> tuple[Any, list[Any]]:
    """The result of a run that starts from fixed random seeds, and the states of all generators afterwards."""
    numpy = sys.modules.get("numpy")
    with memory.random_numbers_kept():
        torch.manual_seed(0)
        random.seed(0)
        if numpy:
            numpy.random.seed(0)
        result = run()
        of_numpy = (
            [part.tolist() if hasattr(part, "tolist") else part for part in numpy.random.get_state()] if numpy else []
        )
        return result, [torch.get_rng_state().tolist(), random.getstate(), of_numpy]


def _compared(theirs: tuple, ours: tuple) -> Iterator[str]:
    """The differences between a run of the model and one of the converted model."""
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


def to_json(checks: Mapping[str, Check], path: str | pathlib.Path) -> None:
    """Writes the checks to a file as data, by level."""
    pathlib.Path(path).write_text(json.dumps({level: result.as_dict() for level, result in checks.items()}, indent=1))


def draw(checks: Mapping[str, Check], path: str | pathlib.Path) -> None:
    """Draws a PNG: kept bytes, peak and time of a step as fractions of the original model's. Needs matplotlib."""
    from matplotlib.figure import Figure

    names = ("kept", "peak", "seconds")
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(checks)
    for index, (level, result) in enumerate(checks.items()):
        ratios = [pair[1] / pair[0] if pair[0] else 0.0 for pair in (getattr(result, name) for name in names)]
        places = [place + (index - (len(checks) - 1) / 2) * width for place in range(len(names))]
        bars = axis.bar(places, ratios, width * 0.92, label=f'"{level}"', color=color_of(f"ours, {level}"))
        axis.bar_label(bars, fmt="%.2f", fontsize=9, padding=2)
    axis.axhline(1.0, color="gray", linewidth=1)
    axis.set_xticks(range(len(names)), ("kept for backward", "peak of a step", "time of a step"))
    axis.set(ylabel="as a fraction of the model as it is", title="Converted, against the model as it is")
    axis.margins(y=0.15)
    axis.legend(title="recompute", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=110)

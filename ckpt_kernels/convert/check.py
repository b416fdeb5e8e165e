"""A model as it is against itself converted: errors, what is kept, peak and time of a step."""

import copy
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import memory
from . import Report, convert, revert

Inputs = tuple[Any, ...] | Mapping[str, Any]


@dataclass(frozen=True)
class Errors:
    """Of all outputs together, or of all gradients: the norm of the error over that of the float64 truth, and the
    tensor for which the converted model's is the largest multiple of the model's own, with that multiple."""

    what: str
    eager: float
    converted: float
    difference: float
    worst: str
    worst_ratio: float


@dataclass(frozen=True)
class Check:
    """What `check` found. Pairs are (as it is, converted): bytes kept, bytes at the peak of a step, its seconds."""

    report: Report
    mode: str
    errors: list[Errors]
    kept: tuple[int, int]
    peak: tuple[int, int]
    seconds: tuple[float, float]

    def __str__(self) -> str:
        lines = [str(self.report), "", f"errors against float64, in {self.mode} mode:"]
        rows = [("", "as it is", "converted", "between them", "worst tensor")]
        rows += [
            (e.what, f"{e.eager:.2e}", f"{e.converted:.2e}", f"{e.difference:.2e}", f"{e.worst_ratio:.2f}x  {e.worst}")
            for e in self.errors
        ]
        lines += _columns(rows)
        lines += ["", "a step, forward and backward, in training mode:"]
        mib = 2**20
        rows = [("", "as it is", "converted", "ratio")]
        for name, (before, after), unit, scale in (
            ("kept for backward", self.kept, "MiB", mib),
            ("peak", self.peak, "MiB", mib),
            ("time", self.seconds, "ms", 1e-3),
        ):
            ratio = f"{after / before:.2f}" if before else "-"
            rows.append((name, f"{before / scale:.2f} {unit}", f"{after / scale:.2f} {unit}", ratio))
        return "\n".join(lines + _columns(rows))


def check(model: nn.Module, inputs: Inputs, *, recompute: str = "output", turns: int = 5) -> Check:
    """Runs `model` on `inputs` as it is and converted, and leaves it as it was, but for batch statistics.

    Errors are those against a float64 copy, of the outputs and of the gradients of a random projection of them. Where
    the model draws random numbers in training mode they are taken in evaluation mode. Times are medians of `turns`
    steps each, taken in turn.

    Raises ValueError if no output has a gradient.
    """
    state = {key: value.detach().clone() for key, value in model.state_dict().items()}
    training = {module: module.training for module in model.modules()}
    revert(model)
    model.train()
    mode = "evaluation" if _draws(model, inputs) else "training"
    try:
        model.train(mode == "training")
        truth = _results(copy.deepcopy(model).double(), _double(inputs))
        eager = _results(model, inputs)
        _restore(model, state)
        report = convert(model, recompute=recompute)
        ours = _results(model, inputs)
        model.train()
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        measures = []
        for converted in (False, True):
            convert(model, recompute=recompute) if converted else revert(model)
            kept = memory.saved_bytes(lambda: _outputs(_call(model, inputs)))
            measures.append((kept, memory.peak_bytes(lambda: _step(model, inputs), device)))
        seconds: tuple[list[float], list[float]] = ([], [])
        for turn in range(2 * turns):
            convert(model, recompute=recompute) if turn % 2 else revert(model)
            # The first after a change is not like the rest.
            _step(model, inputs)
            seconds[turn % 2].append(_timed(model, inputs, device))
    finally:
        revert(model)
        _restore(model, state)
        for module, was in training.items():
            module.training = was
    kinds = (("outputs", "output"), ("gradients", "grad"))
    errors = [_errors(what, prefix, truth, eager, ours) for what, prefix in kinds]
    medians = statistics.median(seconds[0]), statistics.median(seconds[1])
    return Check(report, mode, errors, *zip(*measures, strict=True), medians)


def _errors(
    what: str, prefix: str, truth: dict[str, Tensor], eager: dict[str, Tensor], ours: dict[str, Tensor]
) -> Errors:
    names = [name for name in truth if name.startswith(prefix)]
    total = sum(truth[name].norm() ** 2 for name in names) ** 0.5

    def error(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
        return float(sum((left[n].double() - right[n].double()).norm() ** 2 for n in names) ** 0.5 / total)

    # Below an ulp of the largest tensor a ratio says nothing.
    floor = torch.finfo(eager[names[0]].dtype).eps * float(max(truth[name].norm() for name in names))

    def ratio(name: str) -> float:
        mine, usual = (float((x[name].double() - truth[name]).norm()) for x in (ours, eager))
        return (mine + floor) / (usual + floor)

    worst = max(names, key=ratio)
    return Errors(what, error(eager, truth), error(ours, truth), error(ours, eager), worst, ratio(worst))


def _draws(model: nn.Module, inputs: Inputs) -> bool:
    """Whether a forward pass moves torch's random numbers on."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index or 0])
    before = [g.get_state() for g in generators]
    with torch.no_grad():
        _call(model, inputs)
    return any(not torch.equal(b, g.get_state()) for b, g in zip(before, generators, strict=True))


def _call(model: nn.Module, inputs: Inputs) -> Any:
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def _outputs(value: Any) -> list[Tensor]:
    outputs = [t for t in memory.tensors_in(value) if t.requires_grad]
    if not outputs:
        raise ValueError("the model's outputs have no gradient; expected a tensor that depends on its parameters")
    return outputs


def _projection(model: nn.Module, inputs: Inputs) -> tuple[list[Tensor], Tensor]:
    """Outputs, and the sum of them with random weights."""
    outputs = _outputs(_call(model, inputs))
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(y.shape, generator=generator, dtype=torch.float64) / y.numel() ** 0.5 for y in outputs]
    return outputs, sum((y * w.to(y)).sum() for y, w in zip(outputs, weights, strict=True))


def _results(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    outputs, loss = _projection(model, inputs)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    results = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    return results | {f"grad {name}": g for name, g in zip(named, found, strict=True) if g is not None}


def _step(model: nn.Module, inputs: Inputs) -> None:
    wanted = [p for p in model.parameters() if p.requires_grad]
    torch.autograd.grad(_projection(model, inputs)[1], wanted, allow_unused=True)


def _timed(model: nn.Module, inputs: Inputs, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    _step(model, inputs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _double(inputs: Inputs) -> Inputs:
    def wide(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    if isinstance(inputs, Mapping):
        return {key: wide(value) for key, value in inputs.items()}
    return tuple(map(wide, inputs))


def _restore(model: nn.Module, state: dict[str, Tensor]) -> None:
    """The model's parameters and buffers as they were."""
    with torch.no_grad():
        for key, value in model.state_dict().items():
            value.copy_(state[key])


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]

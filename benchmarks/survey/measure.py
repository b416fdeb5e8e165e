"""Measures one architecture, phase by phase, in a process that may die in any phase."""

from typing import Any

import torch
from torch import nn

import ckpt_kernels
from ckpt_kernels.levels import OF_MODELS

from . import state
from .entry import Entry
from .numbers import EPS, Reference
from .step import Step, Subject

LEVELS = OF_MODELS
# The model's own gradient checkpointing, enabled before or after the conversion.
CHECKPOINTED = ("checkpointed before", "checkpointed after")
PHASES = ("eager", *LEVELS, *CHECKPOINTED)

# Attributes that depend on activations may differ by this fraction of their norm.
_CLOSE = 1e-3
# The number of runs with weights changed by some ulps.
_SHAKEN = 2

Found = dict[str, Any]


class Measured:
    """An architecture, with the steps of the unconverted model, to which all other steps are compared."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.subject = Subject(entry)
        self.steps: list[Step] = []
        self.truths: list[Step] | None = None
        self.shaken: list[list[Step]] = []
        self.repeatable = True

    def phase(self, name: str) -> Found:
        """The figures of one phase. "eager" comes first."""
        if name == "eager":
            return self._eager()
        return self._checkpointed(name == CHECKPOINTED[0]) if name in CHECKPOINTED else self._level(name)

    def _eager(self) -> Found:
        subject = self.subject
        model = subject.model()
        initial = state.buffers(model)
        first = subject.step(model, 0)
        notes = []
        try:
            second = subject.step(model, 1)
        except Exception as error:
            notes.append(f"takes one shape only: {said(error)}")
            subject.in_one_shape()
            model = subject.model()
            first, second = subject.step(model, 0), subject.step(model, 1)
        # In the same order as for a converted model.
        state.restore(model, initial)
        kept = subject.kept(model)
        state.restore(model, initial)
        self.steps = [first, second, subject.step(model, 0)]
        again = subject.step(subject.model(), 0)
        unlike = _bits(first, again, ("attributes", "generators"))
        if unlike:
            self.repeatable = False
            notes.append(f"its numbers are not compared, as two equal runs differ: {unlike}")
        if self.entry.random:
            notes.append("its numbers are not compared, as it keeps its dropout, which is drawn otherwise")
        self.truths = self._truths(notes)
        self.shaken = [self._shaken(number) for number in range(_SHAKEN)]
        return {
            "class": type(model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "kept": kept,
            "notes": notes,
        }

    def _truths(self, notes: list[str]) -> list[Step] | None:
        try:
            model = self.subject.model(torch.float64)
            return [self.subject.step(model, batch) for batch in (0, 1)]
        except Exception as error:
            notes.append(f"does not run in float64: {said(error)}")
            return None

    def _shaken(self, number: int) -> list[Step]:
        """Steps of the model with each weight changed by up to four ulps."""
        model = self.subject.model()
        state.seed(100 + number)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.mul_(1 + 8 * EPS * (torch.rand_like(parameter) - 0.5))
        return [self.subject.step(model, batch) for batch in (0, 1)]

    def _reference(self, batch: int, what: str) -> Reference:
        """The reference for "outputs", "gradients" or "buffers"."""
        truth = getattr(self.truths[batch], what) if self.truths else None
        shaken = tuple(getattr(steps[batch], what) for steps in self.shaken)
        return Reference(getattr(self.steps[batch], what), truth, shaken)

    def _level(self, level: str) -> Found:
        subject = self.subject
        model = subject.model()
        initial = state.buffers(model)
        changed = _changed_by_converting(model, level)
        state.seed(0)
        report = ckpt_kernels.convert(model, recompute=level)
        bad: list[str] = []
        for batch in (0, 1):
            self._compare(subject.step(model, batch), batch, bad, changed)
        state.restore(model, initial)
        kept = subject.kept(model)
        ckpt_kernels.revert(model)
        return {
            "wrong": bad,
            "changed": list(dict.fromkeys(changed)),
            "reverted": self._reverted(model, initial),
            "kept": kept,
            "replaced": len(report.replaced),
            "left_alone": len(report.left_alone),
        }

    def _compare(self, ours: Step, batch: int, bad: list[str], changed: list[str]) -> None:
        """Adds wrong numbers to `bad`, and all other differences from the unconverted model to `changed`."""
        eager = self.steps[batch]
        which = ("first", "second")[batch]
        comparable = self.repeatable and not self.entry.random
        if comparable:
            for what in ("outputs", "gradients"):
                found = self._reference(batch, what).wrong(getattr(ours, what))
                bad += [f"{which} batch, {what}: {text}" for text in _few(found)]
            found = self._reference(batch, "buffers").wrong(ours.buffers)
            changed += [f"after the {which} batch, buffers: {text}" for text in _few(found)]
        for what in ("structure", "attributes", "generators"):
            if what == "structure" or comparable:
                difference = state.difference(getattr(eager, what), getattr(ours, what), _CLOSE)
                if difference:
                    changed.append(f"after the {which} batch, {what}: {difference}")

    def _reverted(self, model: nn.Module, initial: dict[str, torch.Tensor]) -> list[str]:
        """The differences that remain after the conversion is reverted."""
        state.restore(model, initial)
        ours, eager = self.subject.step(model, 0), self.steps[2]
        found = state.difference(eager.attributes, ours.attributes, _CLOSE) if self.repeatable else None
        # A model with state outside of buffers may carry the rounding of converted steps in that state.
        if self.repeatable and _bits(self.steps[0], eager) is None:
            found = found or _bits(eager, ours)
        return [found] if found else []

    def _checkpointed(self, before: bool) -> Found:
        subject = self.subject
        model = subject.model()
        if not checkpoint(model):
            return {"unsupported": "has no gradient checkpointing"}
        try:
            reference = subject.step(model, 0)
            eager = subject.kept(model)
        except Exception as error:
            return {"unsupported": f"its own gradient checkpointing raises: {said(error)}"}
        comparable = self.repeatable and not self._reference(0, "gradients").wrong(reference.gradients)
        model = subject.model()
        if before:
            checkpoint(model)
        ckpt_kernels.convert(model, recompute="output")
        if not before:
            checkpoint(model)
        ours = subject.step(model, 0)
        bad: list[str] = []
        if comparable:
            for what in ("outputs", "gradients"):
                found = self._reference(0, what).wrong(getattr(ours, what))
                bad += [f"{what}: {text}" for text in _few(found)]
        changed = state.difference(reference.structure, ours.structure)
        return {"wrong": bad, "changed": [changed] if changed else [], "kept": subject.kept(model), "eager": eager}


def _few(items: list[str]) -> list[str]:
    return items if len(items) <= 4 else [*items[:3], f"{len(items) - 3} more"]


def checkpoint(model: nn.Module) -> bool:
    """Enables the model's own gradient checkpointing. False if the model has none."""
    if getattr(model, "supports_gradient_checkpointing", False):
        model.gradient_checkpointing_enable()
    elif getattr(model, "_supports_gradient_checkpointing", False):
        model.enable_gradient_checkpointing()
    else:
        return False
    return True


def _changed_by_converting(model: nn.Module, level: str) -> list[str]:
    """The changes that converting makes without a step, and those that reverting does not undo."""
    tensors, attributes, classes = state.tensors(model), state.attributes(model, identity=True), state.classes(model)
    state.seed(3)
    generators = state.generators()
    ckpt_kernels.convert(model, recompute=level)
    found = [
        state.difference(tensors, state.tensors(model)),
        state.difference(attributes, state.attributes(model, identity=True)),
        state.difference(generators, state.generators()),
    ]
    changed = [f"by converting: {text}" for text in found if text]
    ckpt_kernels.revert(model)
    found = [
        state.difference(tensors, state.tensors(model)),
        state.difference(attributes, state.attributes(model, identity=True)),
        state.difference(classes, state.classes(model)),
    ]
    return changed + [f"after reverting at once: {text}" for text in found if text]


def _bits(left: Step, right: Step, also: tuple[str, ...] = ()) -> str | None:
    """The first difference between two steps, to the bit; None if there is none."""
    for what in ("structure", "outputs", "gradients", "buffers", *also):
        found = state.difference(getattr(left, what), getattr(right, what))
        if found:
            return f"{what}, {found}"
    return None


def said(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"

"""Builds models of an architecture, equal to the last bit, and runs one training step of such a model."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ckpt_kernels.memory import saved_bytes

from . import state
from .entry import FIRST, NARROW, SECOND, Entry, Shape


@dataclass
class Step:
    """The results of one step."""

    structure: Any
    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]
    attributes: dict[str, Any]
    generators: dict[str, Any]


def without_dropout(model: nn.Module) -> nn.Module:
    """The model with all dropout probabilities at 0, those in configurations too."""
    for module in model.modules():
        for holder in (module, getattr(module, "config", None)):
            for key, value in list(getattr(holder, "__dict__", {}).items()):
                dropout = "drop" in key or (key == "p" and isinstance(holder, nn.modules.dropout._DropoutNd))
                if dropout and isinstance(value, float):
                    setattr(holder, key, 0.0)
    return model


class Subject:
    """An architecture with two batches. The second has another shape, if the model accepts one."""

    def __init__(self, entry: Entry, width: int = NARROW, shapes: tuple[Shape, Shape] = (FIRST, SECOND)) -> None:
        self.entry = entry
        self.width = width
        self.shapes = shapes
        model = self.model()
        self.batches = [self._batch(model, shape, number) for number, shape in enumerate(shapes)]

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        state.seed(0)
        model = self.entry.model(self.width)
        return (model if self.entry.random else without_dropout(model)).to(dtype).train()

    def _batch(self, model: nn.Module, shape: Shape, number: int) -> dict[str, Any]:
        state.seed(1 + number)
        return self.entry.inputs(model, shape)

    def in_one_shape(self) -> None:
        """Gives the second batch the shape of the first, for a model that accepts no other."""
        self.batches[1] = self._batch(self.model(), self.shapes[0], 1)

    def inputs(self, model: nn.Module, batch: int) -> dict[str, Any]:
        """A copy of a batch, in the model's dtype."""
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        return {key: _copy(value, dtype, self.entry.differentiable) for key, value in self.batches[batch].items()}

    def step(self, model: nn.Module, batch: int) -> Step:
        """One pass forward, and one backward from a random projection of all outputs that have a gradient."""
        inputs = self.inputs(model, batch)
        model.zero_grad(set_to_none=True)
        state.seed(10 + batch)
        result = model(**inputs)
        structure = state.structure(result)
        outputs = dict(state.leaves(result))
        del result
        project(outputs.values(), batch).backward()
        gradients = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
        gradients |= {name: t.grad for name, t in inputs.items() if isinstance(t, Tensor) and t.grad is not None}
        model.zero_grad(set_to_none=True)
        return Step(
            structure,
            {name: t.detach().clone() for name, t in outputs.items()},
            gradients,
            state.buffers(model),
            state.attributes(model, identity=False),
            state.generators(),
        )

    def bare_step(self, model: nn.Module) -> None:
        """A step for timing, without results."""
        outputs = [
            t for _, t in state.leaves(model(**self.inputs(model, 0))) if t.requires_grad and t.is_floating_point()
        ]
        sum(t.sum() for t in outputs).backward()
        model.zero_grad(set_to_none=True)

    def kept(self, model: nn.Module) -> int:
        """The bytes that a forward pass on the first batch keeps for backward."""
        inputs = self.inputs(model, 0)
        state.seed(10)
        return saved_bytes(model, **inputs)


def project(outputs: Any, seed: int) -> Tensor:
    """The sum of all outputs that have a gradient, with random weights from a generator of its own."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for tensor in outputs:
        if tensor.requires_grad:
            weights = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            parts.append((tensor * weights.to(tensor.dtype)).sum())
    if not parts:
        raise ValueError("no output has a gradient")
    return sum(part.to(parts[0].dtype) for part in parts)


def _copy(value: Any, dtype: torch.dtype, differentiable: bool) -> Any:
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(_copy(item, dtype, differentiable) for item in value)
    if not isinstance(value, Tensor):
        return value
    if not value.is_floating_point():
        return value.clone()
    return value.to(dtype, copy=True).requires_grad_(differentiable)

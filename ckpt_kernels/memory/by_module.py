"""The memory report of a model: what each module keeps, and the peak of a forward and backward pass."""

import contextlib
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..nested_values import tensors_in
from ..recompute import discard_outputs
from . import table
from .peak import peak_bytes
from .saved import SavedTensor, saved_tensors


@dataclass(frozen=True)
class ModuleMemory:
    """Bytes that a module itself keeps.

    Attributes:
        name: of the module.
        kind: the name of its class.
        saved: bytes as the model is.
        discarding: bytes within `discard_outputs`, or converted.
    """

    name: str
    kind: str
    saved: int
    discarding: int


@dataclass(frozen=True)
class Report:
    """What a model's forward pass keeps, and the peak of a forward and backward pass; as data, as text, as a picture.

    Peaks are of what the passes make: activations, gradients, and what is in between.

    Attributes:
        saved: bytes that are kept.
        discarding: the same within `recompute.discard_outputs`, or of whatever was measured beside it.
        peak: the most bytes at one time.
        discarding_peak: the same within `recompute.discard_outputs`, or of whatever was measured beside it.
        modules: a `ModuleMemory` for each module that keeps something.
        tensors: a `SavedTensor` for each tensor that is kept.
        titles: what the two measurements are called.
    """

    saved: int
    discarding: int
    peak: int
    discarding_peak: int
    modules: list[ModuleMemory]
    tensors: list[SavedTensor]
    titles: tuple[str, str] = ("kept", "within discard_outputs")

    @property
    def is_alike(self) -> bool:
        """Whether every module keeps the same both times."""
        return all(module.saved == module.discarding for module in self.modules)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self, path: str | pathlib.Path) -> None:
        pathlib.Path(path).write_text(json.dumps(self.as_dict(), indent=1))

    def __str__(self) -> str:
        return self.table()

    def table(self, depth: int | None = None) -> str:
        """As text, with equal layers in one row; with a `depth`, by the modules of so many parts of a name."""
        return table.text(self, depth)

    def draw(self, path: str | pathlib.Path, depth: int | None = None, most: int = 15) -> None:
        """A PNG: bars for the rows of the table that keep most. Needs matplotlib."""
        table.draw(self, path, depth, most)


class _Measured(NamedTuple):
    tensors: list[SavedTensor]
    peak: int

    @property
    def saved(self) -> int:
        return sum(tensor.counted for tensor in self.tensors)

    def by(self, module: str) -> int:
        return sum(tensor.counted for tensor in self.tensors if tensor.module == module)


def report(model: nn.Module, *inputs: Any, **kwargs: Any) -> Report:
    """What `model(*inputs, **kwargs)` keeps for backward, by module and by tensor, as it is and discarding outputs.

    A tensor is booked on the innermost module within whose forward pass it is kept first. Runs four forward passes and
    two backward passes, from the sum of all outputs; gradients that the parameters have are left as they are, but
    batch statistics and random numbers move on.

    Args:
        model: a module.
        inputs, kwargs: what the model is called with.

    Returns:
        A `Report`, which prints as a table.

    Example:
        >>> model = torch.nn.Sequential(ckpt_kernels.nn.LayerNorm(64, activation="gelu"), torch.nn.Linear(64, 64))
        >>> report = ckpt_kernels.memory.report(model, torch.randn(8, 64))
        >>> report.saved - report.discarding == 8 * 64 * 4  # the block's output
        True
        >>> [(module.name, module.saved, module.discarding) for module in report.modules]
        [('0', 2112, 2112), ('1', 2048, 0)]
    """
    plain = _measured(model, inputs, kwargs)
    with _replaced_forward(model, discard_outputs()(model.forward)):
        discarding = _measured(model, inputs, kwargs)
    return _reported(model, plain, discarding)


def report_beside(
    model: nn.Module, other: nn.Module, titles: tuple[str, str], inputs: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Report:
    """The same of two models with the same names of modules, such as one that `convert` made of the other.

    Args:
        model: a module.
        other: another, whose modules have the same names.
        titles: what the two are called in the report.
        inputs: a tuple, what both are called with.
        kwargs: a mapping, by name.

    Returns:
        A `Report`, where `saved` and `peak` are of `model`, `discarding` and `discarding_peak` of `other`.

    Example:
        >>> import copy
        >>> model = torch.nn.Sequential(torch.nn.LayerNorm(64), torch.nn.GELU(), torch.nn.Linear(64, 64))
        >>> converted = copy.deepcopy(model)
        >>> _ = ckpt_kernels.convert(converted)
        >>> x = torch.randn(8, 64)
        >>> report = ckpt_kernels.memory.report_beside(model, converted, ("as it is", "converted"), (x,), {})
        >>> report.discarding < report.saved
        True
    """
    measured = [_measured(each, inputs, kwargs) for each in (model, other)]
    return _reported(model, *measured, titles=titles)


def _reported(model: nn.Module, first: _Measured, second: _Measured, **titles: Any) -> Report:
    modules = [
        ModuleMemory(name, type(module).__name__, first.by(name), second.by(name))
        for name, module in model.named_modules()
    ]
    kept = [module for module in modules if module.saved or module.discarding]
    return Report(first.saved, second.saved, first.peak, second.peak, kept, first.tensors, **titles)


def _measured(model: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Measured:
    wanted: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    wanted += [t for t in tensors_in((inputs, kwargs)) if t.requires_grad]
    device = next((t.device for t in (*model.parameters(), *tensors_in((inputs, kwargs)))), torch.device("cpu"))

    def step() -> None:
        outputs = [t for t in tensors_in(model(*inputs, **kwargs)) if t.requires_grad]
        if outputs and wanted:
            total: Any = sum(t.float().sum() for t in outputs)
            torch.autograd.grad(total, wanted, allow_unused=True)

    return _Measured(saved_tensors(model, *inputs, **kwargs), peak_bytes(step, device))


@contextlib.contextmanager
def _replaced_forward(model: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = model.__dict__.get("forward")
    model.forward = forward
    try:
        yield
    finally:
        if before is None:
            del model.forward
        else:
            model.forward = before

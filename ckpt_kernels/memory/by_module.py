"""The memory report of a model: the bytes that each module keeps, and the peak of a forward and backward pass."""

import contextlib
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..arguments import size
from ..nested_values import tensors_in
from ..recompute import discard_outputs
from . import table
from .peak import peak_bytes
from .saved import SavedTensor, saved_tensors


@dataclass(frozen=True)
class ModuleMemory:
    """The bytes that a module keeps itself.

    Attributes:
        name: the name of the module.
        kind: the name of the module's class.
        saved: bytes of the unchanged model.
        discarding: bytes within `discard_outputs`, or of the converted model.
    """

    name: str
    kind: str
    saved: int
    discarding: int


@dataclass(frozen=True)
class Report:
    """The bytes that a model's forward pass keeps, and the peak of a forward and backward pass; as data, text or
    picture.

    Peaks count tensors that the passes create: activations, gradients and temporaries.

    Attributes:
        saved: bytes that are kept.
        discarding: the same within `recompute.discard_outputs`, or of the other model.
        peak: the most bytes at one time.
        discarding_peak: the same within `recompute.discard_outputs`, or of the other model.
        modules: a `ModuleMemory` for each module that keeps tensors.
        tensors: a `SavedTensor` for each tensor that is kept.
        titles: the names of the two measurements.
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
        """The report as text, with equal layers in one row. With `depth`, modules are merged by that many parts of
        their names."""
        return table.text(self, _checked_depth(depth))

    def draw(self, path: str | pathlib.Path, depth: int | None = None, most: int = 15) -> None:
        """Draws a PNG with bars for the `most` rows of the table that keep most. Needs matplotlib."""
        table.draw(self, path, _checked_depth(depth), size(most, "most"))


class _Measured(NamedTuple):
    tensors: list[SavedTensor]
    peak: int

    @property
    def saved(self) -> int:
        return sum(tensor.counted for tensor in self.tensors)

    def by(self, module: str) -> int:
        return sum(tensor.counted for tensor in self.tensors if tensor.module == module)


def report(model: nn.Module, /, *inputs: Any, **kwargs: Any) -> Report:
    """The bytes that `model(*inputs, **kwargs)` keeps for backward, by module and by tensor, also with outputs
    discarded.

    A tensor counts for the innermost module whose forward pass keeps the tensor first. The report runs four forward
    passes and two backward passes, from the sum of all outputs. Gradients of the parameters stay as they are, but batch
    statistics and random number generators advance.

    Args:
        model: a module.
        inputs, kwargs: the arguments of the model.

    Returns:
        A `Report`, which prints as a table.

    Raises:
        TypeError: `model` is no module.
        ValueError: the model is on a device whose peak is not measured, such as meta. `saved_tensors` measures there.

    Example:
        >>> model = torch.nn.Sequential(ckpt_kernels.nn.LayerNorm(64, activation="gelu"), torch.nn.Linear(64, 64))
        >>> report = ckpt_kernels.memory.report(model, torch.randn(8, 64))
        >>> report.saved - report.discarding == 8 * 64 * 4  # the block's output
        True
        >>> [(module.name, module.saved, module.discarding) for module in report.modules]
        [('0', 2112, 2112), ('1', 2048, 0)]
    """
    _check(model, "model")
    plain = _measured(model, inputs, kwargs)
    with _replaced_forward(model, discard_outputs()(model.forward)):
        discarding = _measured(model, inputs, kwargs)
    return _reported(model, plain, discarding)


def report_beside(
    model: nn.Module, other: nn.Module, titles: tuple[str, str], inputs: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Report:
    """The same report for two models with the same module names, such as a model and its converted copy.

    Args:
        model: a module.
        other: another module, whose submodules have the same names.
        titles: the names of the two in the report.
        inputs: the positional arguments of both, a tuple.
        kwargs: the keyword arguments of both, a mapping.

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
    _check(model, "model")
    _check(other, "other")
    measured = [_measured(each, inputs, kwargs) for each in (model, other)]
    return _reported(model, *measured, titles=titles)


def _check(model: nn.Module, argument: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{argument} is {type(model).__name__}; expected a torch.nn.Module")


def _checked_depth(depth: int | None) -> int | None:
    return None if depth is None else size(depth, "depth")


def _reported(model: nn.Module, first: _Measured, second: _Measured, **titles: Any) -> Report:
    modules = [
        ModuleMemory(name, type(module).__name__, first.by(name), second.by(name))
        for name, module in model.named_modules()
    ]
    kept = [module for module in modules if module.saved or module.discarding]
    return Report(first.saved, second.saved, first.peak, second.peak, kept, first.tensors, **titles)


def _measured(model: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Measured:
    tensors = (*model.parameters(), *tensors_in((inputs, kwargs)))
    wanted: list[Tensor] = [t for t in tensors if t.requires_grad]
    # A fake tensor names a device, and has no memory there.
    is_fake = any(isinstance(t, FakeTensor) for t in tensors)
    device = torch.device("meta") if is_fake else next((t.device for t in tensors), torch.device("cpu"))

    def step() -> None:
        outputs = [t for t in tensors_in(model(*inputs, **kwargs)) if t.requires_grad]
        if outputs and wanted:
            total: Any = sum((t.abs() if t.is_complex() else t.float()).sum() for t in outputs)
            torch.autograd.grad(total, wanted, allow_unused=True)

    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"model is on {device}; expected the CPU or a CUDA device, whose peak is measured")
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

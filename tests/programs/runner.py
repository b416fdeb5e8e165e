"""Runs a program: a model and a converted twin of the same seed take the same steps, and are compared after each."""

import contextlib
import importlib.util
import itertools
import random
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import set_checkpoint_early_stop

import ckpt_kernels

from .actions import Step
from .comparer import OFF_BY, Tolerance, differences, snapshot
from .grammar import Program

Convert = Callable[..., Any]

_numbers = itertools.count()
# The snapshots that are taken before the backward pass.
_OF_FORWARD = ("output", "arguments", "tensors that are the same", "tensors that share memory", "generators")
_GLOBALS = ("CONFIG", "STATE", "LOG", "TOTAL")


@dataclass
class Result:
    """The result of a program: the differences of the first `step` with any, and errors of eager torch."""

    program: Program
    level: str
    replaced: int = 0
    raised: list[str] = field(default_factory=list)
    step: str = ""
    differences: list[str] = field(default_factory=list)
    lenient: bool = False

    def __str__(self) -> str:
        differences = "\n".join(f"  {line}" for line in self.differences[:12])
        return (
            f"seed {self.program.seed}, level {self.level}, after: {self.step or 'all steps'}\n"
            f"{differences or '  the same'}\n"
            f"python -m tests.programs --seed {self.program.seed} --level {self.level}\n\n{self.program}"
        )


def run(program: Program, level: str, folder: Path, convert: Convert = ckpt_kernels.convert) -> Result:
    """Runs both twins until they differ. The source is written to a file in `folder` and imported from there.

    Where large values cancel, twins may differ by no more than rounding: a program passes too if they agree closely in
    float64, which autocast leaves as it is, and coarsely otherwise.
    """
    # With early stop, a checkpoint recomputes up to the last saved tensor. A fused call saves its last tensor earlier
    # than eager torch, so later side effects would happen once for one twin and twice for the other.
    with _one_thread(), set_checkpoint_early_stop(False):
        result = _run(program, level, folder, convert)
        if result.differences and all(OFF_BY in line for line in result.differences):
            coarse = _run(program, level, folder, convert, cancels=True)
            with _float64():
                wide = _run(program, level, folder, convert)
            result = result if coarse.differences or wide.differences else coarse
        return result


def _run(program: Program, level: str, folder: Path, convert: Convert, cancels: bool = False) -> Result:
    path = folder / f"program_{program.seed}_{next(_numbers)}.py"
    text = program.text
    if torch.get_default_dtype() == torch.float64:
        text = text.replace(".float()", ".double()").replace("torch.float32", "torch.float64")
    path.write_text(text)
    result = Result(program, level)
    eager, other = _Twin(program, path), _Twin(program, path)
    try:
        _seed_all(1)
        before = _generators()
        try:
            result.replaced = len(convert(other.model, recompute=level).replaced)
        except Exception as error:
            result.differences.append(f"convert: raised {type(error).__name__}: {error}")
        result.differences += differences(before, _generators(), Tolerance(False), "generators after convert")
        for index, step in enumerate(program.steps):
            if result.differences:
                break
            one = {} if step.twin else eager.take(step, index, convert)
            two = other.take(step, index, convert)
            result.step = str(step)
            if step.twin:
                result.differences += [f"convert: raised {two['raised']}"] if two["raised"] else []
                continue
            if one["raised"]:
                result.raised.append(one["raised"])
            is_lenient = one["raised"].startswith("backward") and not two["raised"]
            found = _compared(one, two, program, cancels)
            if not is_lenient:
                result.differences += itertools.chain(*found.values())
                continue
            # A fused call keeps fewer tensors than eager torch, so a write may be no error, and the gradient is right.
            result.lenient = True
            result.differences += itertools.chain(*(found.get(name, ()) for name in _OF_FORWARD))
            if found.keys() - {"raised"}:  # states differ where the backward pass ended early in one twin
                break
            other.model.zero_grad(set_to_none=True)
    finally:
        eager.close()
        other.close()
    return result


def _compared(one: dict[str, Any], two: dict[str, Any], program: Program, cancels: bool) -> dict[str, list[str]]:
    """All differences between the snapshots of the twins after a step, by the name of the snapshot."""
    found = {}
    scale = max([1.0, *(g.value.abs().max().item() for g in one["gradients"].values() if g and g.value.numel())])
    for name, value in one.items():
        # Hooks log gradients in the globals.
        backward = name in ("gradients", "globals")
        coarse = program.coarse or cancels
        tolerance = Tolerance(coarse, scale if backward else 1.0, backward, cancels and program.coarse)
        if name != "gradients" or not one["raised"]:
            found[name] = list(differences(snapshot(value), snapshot(two[name]), tolerance, name))
    return {name: lines for name, lines in found.items() if lines}


class _Twin:
    """A model in a Python module of its own, and snapshots of its state."""

    def __init__(self, program: Program, path: Path) -> None:
        self.shape = program.shape
        self.name = f"{path.stem}_{next(_numbers)}"
        spec = importlib.util.spec_from_file_location(self.name, path)
        self.module = importlib.util.module_from_spec(spec)
        sys.modules[self.name] = self.module
        spec.loader.exec_module(self.module)
        _seed_all(0)
        self.module.model = self.module.Model()

    @property
    def model(self) -> nn.Module:
        return self.module.model

    def close(self) -> None:
        del sys.modules[self.name]

    def take(self, step: Step, index: int, convert: Convert) -> dict[str, Any]:
        """Takes one step and returns the snapshots afterwards."""
        arguments, leaves = self._arguments(step, index)
        around = self.module.__dict__
        around.update(SAMPLE=arguments["x"].detach(), convert=convert, revert=ckpt_kernels.revert)
        raised, output = "", None
        _seed_all(2 + index)
        try:
            if step.rows:
                with torch.set_grad_enabled(step.gradients), torch.autocast("cpu", torch.bfloat16, step.autocast):
                    output = eval(step.text, around, dict(arguments))
            else:
                exec(step.text, around)
        except Exception as error:
            raised = f"forward {type(error).__name__}"
        forward = self._generators_and(output, arguments)
        if step.gradients and not raised:
            try:
                _backward(output, index)
            except Exception as error:
                raised = f"backward {type(error).__name__}"
        shown = {"raised": raised, **forward, **self._shown(leaves)}
        if raised:
            self.model.zero_grad(set_to_none=True)
        return shown

    def _arguments(self, step: Step, index: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The arguments x and y of this step, and the leaves that they are made from."""
        generator = torch.Generator().manual_seed(index)
        dtype = next((p.dtype for p in self.model.parameters()), torch.float32)
        leaves = {
            name: torch.randn(step.rows or 2, *self.shape, generator=generator).to(dtype).requires_grad_(step.wanted)
            for name in ("x", "y")
        }
        kind = self.module.Tagged if step.tagged else Tensor
        return {
            name: leaf if step.leaf and name == "x" else leaf.clone().as_subclass(kind) for name, leaf in leaves.items()
        }, leaves

    def _generators_and(self, output: Any, arguments: dict[str, Tensor]) -> dict[str, Any]:
        """Snapshots of the output, the arguments, identities and shared memory of tensors, and the generators."""
        tensors = [*arguments.values(), *_tensors(output)]
        firsts = [next(i for i, b in enumerate(tensors) if b is a) for a in tensors]
        memory = [t.untyped_storage().data_ptr() for t in tensors]
        return {
            "output": snapshot(output),
            "arguments": snapshot(arguments),
            "tensors that are the same": firsts,
            "tensors that share memory": [memory.index(pointer) for pointer in memory],
            "generators": _generators(),
        }

    def _shown(self, leaves: dict[str, Tensor]) -> dict[str, Any]:
        """Snapshots of the model, the Python module and the generators."""
        sources = {**dict(self.model.named_parameters()), **leaves}
        modules = dict(self.model.named_modules())
        return {
            "gradients": {name: snapshot(t.grad) for name, t in sources.items()},
            "parameters": dict(self.model.named_parameters()),
            "buffers": dict(self.model.named_buffers()),
            "classes": {
                name: f"{type(m).__module__.replace(self.name, '')}.{type(m).__name__}" for name, m in modules.items()
            },
            "attributes": {name: dict(_attributes(m)) for name, m in modules.items()},
            "globals": {name: vars(self.module)[name] for name in _GLOBALS},
            "class attributes": self.module.Swish.calls,
            "generators after backward": _generators(),
        }


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The attributes of a module without those that `convert` adds; for hooks only their number."""
    for name, value in vars(module).items():
        if name.startswith("_ckpt") or name in ("_parameters", "_buffers"):
            continue
        counted = name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) and isinstance(value, dict)
        yield name, len(value) if counted else value


def _backward(output: Any, index: int) -> None:
    """Runs the backward pass of a random projection of all outputs."""
    generator = torch.Generator().manual_seed(1000 + index)
    loss = torch.zeros(())
    for tensor in _tensors(output):
        if tensor.requires_grad:
            loss = loss + (tensor * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)).sum()
    if loss.requires_grad:
        loss.backward()


def _tensors(value: Any) -> list[Tensor]:
    """All tensors within an output."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, types.GeneratorType | str) or value is None:
        return []
    held = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    held = vars(value).values() if not held and hasattr(value, "others") else held
    return [tensor for item in held for tensor in _tensors(item)]


@contextlib.contextmanager
def _float64() -> Iterator[None]:
    """Makes float64 the dtype of new models and tensors."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Limits torch to one thread, which is faster for tensors of a few numbers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)


def _generators() -> Any:
    """Hashes of the generators' states."""
    state = numpy.random.get_state()
    return snapshot(
        [hash(torch.get_rng_state().numpy().tobytes()), hash(random.getstate()), hash(state[1].tobytes()), state[2]]
    )

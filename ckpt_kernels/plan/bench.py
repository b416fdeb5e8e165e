"""Runs training steps of the user's model and batch on copies of the model, called twins.

A twin shares the parameters' memory with the model and nothing else, but for parameters that the model's forward writes
to. So the model, its gradients and the random number generators do not change. Gradients are allocated before a step,
as under gradient accumulation, and therefore do not count as bytes of the step.
"""

import contextlib
import functools
import random
import types
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..convert import convert, revert
from ..convert.layers import layers_of
from ..convert.module_tree import check_initialized, named_modules
from ..convert.swap import add_forward_context
from ..levels import NONE, OF_MODULES, WITHIN_CHECKPOINT, Policy
from ..memory import random_numbers_kept
from ..model_copies import copy_sharing_parameters, deep_copied
from ..nested_values import tensors_in
from ..offload import SIMULATED
from ..runs import Place, is_sharded
from .marks import Point, Recorder, marking, peak_of
from .written_parameters import parameters_written_by

Loss = Callable[[Any], Tensor]
EAGER = "eager"


@dataclass(frozen=True)
class StepCost:
    """The measured cost of a whole step: the peak in bytes, and seconds."""

    peak: int
    seconds: float


# Checkpoints in which layers are as they are; only timed steps have these choices. At the second, each layer has a
# checkpoint of its own. The difference of the two is the cost that a checkpoint adds once.
PLAIN_CHECKPOINT = "checkpoint of none"
LONE_CHECKPOINT = "checkpoint of none and of one layer"
_PLAIN = (PLAIN_CHECKPOINT, LONE_CHECKPOINT)


class ChoiceByLayer:
    """A choice for each layer, in the form that `convert` accepts.

    Args:
        choices: the choice of each layer, in the order of the calls.
        longest: the largest number of adjacent layers of equal choice that share a checkpoint.
    """

    def __init__(self, choices: Mapping[str, str], longest: int = 1) -> None:
        self.choices = choices
        self.longest = longest

    def runs(self) -> Iterator[list[str]]:
        """Yield the layers of each checkpoint."""
        run: list[str] = []
        for name, choice in self.choices.items():
            longest = 1 if choice == LONE_CHECKPOINT else self.longest
            if run and (len(run) == longest or choice != self.choices[run[0]]):
                yield run
                run = []
            if is_checkpoint(choice):
                run.append(name)
        if run:
            yield run

    def levels_in(self, model: nn.Module) -> Mapping[str, tuple[str, tuple[Place, ...]]]:
        places: dict[str, tuple[Place, ...]] = dict.fromkeys(self.choices, ())
        for key, run in enumerate(self.runs()):
            for number, name in enumerate(run):
                places[name] = (Place(key, number, number == len(run) - 1),)
        return {name: (level_inside(choice), places[name]) for name, choice in self.choices.items()}


def is_checkpoint(choice: str) -> bool:
    return choice in _PLAIN or Policy.of(choice, OF_MODULES, "choice").is_checkpoint


def level_inside(choice: str) -> str:
    """Return the level of the layers within a checkpoint; any other choice is returned as it is."""
    return NONE if choice in _PLAIN else str(Policy.of(choice, OF_MODULES, "choice").inside())


class RunsOfLayers:
    """All layers, in the order of their calls, in checkpoints of `LENGTH` each, in the form that `convert` accepts."""

    LENGTH = 4

    def __init__(self, order: Sequence[str]) -> None:
        self._order = order

    def levels_in(self, model: nn.Module) -> Mapping[str, tuple[str, tuple[Place, ...]]]:
        last = len(self._order) - 1
        return {
            name: (
                WITHIN_CHECKPOINT,
                (Place(i // self.LENGTH, i % self.LENGTH, i == last or (i + 1) % self.LENGTH == 0),),
            )
            for i, name in enumerate(self._order)
        }


class Bench:
    """Runs steps of twins of a model.

    Args:
        model: a module.
        args, kwargs: the model's arguments.
        loss: computes the loss from the model's output; None is the output's `loss`, or the sum of all its tensors.
        progress: called with a line before each step.

    Attributes:
        input_shape: the shape of the first tensor among the arguments.
        count: how many steps were run.
        names: the names of the model's layers.
        device: the device of the model's parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        args: tuple,
        kwargs: dict[str, Any],
        loss: Loss | None,
        progress: Callable[[str], None],
    ) -> None:
        _check_can_be_copied(model)
        self.model = model
        self._inputs = args, kwargs
        self._loss = loss or default_loss
        self._progress = progress
        self._gradients: dict[int, Tensor] = {}
        self.input_shape = first_shape(args, kwargs)
        self.count = 0
        converted = copy_sharing_parameters(model)
        convert(converted, recompute="block")
        self.names = list(layers_of(converted))
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        if len({p.device for p in model.parameters()}) > 1:
            raise ValueError("the model is on several devices; expected one")
        self._written = self._parameters_written()

    def _parameters_written(self) -> list[nn.Parameter]:
        """Find the parameters that the model's forward writes to."""
        twin = copy_sharing_parameters(self.model)
        revert(twin)
        with self._measuring() as (args, kwargs):
            written = parameters_written_by(lambda: twin(*args, **kwargs), twin.parameters())
        shared = {id(alias): own for alias, own in zip(twin.parameters(), self.model.parameters(), strict=True)}
        return [shared[id(alias)] for alias in written]

    @contextlib.contextmanager
    def _measuring(self) -> Iterator[tuple[tuple, dict[str, Any]]]:
        """A context for a step, with copies of the model's arguments; random number generators do not change."""
        with random_numbers_kept(), torch.inference_mode(False), torch.enable_grad():
            memo: dict[int, Any] = {}
            args = tuple(deep_copied(value, memo) for value in self._inputs[0])
            yield args, {name: deep_copied(value, memo) for name, value in self._inputs[1].items()}

    def twin(self, recompute: Any) -> nn.Module:
        """Return a twin whose layers are marked, converted to `recompute`; None is the model without conversion."""
        twin = copy_sharing_parameters(self.model, self._written)
        if recompute is None:
            revert(twin)
        else:
            with warnings.catch_warnings():
                # A plan notes the same once.
                warnings.filterwarnings("ignore", SIMULATED)
                convert(twin, recompute=recompute)
        for original, shared in zip(self.model.parameters(), twin.parameters(), strict=True):
            if shared.requires_grad:
                if id(original) not in self._gradients:
                    self._gradients[id(original)] = torch.zeros_like(shared)
                shared.grad = self._gradients[id(original)]
        modules = dict(twin.named_modules())
        for name in self.names:
            add_forward_context(modules[name], marking)
        return twin

    def step(self, title: str, twin: nn.Module, memory: bool) -> tuple[Recorder, list[Point]]:
        """Run one step and record its memory, or its times where `memory` is False."""
        self._progress(title)
        self.count += 1
        modules = dict(twin.named_modules())
        layers = {modules[name]: index for index, name in enumerate(self.names)}
        recorder = Recorder(layers, self.device, memory)
        for gradient in self._gradients.values():
            gradient.zero_()

        def step(recorder: Recorder) -> None:
            output = twin(*args, **kwargs)
            loss = self._loss_of(output)
            recorder.mark("loss")
            recorder.is_backward = True
            loss.backward()

        with self._measuring() as (args, kwargs):
            # With another seed in each step a model that skips layers at random skips other layers, which
            # `timing.seconds_of` notices.
            if not memory:
                torch.manual_seed(self.count)
                random.seed(self.count)
            return recorder, recorder.run(step)

    def peak(self, title: str, twin: nn.Module) -> int:
        """Return the peak of one step in bytes."""
        return peak_of(self.step(title, twin, memory=True)[1])

    def seconds(self, title: str, twin: nn.Module) -> float:
        """Return the seconds of one step."""
        _, points = self.step(title, twin, memory=False)
        return points[-1].seconds - points[0].seconds

    def _loss_of(self, output: Any) -> Tensor:
        """Compute the loss, and raise TypeError or ValueError unless the loss is one real number with a gradient."""
        loss = self._loss(output)
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss returns {type(loss).__name__}; expected a tensor of one element")
        if loss.numel() != 1 or not loss.requires_grad or loss.is_complex():
            raise ValueError(
                f"loss returns {loss.dtype} {tuple(loss.shape)}, requires_grad={loss.requires_grad}; "
                "expected one real number that has a gradient"
            )
        return loss


def first_shape(args: tuple, kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the shape of the first tensor among a model's arguments; () where there is none."""
    return next((tuple(tensor.shape) for tensor in tensors_in((args, dict(kwargs)))), ())


def _check_can_be_copied(model: nn.Module) -> None:
    """Raise TypeError or ValueError if a twin would compute something else than the model, or change the model."""
    check_initialized(model)
    own = {id(module) for _, module in named_modules(model)}
    for name, module in named_modules(model):
        if is_sharded(module):
            raise TypeError(f"{name or 'the model'} is sharded; expected a model that is not: plan, apply, then shard")
        if isinstance(module, nn.parallel.DistributedDataParallel | nn.SyncBatchNorm) and _has_other_processes():
            raise TypeError(
                f"{name or 'the model'} is a {type(module).__name__}, which waits for the other processes in every "
                "step, and processes may take different numbers of steps; expected a model without: plan in one "
                "process, save the plan, and load and apply it in all"
            )
        for key, value in vars(module).items():
            if not key.endswith("_hooks") and _holds_modules(value, own):
                raise TypeError(
                    f"{name or 'the model'}.{key} is a function that holds modules, which a copy of the model would "
                    "call; expected a model whose copy is independent of it"
                )


def _has_other_processes() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _holds_modules(value: Any, own: Container[int], depth: int = 3) -> bool:
    """Whether a deep copy of a value would call modules of the original: a function with modules in its closure, which
    is not copied, or a bound method of a module other than `own`, given by identities."""
    if isinstance(value, types.MethodType):
        is_foreign = isinstance(value.__self__, nn.Module) and id(value.__self__) not in own
        return is_foreign or _holds_modules(value.__func__, (), depth)
    if isinstance(value, functools.partial):
        parts = (value.func, *value.args)
        return any(isinstance(part, nn.Module) or _holds_modules(part, own, depth) for part in parts)
    if not isinstance(value, types.FunctionType) or not depth:
        return False
    for cell in value.__closure__ or ():
        try:
            content = cell.cell_contents
        except ValueError:
            continue
        if isinstance(content, nn.Module) or _holds_modules(content, (), depth - 1):
            return True
    return False


def default_loss(output: Any) -> Tensor:
    """Return the output's own `loss`, or else the sum of all tensors in the output that require a gradient.

    Raises:
        ValueError: no tensor in the output requires a gradient.
    """
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(own, Tensor) and own.requires_grad:
        return own
    tensors = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
    if not tensors:
        raise ValueError(f"the model returns {type(output).__name__} without a gradient; expected a loss to be given")
    total = tensors[0].sum()
    for tensor in tensors[1:]:
        total = total + tensor.sum()
    return total


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that a GPU or the CPU ran out of memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)

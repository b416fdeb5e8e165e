"""Steps of a user's own model and batch, on twins of the model.

The twins share the parameters' memory and nothing else: the model, its gradients and all random numbers stay as they
are. Gradients are there before a step, as while they are accumulated, so that the bytes of a step are those beside
them.
"""

import functools
import random
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from ..convert import convert, revert
from ..convert.layers import layers_of
from ..convert.module_tree import named_modules
from ..convert.swap import add_forward_context
from ..levels import OF_MODULES, WITHIN_CHECKPOINT, Policy
from ..memory import random_numbers_kept
from ..model_copies import copy_sharing_parameters, deep_copied
from ..nested_values import tensors_in
from ..runs import Place, is_sharded
from .marks import Point, Recorder, marking, peak_of

Loss = Callable[[Any], Tensor]
EAGER = "eager"


@dataclass(frozen=True)
class StepCost:
    """A whole step as it was measured: the peak in bytes, and seconds."""

    peak: int
    seconds: float


class ByLayer:
    """A choice for each layer, as `convert` takes it."""

    def __init__(self, choices: Mapping[str, str]) -> None:
        self.choices = choices

    def levels_in(self, model: nn.Module) -> Mapping[str, tuple[str, tuple[Place, ...]]]:
        policies = {name: Policy.of(choice, OF_MODULES, name) for name, choice in self.choices.items()}
        return {
            name: (str(policy.inside()), (Place(key, 0, True),) if policy.is_checkpoint else ())
            for key, (name, policy) in enumerate(policies.items())
        }


class InRuns:
    """Layers in the order of their calls, in checkpoints of several each, as `convert` takes it."""

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
        args, kwargs: what the model is called with.
        loss: the loss of what the model returns; None is the output's `loss`, or the sum of all its tensors.
        progress: called with a line before each step.
    """

    def __init__(
        self,
        model: nn.Module,
        args: tuple,
        kwargs: dict[str, Any],
        loss: Loss | None,
        progress: Callable[[str], None],
    ) -> None:
        _check(model)
        self.model = model
        self._inputs = args, kwargs
        self._loss = loss or default_loss
        self._progress = progress
        self._gradients: dict[int, Tensor] = {}
        self.given = shape_given(args, kwargs)
        self.count = 0
        converted = copy_sharing_parameters(model)
        convert(converted, recompute="block")
        self.names = list(layers_of(converted))
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        if len({p.device for p in model.parameters()}) > 1:
            raise ValueError("the model is on several devices; expected one")

    def twin(self, recompute: Any) -> nn.Module:
        """A twin of the model whose layers are marked; converted, if not None."""
        twin = copy_sharing_parameters(self.model)
        if recompute is None:
            revert(twin)
        else:
            convert(twin, recompute=recompute)
        for mine, its in zip(self.model.parameters(), twin.parameters(), strict=True):
            if its.requires_grad:
                if id(mine) not in self._gradients:
                    self._gradients[id(mine)] = torch.zeros_like(its)
                its.grad = self._gradients[id(mine)]
        modules = dict(twin.named_modules())
        for name in self.names:
            add_forward_context(modules[name], marking)
        return twin

    def step(self, what: str, twin: nn.Module, memory: bool) -> tuple[Recorder, list[Point]]:
        """One step, with its memory recorded, or its times."""
        self._progress(what)
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

        with random_numbers_kept(), torch.inference_mode(False), torch.enable_grad():
            memo: dict[int, Any] = {}
            args = tuple(deep_copied(value, memo) for value in self._inputs[0])
            kwargs = {name: deep_copied(value, memo) for name, value in self._inputs[1].items()}
            # Layers that are left out at random are others from step to step.
            if not memory:
                torch.manual_seed(self.count)
                random.seed(self.count)
            return recorder, recorder.run(step)

    def peak(self, what: str, twin: nn.Module) -> int:
        """The bytes of one step."""
        return peak_of(self.step(what, twin, memory=True)[1])

    def seconds(self, what: str, twin: nn.Module) -> float:
        """The seconds of one step."""
        _, points = self.step(what, twin, memory=False)
        return points[-1].seconds - points[0].seconds

    def _loss_of(self, output: Any) -> Tensor:
        loss = self._loss(output)
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss returns {type(loss).__name__}; expected a tensor of one element")
        if loss.numel() != 1 or not loss.requires_grad or loss.is_complex():
            raise ValueError(
                f"loss returns {loss.dtype} {tuple(loss.shape)}, requires_grad={loss.requires_grad}; "
                "expected one real number that has a gradient"
            )
        return loss


def shape_given(args: tuple, kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape of the first tensor that a model is called with; () where there is none."""
    return next((tuple(tensor.shape) for tensor in tensors_in((args, dict(kwargs)))), ())


def _check(model: nn.Module) -> None:
    """Whether steps of a twin are steps of this model, and leave it as it is."""
    for name, module in named_modules(model):
        if is_sharded(module):
            raise TypeError(f"{name or 'the model'} is sharded; expected a model that is not: plan, apply, then shard")
        for key, parameter in module._parameters.items():
            if isinstance(parameter, UninitializedParameter):
                raise ValueError(f"{name}.{key} is a lazy parameter; expected the model to be called once before")
        for key, value in vars(module).items():
            if not key.endswith("_hooks") and _holds_modules(value):
                raise TypeError(
                    f"{name or 'the model'}.{key} is a function that holds modules, which a copy of the model would "
                    "call; expected a model whose copy is independent of it"
                )


def _holds_modules(value: Any, depth: int = 3) -> bool:
    """Whether a function has modules in its closure, or a method is a module's."""
    if isinstance(value, types.MethodType):
        return isinstance(value.__self__, nn.Module)
    if isinstance(value, functools.partial):
        return any(isinstance(held, nn.Module) or _holds_modules(held, depth) for held in (value.func, *value.args))
    if not isinstance(value, types.FunctionType) or not depth:
        return False
    for cell in value.__closure__ or ():
        try:
            held = cell.cell_contents
        except ValueError:
            continue
        if isinstance(held, nn.Module) or _holds_modules(held, depth - 1):
            return True
    return False


def default_loss(output: Any) -> Tensor:
    """The output's own loss, if it has one, or the sum of all tensors in it that have a gradient.

    Raises:
        ValueError: there is none.
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
    """Whether memory was out, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)

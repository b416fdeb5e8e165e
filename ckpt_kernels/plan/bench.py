"""Steps of a user's own model and batch, on twins of the model.

The twins share the parameters' memory and nothing else: the model, its gradients and all random numbers stay as they
are. Gradients are there before a step, as while they are accumulated, so that the bytes of a step are those beside
them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..convert import convert, revert
from ..convert.swap import surround
from ..copies import copied, twin_of
from ..memory import _random_numbers_kept
from ..runs import Place
from ..target import tensors_in
from .layers import layers_of
from .marks import Point, Recorder, marking

Loss = Callable[[Any], Tensor]
LEVELS = ("none", "block", "output", "all", "layer")
CHECKPOINT = "checkpoint"
CHOICES = (*LEVELS, CHECKPOINT)
EAGER = "eager"


@dataclass(frozen=True)
class Step:
    """A whole step as it was measured: the peak in bytes, and seconds."""

    peak: int
    seconds: float


class ByLayer:
    """A choice for each layer, as `convert` takes it."""

    def __init__(self, choices: Mapping[str, str]) -> None:
        self.choices = choices

    def levels_in(self, model: nn.Module) -> Mapping[str, tuple[str, tuple[Place, ...]]]:
        return {
            name: ("output", (Place(key, 0, True),)) if choice == CHECKPOINT else (choice, ())
            for key, (name, choice) in enumerate(self.choices.items())
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
        self.model = model
        self._inputs = args, kwargs
        self._loss = loss or default_loss
        self._progress = progress
        self._gradients: dict[int, Tensor] = {}
        self.count = 0
        converted = twin_of(model)
        convert(converted, recompute="block")
        self.names = list(layers_of(converted))
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def twin(self, recompute: Any) -> nn.Module:
        """A twin of the model whose layers are marked; converted, if not None."""
        twin = twin_of(self.model)
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
            surround(modules[name], marking)
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
        memo: dict[int, Any] = {}
        args, kwargs = copied(self._inputs, memo)

        def step(recorder: Recorder) -> None:
            output = twin(*args, **kwargs)
            loss = self._loss(output)
            recorder.mark("loss")
            recorder.is_backward = True
            loss.backward()

        with _random_numbers_kept(), torch.inference_mode(False), torch.enable_grad():
            return recorder, recorder.run(step)


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
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)

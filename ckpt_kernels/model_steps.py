"""Forward and backward passes of any model: outputs, a loss, a training step and the time of one."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .nested_values import tensors_in
from .target import Inputs, arguments_of


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Calls the model with `inputs`, a tuple or a mapping by name."""
    args, kwargs = arguments_of(inputs)
    return model(*args, **kwargs)


def outputs_of(value: Any) -> list[Tensor]:
    """The tensors in a result that require a gradient. Raises ValueError if there are none."""
    outputs = [t for t in tensors_in(value) if t.requires_grad]
    if not outputs:
        raise ValueError("the model's outputs have no gradient; expected a tensor that depends on its parameters")
    return outputs


def projection(outputs: list[Tensor]) -> Tensor:
    """A loss: the sum of the outputs, weighted at random."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(y.shape, generator=generator, dtype=torch.float64) / y.numel() ** 0.5 for y in outputs]
    return sum((y * w.to(y)).sum() for y, w in zip(outputs, weights, strict=True))


def step(model: nn.Module, inputs: Inputs) -> None:
    """A forward and a backward pass, for the gradients of all parameters that require one."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    torch.autograd.grad(projection(outputs_of(call(model, inputs))), wanted, allow_unused=True)


def seconds_of_step(model: nn.Module, inputs: Inputs, device: torch.device) -> float:
    """The time of one step."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step(model, inputs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def draws_random_numbers(model: nn.Module, inputs: Inputs) -> bool:
    """Whether a forward pass draws from torch's random number generators."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index or 0])
    before = [g.get_state() for g in generators]
    with torch.no_grad():
        call(model, inputs)
    drew = any(not torch.equal(b, g.get_state()) for b, g in zip(before, generators, strict=True))
    for generator, state in zip(generators, before, strict=True):
        generator.set_state(state)
    return drew


def each_of(inputs: Inputs, change: Callable[[Any], Any]) -> Inputs:
    """The inputs after `change` of each, also of those in lists, tuples and dicts."""

    def changed(value: Any) -> Any:
        if type(value) is dict:
            return {key: changed(item) for key, item in value.items()}
        return type(value)(map(changed, value)) if type(value) in (list, tuple) else change(value)

    return changed(dict(inputs) if isinstance(inputs, Mapping) else inputs)


def in_double(value: Any) -> Any:
    """Floating-point tensors in float64, other values as they are."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def another_batch(inputs: Inputs) -> Inputs:
    """A batch of the same sizes and with other values, which a model that takes the first batch takes too.

    The samples of each tensor are in the opposite order. Where that is the same batch, as for a single sample, the
    values move by one along the next dimension: floating-point values only, or else also integers and masks, which keep
    their values so. If the batch is still the same, floating-point values are scaled by 0.5 to 1, and zeros replaced by
    such numbers. A batch that has only integers of one value stays as it is.
    """
    for change in (_flipped, _with_floats_moved, _moved, _scaled):
        another = each_of(inputs, change)
        pairs = zip(tensors_in(inputs), tensors_in(another), strict=True)
        if any(not torch.equal(*pair) for pair in pairs):
            break
    return another


def _flipped(value: Any) -> Any:
    """A tensor with its samples in the opposite order; any other value as it is."""
    return value.flip(0) if isinstance(value, Tensor) and value.dim() else value


def _moved(value: Any) -> Any:
    """A tensor with the values of each sample in another order, if there is one; any other value as it is."""
    if not isinstance(value, Tensor):
        return value
    orders = (value.roll(1, dimension) for dimension in range(1, value.dim()))
    return next((order for order in orders if not torch.equal(order, value)), value)


def _with_floats_moved(value: Any) -> Any:
    """The same for floating-point tensors. Integers beside them may be sizes."""
    return _moved(value) if isinstance(value, Tensor) and value.is_floating_point() else value


def _scaled(value: Any) -> Any:
    """A floating-point tensor with other values; any other value as it is."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    factors = torch.linspace(0.5, 1.0, max(value.numel(), 2), dtype=value.dtype, device=value.device)[: value.numel()]
    factors = factors.view(value.shape)
    return torch.where(value == 0, factors, value * factors)

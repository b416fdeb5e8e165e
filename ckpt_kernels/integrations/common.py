"""Shared parts of all integrations: `recompute` as one value of a configuration, and the conversion of a model by that
value."""

import pathlib
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Union

import torch
from torch import Tensor, nn

from ..arguments import size
from ..convert import Report, convert
from ..levels import OF_MODELS, Policy
from ..plan import Plan, plan
from ..plan.budget import Budget, bytes_of
from ..target import arguments_of

# A level, levels by name, a plan or its file, or a budget.
Recompute = Union[str, float, Mapping[str, str], Plan, pathlib.Path, "Planned"]
_EXPECTED = (
    f"expected a level ({', '.join(OF_MODELS)}), a mapping of names to levels, a plan or its .json file, "
    'or a budget: bytes, a size such as "12GiB", a fraction of eager\'s peak, or "device"'
)


@dataclass(frozen=True)
class Planned:
    """A budget for which a plan is to be made.

    Attributes:
        budget: as in `ckpt_kernels.plan`.
    """

    budget: Budget


def parsed(recompute: Recompute) -> str | Mapping[str, str] | Plan | Planned:
    """The meaning of a `recompute` value of a configuration. Files are read.

    Args:
        recompute: a level of `convert`; a mapping of modules' names to levels; a `Plan`, or the path of its file, which
            ends in .json; or a budget, as `plan` takes it: a number of bytes, a size, a fraction of eager's peak
            (a float up to 1), or "device".

    Returns:
        The level, the mapping, the plan, or `Planned` with the budget.

    Raises:
        TypeError, ValueError: `recompute` has no known form.
        OSError: there is no such file.

    Example:
        >>> from ckpt_kernels.integrations.common import parsed
        >>> parsed("output"), parsed("12GiB"), parsed(0.5)
        ('output', Planned(budget='12GiB'), Planned(budget=0.5))
    """
    if isinstance(recompute, Mapping | Plan | Planned):
        return recompute
    if isinstance(recompute, bool) or not isinstance(recompute, str | pathlib.Path | int | float):
        raise TypeError(f"recompute is {recompute!r}, of type {type(recompute).__name__}; {_EXPECTED}")
    if (policy := Policy.read(recompute, OF_MODELS)) is not None:
        return str(policy)
    if str(recompute).endswith(".json"):
        if not pathlib.Path(recompute).is_file():  # type: ignore[arg-type]
            raise FileNotFoundError(f"recompute is {str(recompute)!r}, and there is no such file; {_EXPECTED}")
        return Plan.load(str(recompute))
    if recompute == "device":
        return Planned("device")
    try:
        bytes_of(recompute, 1 << 20, torch.device("cpu"))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ValueError(f"recompute is {recompute!r}; {_EXPECTED}") from None
    return Planned(recompute)  # type: ignore[arg-type]


def converted(
    model: nn.Module,
    recompute: Recompute,
    *,
    inputs: Any = None,
    loss: Callable[[Any], Tensor] | None = None,
    autocast: AbstractContextManager | None = None,
    logits: str | None = None,
    tiles: int = 1,
) -> Report:
    """Converts the model in place, as `recompute` says.

    Args:
        model: a module that no trainer has wrapped yet.
        recompute: see `parsed`.
        inputs: for a budget, the inputs of the model in a step of the largest size: a tensor, a tuple, or a dict
            by name. Tensors are moved to the model's device. Ignored otherwise. In a distributed run the first
            process plans with its own inputs, and all processes apply that plan.
        loss: for a budget, a function from the model's result to the loss; by default the loss in that result.
        autocast: for a budget, the context in which steps run.
        logits, tiles: see `ckpt_kernels.convert`. A plan for a budget is made without them.

    Returns:
        The report of `convert`.

    Raises:
        TypeError, ValueError: `recompute` has no known form, or is a budget without inputs.
        DoesNotFit: no choice fits the budget.

    Example:
        >>> from ckpt_kernels.integrations.common import converted
        >>> model = torch.nn.Sequential(torch.nn.LayerNorm(64), torch.nn.GELU(), torch.nn.Linear(64, 64))
        >>> report = converted(model, "output")
        >>> ckpt_kernels.is_converted(model)
        True
    """
    wanted = parsed(recompute)
    if isinstance(wanted, Plan):
        return wanted.apply(model, logits=logits, tiles=tiles)
    if not isinstance(wanted, Planned):
        return convert(model, recompute=wanted, logits=logits, tiles=tiles)
    if inputs is None:
        raise ValueError(
            f"recompute is {wanted.budget!r}, a budget, and inputs is None; expected what the model is called with in "
            "a step of the largest size, such as data_collator([dataset[0]] * batch_size)"
        )
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    args, kwargs = arguments_of(_moved_to(inputs, device))

    def planned() -> Plan:
        with autocast or nullcontext():
            return plan(model, *args, budget=wanted.budget, loss=loss, **kwargs)

    return _of_first_process(planned).apply(model, logits=logits, tiles=tiles)


def _of_first_process(planned: Callable[[], Plan]) -> Plan:
    """The plan that the first process makes, for all processes of a distributed run.

    Each process would measure other times and so might choose another plan. Processes with other checkpoints run other
    collective operations in the backward pass, and wait for each other for ever.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return planned()
    is_first = distributed.get_rank() == 0
    found: list[Any] = [None]
    try:
        found = [planned()] if is_first else found
    except Exception as error:
        # The others would wait. Some errors cannot be pickled.
        distributed.broadcast_object_list([f"{type(error).__name__}: {error}"], src=0)
        raise
    distributed.broadcast_object_list(found, src=0)
    if isinstance(found[0], str):
        raise RuntimeError(f"the first process cannot plan: {found[0]}")
    return found[0]


def tokens(batch: int, length: int) -> dict[str, Any]:
    """A batch for a causal language model of transformers, of a given size. A plan depends only on the shapes of the
    data.

    Args:
        batch: the number of sequences.
        length: the number of tokens in each.

    Raises:
        TypeError, ValueError: one of them is no whole number, or is negative.
    """
    ids = torch.zeros(size(batch, "batch"), size(length, "length"), dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "use_cache": False}


def mixed_precision(model: nn.Module, bf16: bool, fp16: bool) -> AbstractContextManager:
    """The autocast context of a trainer with these two flags."""
    device = next((parameter.device.type for parameter in model.parameters()), "cpu")
    return torch.autocast(device, torch.bfloat16 if bf16 else torch.float16) if bf16 or fp16 else nullcontext()


def warn_of_checkpointing(is_on: bool | None) -> None:
    """Warns that the trainer's own checkpointing makes `recompute` pointless."""
    if is_on:
        warnings.warn(
            "gradient_checkpointing is on, so that every layer runs twice, whatever recompute is; expected it off",
            stacklevel=3,
        )


def _moved_to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_moved_to(item, device) for item in value)
    if isinstance(value, Mapping):
        return {key: _moved_to(item, device) for key, item in value.items()}
    return value

"""Checks of arguments before anything is computed, and conversions of arguments with several forms.

Each error names the argument, its value, and the expected one.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from .. import ops
from ..arguments import flag, number, probability, whole
from ..autocast import is_autocast

_SEEDS = (-(2**63), 2**63 - 1)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_channels(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    check_tensor(input, "input")
    if input.dim() < 2:
        raise RuntimeError(f"input has shape {shape_of(input)}; expected (N, C, *space)")
    check_coefficient(weight, "weight", input, input.shape[1])
    check_coefficient(bias, "bias", input, input.shape[1])


def dropout_seed(input: Tensor, dropout_p: float, training: bool) -> tuple[float, Tensor | None]:
    """The probability, and a seed on the input's device, drawn from torch's generator; None without dropout.

    As in torch, dropout of an empty tensor, and dropout with p = 1, draw no random number.
    """
    p = probability(dropout_p, "dropout_p")
    p = p if flag(training, "training") else 0.0
    if not p or (_has_known_size() and not input.numel()):
        return 0.0, None
    if ops.sharding.is_sharded((input,)):
        from ..ops import dtensor

        sharded: Any = input
        return p, dtensor.replicated_seed(sharded, *_SEEDS)
    if p == 1:
        return p, torch.zeros(1, dtype=torch.int64, device=input.device)
    return p, torch.randint(*_SEEDS, (1,), device=input.device)


def _has_known_size() -> bool:
    """Whether sizes are numbers here, and not what a compiler or torch.jit.trace follows."""
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is None


def rms_eps(input: Tensor, eps: float | None) -> float:
    if eps is not None:
        return number(eps, "eps")
    wide = isinstance(input, Tensor) and input.dtype == torch.float64
    return torch.finfo(torch.float64 if wide else torch.float32).eps


def promoted(tensor: Tensor, other: Tensor | None) -> tuple[Tensor, Any]:
    """Two operands of a sum or product, under autocast both in their common dtype."""
    if not isinstance(other, Tensor) or not isinstance(tensor, Tensor) or tensor.dtype == other.dtype:
        return tensor, other
    if not is_autocast(tensor):
        return tensor, other
    common = torch.promote_types(tensor.dtype, other.dtype)
    return tensor.to(common), other.to(common)


def autocast(input: Tensor, *others: Tensor | None) -> Sequence[Any]:
    """The tensors, in float32 under CUDA autocast; torch's CPU autocast does not cast the inputs of norms."""
    if input.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        return [None if t is None else t.float() for t in (input, *others)]
    return (input, *others)


def memory_format(tensor: Tensor) -> torch.memory_format:
    """The memory format that torch's layers give outputs for this input: channels last or contiguous."""
    # Under torch.jit.trace torch cannot suggest a format.
    if tensor.dim() not in (4, 5) or tensor.is_contiguous() or torch._C._get_tracing_state() is not None:
        return torch.contiguous_format
    return suggest_memory_format(tensor)


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def normalized(normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    sizes = normalized_shape if isinstance(normalized_shape, Sequence) else (normalized_shape,)
    return tuple([whole(size, "normalized_shape") for size in sizes])


def check_tensor(tensor: Tensor, argument: str, *, nested: bool = False) -> None:
    """Check that the argument is a floating-point tensor with strides, or if `nested`, perhaps a jagged tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{argument} is {type(tensor).__name__}; expected a tensor")
    if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
        raise ValueError(f"{argument} is an {type(tensor).__name__}; expected a tensor with a shape")
    if tensor.dtype not in DTYPES:
        # As torch's kernels raise; a subclass of RuntimeError.
        raise NotImplementedError(
            f"{argument} has dtype {tensor.dtype}; expected float32, bfloat16, float16 or float64"
        )
    if tensor.is_nested and not (nested and tensor.layout == torch.jagged):
        expected = "one of layout torch.jagged, or none" if nested else "none"
        raise RuntimeError(f"{argument} is a nested tensor of layout {tensor.layout}; expected {expected}")
    if tensor.layout != torch.strided and not tensor.is_nested:
        raise RuntimeError(f"{argument} has layout {tensor.layout}; expected torch.strided")


def check_input(input: Any, normalized_shape: int | Sequence[int], *, nested: bool = True) -> int:
    """Check the input of a row norm, and return the number of elements that are normalised together."""
    check_tensor(input, "input", nested=nested)
    shape = normalized(normalized_shape)
    if not shape:
        raise RuntimeError("normalized_shape is empty; expected at least one dimension")
    if input.is_nested and len(shape) >= input.dim() - input._ragged_idx:
        raise RuntimeError(
            f"input has shape {shape_of(input)} and normalized_shape is {shape}; "
            "expected dimensions after the ragged one"
        )
    if len(shape) > input.dim() or input.shape[-len(shape) :] != shape:
        raise RuntimeError(_wrong_shape(input, shape))
    # Rows without elements are computed as no rows of one element: the outputs are as empty.
    return math.prod(shape) or 1


def check_rms_input(input: Any, normalized_shape: int | Sequence[int]) -> int:
    """As `check_input`, for `rms_norm`: too few dimensions raise a ValueError, as in torch."""
    check_tensor(input, "input", nested=True)
    shape = normalized(normalized_shape)
    if input.dim() < len(shape):
        raise ValueError(_wrong_shape(input, shape))
    return check_input(input, shape)


def _wrong_shape(input: Tensor, shape: tuple[int, ...]) -> str:
    return f"input has shape {shape_of(input)}; expected its last dimensions to be normalized_shape, {shape}"


def check_device(tensor: Tensor, argument: str, input: Tensor, name: str = "input") -> None:
    if tensor.device != input.device:
        raise RuntimeError(f"{argument} is on {tensor.device}; expected it on {input.device}, where {name} is")


def check_like(tensor: Tensor, argument: str, input: Tensor, name: str = "input") -> None:
    check_tensor(tensor, argument, nested=True)
    check_device(tensor, argument, input, name)
    if tensor.shape != input.shape:
        raise RuntimeError(f"{argument} has shape {shape_of(tensor)}; expected the {name}'s, {shape_of(input)}")
    if tensor.dtype != input.dtype:
        raise RuntimeError(f"{argument} has dtype {tensor.dtype}; expected the {name}'s, {input.dtype}")


def check_coefficient(
    tensor: Tensor | None, argument: str, input: Tensor, normalized_shape: int | Sequence[int]
) -> None:
    if tensor is None:
        return
    check_tensor(tensor, argument)
    check_device(tensor, argument, input)
    shape = normalized(normalized_shape)
    if tensor.shape != shape:
        raise RuntimeError(f"{argument} has shape {shape_of(tensor)}; expected {shape}")


def check_last(tensor: Tensor | None, argument: str, input: Tensor) -> None:
    """Check that a weight or bias has one element for each element of the input's last dimension."""
    if tensor is None:
        return
    check_tensor(tensor, argument)
    check_device(tensor, argument, input)
    if input.dim() == 0 or shape_of(tensor) != shape_of(input)[-1:]:
        raise RuntimeError(
            f"{argument} has shape {shape_of(tensor)}; expected that of the last dimension of {shape_of(input)}"
        )


def check_modulation(tensor: Tensor, argument: str, input: Tensor, normalized_shape: int | Sequence[int]) -> None:
    check_tensor(tensor, argument)
    check_device(tensor, argument, input)
    shape = normalized(normalized_shape)
    lead = tuple(input.shape[: input.dim() - len(shape)])
    samples = tuple(tensor.shape[: tensor.dim() - len(shape)])
    while samples and samples[-1] == 1:
        samples = samples[:-1]
    if tuple(tensor.shape[-len(shape) :]) != shape or samples != lead[: len(samples)]:
        raise RuntimeError(
            f"{argument} has shape {shape_of(tensor)}; expected (*samples, *normalized_shape), where the samples are "
            f"the first dimensions of input, which has shape {shape_of(input)} and normalized_shape {shape}"
        )

"""What the functions check before anything is computed, each error naming the argument, what came and what was
expected; and how they read arguments that may be given in several ways."""

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
    """The probability, and a seed drawn from torch's generator of the input's device, and left there.

    As torch's own dropout, one of no elements draws no random number, and one of p = 1 none either.
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
    """Two tensors that meet in a sum or product, in their common dtype where autocast may have parted them."""
    if not isinstance(other, Tensor) or not isinstance(tensor, Tensor) or tensor.dtype == other.dtype:
        return tensor, other
    if not is_autocast(tensor):
        return tensor, other
    common = torch.promote_types(tensor.dtype, other.dtype)
    return tensor.to(common), other.to(common)


def autocast(input: Tensor, *others: Tensor | None) -> Sequence[Any]:
    """In float32 under CUDA autocast; torch's CPU autocast leaves norms alone."""
    if input.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        return [None if t is None else t.float() for t in (input, *others)]
    return (input, *others)


def memory_format(tensor: Tensor) -> torch.memory_format:
    """The one that torch's own layers give their results: channels last for 4 or 5 dimensions that lie so."""
    # Of sizes that torch.jit.trace follows torch cannot tell.
    if tensor.dim() not in (4, 5) or tensor.is_contiguous() or torch._C._get_tracing_state() is not None:
        return torch.contiguous_format
    return suggest_memory_format(tensor)


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def normalized(normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    sizes = normalized_shape if isinstance(normalized_shape, Sequence) else (normalized_shape,)
    return tuple([whole(size, "normalized_shape") for size in sizes])


def check_tensor(tensor: Tensor, argument: str, *, nested: bool = False) -> None:
    """A floating-point tensor with strides, or, where `nested` ones will do, a jagged one of such rows."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{argument} is {type(tensor).__name__}; expected a tensor")
    if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
        raise ValueError(f"{argument} is an {type(tensor).__name__}; expected a tensor with a shape")
    if tensor.dtype not in DTYPES:
        # As torch's kernels do; it is a RuntimeError.
        raise NotImplementedError(
            f"{argument} has dtype {tensor.dtype}; expected float32, bfloat16, float16 or float64"
        )
    if tensor.is_nested and not (nested and tensor.layout == torch.jagged):
        expected = "one of layout torch.jagged, or none" if nested else "none"
        raise RuntimeError(f"{argument} is a nested tensor of layout {tensor.layout}; expected {expected}")
    if tensor.layout != torch.strided and not tensor.is_nested:
        raise RuntimeError(f"{argument} has layout {tensor.layout}; expected torch.strided")


def check_input(input: Any, normalized_shape: int | Sequence[int], *, nested: bool = True) -> int:
    """The number of elements that are normalised together."""
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
    # Of rows without elements there are as many results as of no rows of one.
    return math.prod(shape) or 1


def check_rms_input(input: Any, normalized_shape: int | Sequence[int]) -> int:
    """The same for `rms_norm`; ValueError, as torch's own raises, for too few dimensions."""
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
    """A weight or bias for each element of the last dimension."""
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

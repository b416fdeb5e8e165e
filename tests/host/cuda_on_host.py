"""A backend for the tests: the CUDA kernels of csrc/cuda, compiled by the host compiler, with threads as fibers."""

import functools
import pathlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils import cpp_extension

from ckpt_kernels.activations import CODES
from ckpt_kernels.backends import native, reference
from ckpt_kernels.backends.blocks import Rotary, RowNorm

# The CUDA library has no kernels for these functions.
channel_statistics, channel_coefficients = reference.channel_statistics, reference.channel_coefficients
channel_backward_coefficients = reference.channel_backward_coefficients

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Dtypes of rotary tables, which may be float64 too.
_TABLE_KINDS = {**_KINDS, torch.float64: 3}


def why_not(device_type: str, dtype: torch.dtype) -> str | None:
    if device_type != "cpu":
        return "it runs on the host"
    return None if dtype in _KINDS else f"the CUDA kernels do not compute in {dtype}"


@functools.cache
def _module() -> ModuleType:
    here = pathlib.Path(__file__).parent
    build = here.parent.parent / "build" / "cuda_on_host"
    build.mkdir(parents=True, exist_ok=True)
    return cpp_extension.load(
        "ckpt_kernels_cuda_on_host",
        [str(here / "module.cpp")],
        extra_cflags=["-std=c++17", "-O2", "-Wno-unknown-pragmas"],
        build_directory=str(build),
    )


def _operands(tensors: dict[str, Tensor | None], **options: Any) -> dict[str, Any]:
    named = {name: (t.data_ptr(), _levels(t)) for name, t in tensors.items() if t is not None}
    first = next(iter(tensors.values()))
    columns = first.shape[-1]
    rows = first.numel() // columns
    groups = next((tensors[k].numel() // columns for k in ("weight", "bias") if tensors.get(k) is not None), 1)
    return named | options | {"rows": rows, "columns": columns, "rows_per_group": rows // groups}


def _levels(t: Tensor) -> list[int]:
    if t.dim() < 4:
        return [t.stride(0) if t.dim() else 0]
    return [t.stride(0), t.shape[2], t.shape[1], t.stride(2), t.stride(1)]


def _wide(tensor: Tensor | None, offset: float = 0.0) -> Tensor | None:
    return None if tensor is None else (tensor.float() + offset).contiguous()


def _row_norm(block: RowNorm) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
    """The tensors of the block, of which the first has the shape of the matrices, and the options."""
    named, options = block._asdict(), block.options._asdict()
    del named["options"], options["columns"], options["centered"]
    named |= {"weight": _wide(block.weight, options.pop("weight_offset")), "bias": _wide(block.bias)}
    return named, options | {name: CODES[options[name]] for name in ("pre_activation", "activation")}


def row_norm_forward(block, output, residual_out, given_statistics=False):
    tensors, options = _row_norm(block)
    tensors |= {"output": output, "residual_out": residual_out}
    operands = _operands(tensors, **options, given_statistics=given_statistics)
    _module().row_norm_forward(_KINDS[block.input.dtype], operands)


def row_norm_backward(block, grad_output, grad_residual_out, gradients, output=None):
    tensors, options = _row_norm(block)
    tensors |= {"grad_output": grad_output, "grad_residual_out": grad_residual_out, "output": output}
    tensors |= {f"grad_{name}": gradient for name, gradient in gradients._asdict().items()}
    _module().row_norm_backward(_KINDS[block.input.dtype], _operands(tensors, **options))


def glu_forward(gate, value, output, activation, limit, offset):
    tensors = {"gate": gate, "value": value, "output": output}
    options = {"activation": CODES[activation], "limit": limit, "offset": offset, "step": _step(gate)}
    _module().glu_forward(_KINDS[gate.dtype], _operands(tensors, **options))


def glu_backward(grad_output, gate, value, grad_gate, grad_value, output, activation, limit, offset):
    tensors = {"grad_output": grad_output, "gate": gate, "value": value}
    tensors |= {"grad_gate": grad_gate, "grad_value": grad_value, "output": output}
    options = {"activation": CODES[activation], "limit": limit, "offset": offset, "step": _step(gate)}
    _module().glu_backward(_KINDS[gate.dtype], _operands(tensors, **options))


def _step(gate: Tensor) -> int:
    return gate.stride(1) if gate.shape[1] > 1 else 1


def bias_act_forward(input, bias, seed, output, activation, dropout_p):
    tensors = {"input": input, "bias": _wide(bias), "seed": seed, "output": output}
    options = {"activation": CODES[activation], "dropout_p": dropout_p}
    _module().bias_act_forward(_KINDS[input.dtype], _operands(tensors, **options))


def bias_act_backward(grad_output, input, bias, seed, grad_input, grad_bias, output, activation, dropout_p):
    tensors = {"grad_output": grad_output, "input": input, "bias": _wide(bias), "seed": seed}
    tensors |= {"grad_input": grad_input, "grad_bias": grad_bias, "output": output}
    options = {"activation": CODES[activation], "dropout_p": dropout_p}
    _module().bias_act_backward(_KINDS[input.dtype], _operands(tensors, **options))


def dyt_forward(input, alpha, weight, bias, output):
    tensors = {"input": input, "alpha": _wide(alpha), "weight": _wide(weight), "bias": _wide(bias), "output": output}
    _module().dyt_forward(_KINDS[input.dtype], _operands(tensors))


def dyt_backward(grad_output, input, alpha, weight, grad_input, grad_alpha, grad_weight, grad_bias):
    tensors = {"grad_output": grad_output, "input": input, "alpha": _wide(alpha), "weight": _wide(weight)}
    tensors |= {"grad_input": grad_input, "grad_alpha": grad_alpha, "grad_weight": grad_weight, "grad_bias": grad_bias}
    _module().dyt_backward(_KINDS[input.dtype], _operands(tensors))


def _rotary(block: Rotary, heads: Tensor) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
    """The tensors of the block, after the heads, which have the shape of the rows, and the options."""
    named, options = block._asdict(), block.options._asdict()
    del named["options"]
    named |= {"weight": _wide(block.weight, options.pop("weight_offset")), "bias": _wide(block.bias)}
    named |= {name: _without_broadcast(named[name]) for name in ("cos", "sin")}
    options |= {"norm": native.ROTARY_NORMS[options["norm"]], "middle": heads.shape[1], "inner": heads.shape[2]}
    options |= {f"{name}_kind": _TABLE_KINDS[named[name].dtype] for name in ("cos", "sin")}
    if block.cos.shape[-1] == options["rotary_dim"]:
        interleaved = options["interleaved_output"]
        options |= {"step": 1 + interleaved, "shift": 1 if interleaved else options["rotary_dim"] // 2}
    return {"heads": heads} | named, options


def _without_broadcast(table: Tensor) -> Tensor:
    """The table with strides of 0 in dimensions of size one."""
    strides = [0 if size == 1 else stride for size, stride in zip(table.shape[:-1], table.stride()[:-1], strict=True)]
    return table.as_strided(table.shape, (*strides, 1))


def rotary_forward(block, output):
    tensors, options = _rotary(block, output)
    _module().rotary_forward(_KINDS[output.dtype], _operands(tensors | {"output": output}, **options))


def rotary_backward(block, grad_output, gradients):
    tensors, options = _rotary(block, grad_output)
    tensors |= {"grad_output": grad_output}
    tensors |= {f"grad_{name}": gradient for name, gradient in gradients._asdict().items()}
    if any(gradient is not None for gradient in gradients):
        _module().rotary_backward(_KINDS[grad_output.dtype], _operands(tensors, **options))


def _channels(tensors: dict[str, Tensor | None], samples: int, channels: int, **options: Any) -> dict[str, Any]:
    named = {name: (t.data_ptr(), [0]) for name, t in tensors.items() if t is not None}
    size = tensors["input"].numel() // (samples * channels)
    return named | options | {"samples": samples, "channels": channels, "size": size}


def channel_moments(x, mean, squares, planes, piece_rows):
    tensors = {"input": x, "first": mean, "second": squares}
    samples, pieces, channels = mean.shape
    operands = _channels(tensors, samples, channels, pieces=pieces, planes=planes, piece_rows=piece_rows)
    _module().channel_moments(_KINDS[x.dtype], operands)


def channel_forward(x, residual, coefficients, output, planes, samples, activation):
    tensors = {"input": x, "other": residual, "coefficients": coefficients, "output": output}
    options = {"planes": planes, "activation": CODES[activation], "by_sample": coefficients.shape[1] > 1}
    _module().channel_forward(_KINDS[x.dtype], _channels(tensors, samples, coefficients.shape[2], **options))


def channel_sums(grad_output, x, other, coefficients, first, second, planes, piece_rows, activation, by_output):
    tensors = {"grad_output": grad_output, "input": x, "other": other, "coefficients": coefficients}
    tensors |= {"first": first, "second": second}
    samples, pieces, channels = first.shape
    options = {"planes": planes, "piece_rows": piece_rows, "pieces": pieces, "activation": CODES[activation]}
    options |= {"by_output": by_output, "by_sample": coefficients.shape[1] > 1}
    _module().channel_sums(_KINDS[x.dtype], _channels(tensors, samples, channels, **options))


def channel_backward(
    grad_output, x, other, coefficients, grad_input, grad_residual, planes, samples, activation, by_output
):
    tensors = {"grad_output": grad_output, "input": x, "other": other, "coefficients": coefficients}
    tensors |= {"grad_input": grad_input, "grad_residual": grad_residual}
    options = {"planes": planes, "activation": CODES[activation], "by_output": by_output}
    options |= {"by_sample": coefficients.shape[1] > 1}
    _module().channel_backward(_KINDS[x.dtype], _channels(tensors, samples, coefficients.shape[2], **options))

"""The native backend: loads the compiled libraries `_C` (CPU) and `_C_cuda`, and calls their ops.

Both libraries implement the ops declared here. Every op fills tensors that the caller has allocated. Matrices are
(rows, columns) with contiguous rows; in an interleaved glu, gate and value are every other element of a row. Weights
and biases are (columns,) or (groups, columns). Statistics and weight gradients are in the compute dtype (float32, or
float64 for float64 input).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..activations import CODES
from ..libraries import library
from . import reference
from .blocks import Rotary, RotaryGradients, RotaryOptions, RowNorm, RowNormGradients

_SCHEMAS = (
    "row_norm_forward(Tensor input, Tensor? residual, Tensor? gate, Tensor? weight, Tensor? bias, Tensor? seed,"
    " Tensor(a!)? mean, Tensor(b!) rstd, Tensor(c!) output, Tensor(d!)? residual_out, float eps, int pre_activation,"
    " int activation, float weight_offset, bool cast_before_weight, float dropout_p, bool gate_before_norm,"
    " bool given_statistics) -> ()",
    "row_norm_backward(Tensor grad_output, Tensor? grad_residual_out, Tensor input, Tensor? gate, Tensor? weight,"
    " Tensor? bias, Tensor? seed, Tensor? mean, Tensor rstd, Tensor(a!)? grad_input, Tensor(b!)? grad_residual,"
    " Tensor(c!)? grad_gate, Tensor(d!)? grad_weight, Tensor(e!)? grad_bias, Tensor(f!)? output, int pre_activation,"
    " int activation, float weight_offset, bool cast_before_weight, float dropout_p, bool gate_before_norm) -> ()",
    "glu_forward(Tensor gate, Tensor value, Tensor(a!) output, int activation, float limit, float offset) -> ()",
    "glu_backward(Tensor grad_output, Tensor gate, Tensor value, Tensor(a!)? grad_gate, Tensor(b!)? grad_value,"
    " Tensor(c!)? output, int activation, float limit, float offset) -> ()",
    "bias_act_forward(Tensor input, Tensor? bias, Tensor? seed, Tensor(a!) output, int activation, float dropout_p)"
    " -> ()",
    "bias_act_backward(Tensor grad_output, Tensor input, Tensor? bias, Tensor? seed, Tensor(a!)? grad_input,"
    " Tensor(b!)? grad_bias, Tensor(c!)? output, int activation, float dropout_p) -> ()",
    "dyt_forward(Tensor input, Tensor alpha, Tensor? weight, Tensor? bias, Tensor(a!) output) -> ()",
    "dyt_backward(Tensor grad_output, Tensor input, Tensor alpha, Tensor? weight, Tensor(a!)? grad_input,"
    " Tensor(b!)? grad_alpha, Tensor(c!)? grad_weight, Tensor(d!)? grad_bias) -> ()",
    "rotary_forward(Tensor input, Tensor cos, Tensor sin, Tensor? weight, Tensor? bias, Tensor(a!) output,"
    " int rotary_dim, int start, bool interleaved, bool interleaved_output, int norm, float eps, float weight_offset,"
    " bool cast_before_weight) -> ()",
    "rotary_backward(Tensor grad_output, Tensor? input, Tensor cos, Tensor sin, Tensor? weight,"
    " Tensor(a!)? grad_input, Tensor(b!)? grad_weight, Tensor(c!)? grad_bias, int rotary_dim, int start,"
    " bool interleaved, bool interleaved_output, int norm, float eps, float weight_offset, bool cast_before_weight)"
    " -> ()",
    "channel_moments(Tensor input, Tensor(a!) mean, Tensor(b!) squares, bool planes, int piece_rows) -> ()",
    "channel_statistics(Tensor means, Tensor squares, Tensor(a!) mean, Tensor(b!) var, int groups, int size,"
    " int piece_rows) -> ()",
    "channel_coefficients(Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor(a!) coefficients, float eps)"
    " -> ()",
    "channel_backward_coefficients(Tensor first, Tensor second, Tensor var, Tensor? weight, Tensor(a!) coefficients,"
    " Tensor(b!)? grad_weight, Tensor(c!)? grad_bias, int groups, float count, float eps, bool fixed) -> ()",
    "channel_forward(Tensor input, Tensor? residual, Tensor coefficients, Tensor(a!) output, bool planes, int samples,"
    " int activation) -> ()",
    "channel_sums(Tensor grad_output, Tensor input, Tensor? other, Tensor coefficients, Tensor(a!) first,"
    " Tensor(b!) second, bool planes, int piece_rows, int activation, bool by_output) -> ()",
    "channel_backward(Tensor grad_output, Tensor input, Tensor? other, Tensor coefficients, Tensor(a!)? grad_input,"
    " Tensor(b!)? grad_residual, bool planes, int samples, int activation, bool by_output) -> ()",
    "channel_norm_forward(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor(a!) output,"
    " Tensor(b!) mean, Tensor(c!) var, bool planes, int samples, int piece_rows, int groups, float eps,"
    " int activation, bool given_statistics) -> ()",
    "channel_norm_backward(Tensor grad_output, Tensor input, Tensor? other, Tensor? weight, Tensor? bias, Tensor mean,"
    " Tensor var, Tensor(a!)? grad_input, Tensor(b!)? grad_residual, Tensor(c!)? grad_weight, Tensor(d!)? grad_bias,"
    " bool planes, int samples, int piece_rows, int groups, float count, float eps, bool fixed, int activation,"
    " bool by_output) -> ()",
    "map_norm_forward(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? mean, Tensor(b!) rstd, Tensor(c!) output,"
    " float eps, int activation, float weight_offset, bool cast_before_weight, bool given_statistics) -> ()",
    "map_norm_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor? mean, Tensor rstd,"
    " Tensor(a!)? grad_input, Tensor(b!)? grad_weight, Tensor(c!)? grad_bias, int activation, float weight_offset,"
    " bool cast_before_weight) -> ()",
    "cpu_isa() -> str",
)

_library = torch.library.Library("ckpt_kernels_native", "DEF")
for _schema in _SCHEMAS:
    _library.define(_schema)
_ops = torch.ops.ckpt_kernels_native


def _load(stem: str) -> str | None:
    """Load one library; return the reason if that fails, or None."""
    path = library(stem)
    if path is None:
        return f"the library {stem} was not built (docs/releasing.md, CKPT_KERNELS_BUILD)"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"the library {path.name} does not load: {error}"
    return None


def _load_cuda() -> str | None:
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    failure = _load("_C_cuda")
    if failure is None and not torch.cuda.is_available():
        return "loaded, but torch sees no CUDA device"
    return failure


_FAILURES = {"cpu": _load("_C"), "cuda": _load_cuda()}
_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


def why_not(device_type: str, dtype: torch.dtype) -> str | None:
    """Return the reason why this backend cannot serve a device and dtype, or None."""
    if device_type not in _FAILURES:
        return f"there is no library for {device_type}"
    if _FAILURES[device_type]:
        return _FAILURES[device_type]
    if dtype not in _DTYPES[device_type]:
        return f"it does not compute in {dtype} on {device_type}"
    return None


def cpu_isa() -> str:
    """Return the instruction set of the CPU loops that this process uses."""
    return _ops.cpu_isa()


_row_norm_forward, _row_norm_backward = _ops.row_norm_forward.default, _ops.row_norm_backward.default


def row_norm_forward(
    block: RowNorm, output: Tensor, residual_out: Tensor | None, given_statistics: bool = False
) -> None:
    """`backends.reference.row_norm_forward`."""
    *tensors, (_, eps, _, pre_activation, activation, *options) = block
    codes = CODES[pre_activation], CODES[activation]
    _row_norm_forward(*tensors, output, residual_out, eps, *codes, *options, given_statistics)


def row_norm_backward(
    block: RowNorm,
    grad_output: Tensor,
    grad_residual_out: Tensor | None,
    gradients: RowNormGradients,
    output: Tensor | None = None,
) -> None:
    """`backends.reference.row_norm_backward`."""
    input, _, *tensors, (_, _, _, pre_activation, activation, *options) = block
    codes = CODES[pre_activation], CODES[activation]
    _row_norm_backward(grad_output, grad_residual_out, input, *tensors, *gradients, output, *codes, *options)


_rotary_forward, _rotary_backward = _ops.rotary_forward.default, _ops.rotary_backward.default
# The codes of the norms before a rotation.
ROTARY_NORMS = {"none": 0, "rms": 1, "layer": 2}


def rotary_forward(block: Rotary, output: Tensor) -> None:
    """`backends.reference.rotary_forward`."""
    *tensors, options = block
    _rotary_forward(*tensors, output, *_rotary_arguments(options))


def rotary_backward(block: Rotary, grad_output: Tensor, gradients: RotaryGradients) -> None:
    """`backends.reference.rotary_backward`."""
    input, cos, sin, weight, _, options = block
    input = None if options.norm == "none" else input
    _rotary_backward(grad_output, input, cos, sin, weight, *gradients, *_rotary_arguments(options))


def _rotary_arguments(options: RotaryOptions) -> tuple:
    return (
        options.rotary_dim,
        options.start,
        options.interleaved,
        options.interleaved_output,
        ROTARY_NORMS[options.norm],
        options.eps,
        options.weight_offset,
        options.cast_before_weight,
    )


def _by_name(op: torch._ops.OpOverload, after: int) -> Callable[..., None]:
    """Wrap an op to accept the activation by name instead of code; `after` arguments follow the activation."""

    def launch(*arguments: object) -> None:
        activation, *rest = arguments[-1 - after :]
        op(*arguments[: -1 - after], CODES[activation], *rest)

    return launch


glu_forward = _by_name(_ops.glu_forward.default, 2)
glu_backward = _by_name(_ops.glu_backward.default, 2)
bias_act_forward = _by_name(_ops.bias_act_forward.default, 1)
bias_act_backward = _by_name(_ops.bias_act_backward.default, 1)
dyt_forward, dyt_backward = _ops.dyt_forward.default, _ops.dyt_backward.default
channel_moments = _ops.channel_moments.default
channel_forward = _by_name(_ops.channel_forward.default, 0)
channel_sums = _by_name(_ops.channel_sums.default, 1)
channel_backward = _by_name(_ops.channel_backward.default, 1)
# The devices with an op that computes all steps of a channel norm in one call.
WHOLE_CHANNEL_NORMS = ("cpu",)
channel_norm_forward = _by_name(_ops.channel_norm_forward.default, 1)
channel_norm_backward = _by_name(_ops.channel_norm_backward.default, 1)
# The devices with ops for row norms over the channels of maps.
MAP_NORMS = ("cpu",)
map_norm_forward = _by_name(_ops.map_norm_forward.default, 3)
map_norm_backward = _by_name(_ops.map_norm_backward.default, 2)


def _for_device(op: torch._ops.OpOverload, elsewhere: Callable[..., None]) -> Callable[..., None]:
    """Return a function that calls the op on the CPU, and `elsewhere` on CUDA.

    The CUDA library has no kernels for these steps, which plain torch computes on small tensors.
    """

    def launch(tensor: torch.Tensor, *arguments: object) -> None:
        (op if tensor.device.type == "cpu" else elsewhere)(tensor, *arguments)

    return launch


channel_statistics = _for_device(_ops.channel_statistics.default, reference.channel_statistics)
channel_coefficients = _for_device(_ops.channel_coefficients.default, reference.channel_coefficients)
channel_backward_coefficients = _for_device(
    _ops.channel_backward_coefficients.default, reference.channel_backward_coefficients
)

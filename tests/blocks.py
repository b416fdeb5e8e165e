"""The registry that the contract tests walk: every block, what eager torch would compute, what it may keep.

A new family is covered by all contracts once its blocks are added to `BLOCKS`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ckpt_kernels import functional
from ckpt_kernels.activations import NAMES
from ckpt_kernels.backends.reference import ACTIVATIONS

Operands = dict[str, Tensor]


@dataclass(frozen=True)
class Block:
    """One public function with one choice of options.

    `call` is ours, `eager` the same in eager torch; both take the operands by name and return a tuple of outputs.
    `kept` names the operands whose bytes the block may keep for backward; "output 1" is its second output.
    `packed` says that each row operand holds two rows of columns; `statistics` counts numbers kept for each row.
    Where there are `channels`, rows are (samples, channels, columns), the coefficients go by channel, and
    `channel_statistics` counts numbers kept for those samples and channels.
    """

    name: str
    function: str
    call: Callable[..., Sequence[Tensor]]
    eager: Callable[..., Sequence[Tensor]]
    rows: Sequence[str] = ("input",)
    coefficients: Sequence[str] = ("weight", "bias")
    samples: Sequence[str] = ()
    kept: Sequence[str] = ("input",)
    statistics: int = 2
    packed: bool = False
    channels: bool = False
    channel_statistics: Callable[[int, int], int] | None = None

    def operands(self, lead: Sequence[int], columns: int, dtype: torch.dtype, device: str, seed: int = 0) -> Operands:
        """Random operands, all wanting gradients; `lead` has at least two dimensions, of which the first is samples."""
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int, around: float = 0.0) -> Tensor:
            values = torch.randn(shape, generator=generator, dtype=torch.float64) + around
            return values.to(dtype).to(device).requires_grad_()

        found = {name: random(*lead, 2 * columns if self.packed else columns) for name in self.rows}
        length = lead[1] if self.channels else columns
        found |= {name: random(length, around=1.0 if name == "weight" else 0.0) for name in self.coefficients}
        found |= {name: random(lead[0], *[1] * (len(lead) - 1), columns) for name in self.samples}
        return found

    def statistics_kept(self, samples: int, tokens: int) -> int:
        """How many numbers beside the tensors it may keep for operands with that lead."""
        if self.channel_statistics is not None:
            return self.channel_statistics(samples, tokens)
        return samples * tokens * self.statistics


def _block(name: str, call: Callable, eager: Callable, function: str | None = None, **options: object) -> Block:
    def as_tuple(fn: Callable) -> Callable[..., tuple[Tensor, ...]]:
        def wrapped(**operands: Tensor) -> tuple[Tensor, ...]:
            outputs = fn(**operands)
            return outputs if isinstance(outputs, tuple) else (outputs,)

        return wrapped

    return Block(name, function or name, as_tuple(call), as_tuple(eager), **options)


def _rms_eps(x: Tensor) -> float:
    return torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps


def _layer_norm(pre: str, post: str) -> Block:
    def call(input, weight, bias):
        n = weight.shape
        return functional.layer_norm(input, n, weight, bias, activation=post, pre_activation=pre)

    def eager(input, weight, bias):
        return ACTIVATIONS[post](F.layer_norm(ACTIVATIONS[pre](input), weight.shape, weight, bias))

    return _block(f"layer_norm[{pre}->{post}]", call, eager, "layer_norm")


def _rms_norm(pre: str, post: str, offset: float = 0.0, cast: bool = False) -> Block:
    def call(input, weight):
        options = {"weight_offset": offset, "cast_before_weight": cast}
        n = weight.shape
        return functional.rms_norm(input, n, weight, 1e-6, activation=post, pre_activation=pre, **options)

    def eager(input, weight):
        u = ACTIVATIONS[pre](input)
        if cast:
            wide = u.float() if u.dtype != torch.float64 else u
            x_hat = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
            return ACTIVATIONS[post]((weight + offset) * x_hat.to(u.dtype))
        return ACTIVATIONS[post](F.rms_norm(u, weight.shape, weight + offset, 1e-6))

    name = f"rms_norm[{pre}->{post}{', offset' if offset else ''}{', cast' if cast else ''}]"
    return _block(name, call, eager, "rms_norm", coefficients=("weight",), statistics=1)


def _add_layer_norm(post: str) -> Block:
    def call(input, residual, weight, bias):
        return functional.add_layer_norm(input, residual, weight.shape, weight, bias, activation=post)

    def eager(input, residual, weight, bias):
        total = residual + input
        return ACTIVATIONS[post](F.layer_norm(total, weight.shape, weight, bias)), total

    options = {"rows": ("input", "residual"), "kept": ("output 1",)}
    return _block(f"add_layer_norm[{post}]", call, eager, "add_layer_norm", **options)


def _add_rms_norm(post: str) -> Block:
    def call(input, residual, weight):
        return functional.add_rms_norm(input, residual, weight.shape, weight, activation=post)

    def eager(input, residual, weight):
        total = residual + input
        return ACTIVATIONS[post](F.rms_norm(total, weight.shape, weight)), total

    options = {"rows": ("input", "residual"), "coefficients": ("weight",), "kept": ("output 1",), "statistics": 1}
    return _block(f"add_rms_norm[{post}]", call, eager, "add_rms_norm", **options)


def _gated_rms_norm(act: str, norm_before_gate: bool) -> Block:
    def call(input, gate, weight):
        options = {"activation": act, "norm_before_gate": norm_before_gate}
        return functional.gated_rms_norm(input, gate, weight.shape, weight, 1e-6, **options)

    def eager(input, gate, weight):
        factor = ACTIVATIONS[act](gate)
        if norm_before_gate:
            return F.rms_norm(input, weight.shape, weight, 1e-6) * factor
        return F.rms_norm(input * factor, weight.shape, weight, 1e-6)

    options = {"rows": ("input", "gate"), "coefficients": ("weight",), "kept": ("input", "gate"), "statistics": 1}
    order = "norm first" if norm_before_gate else "gate first"
    return _block(f"gated_rms_norm[{act}, {order}]", call, eager, "gated_rms_norm", **options)


def _modulated_layer_norm(post: str) -> Block:
    def call(input, scale, shift, weight, bias):
        return functional.modulated_layer_norm(input, scale, shift, weight.shape, weight, bias, activation=post)

    def eager(input, scale, shift, weight, bias):
        return ACTIVATIONS[post](F.layer_norm(input, weight.shape, weight, bias) * (1 + scale) + shift)

    options = {"samples": ("scale", "shift"), "kept": ("input", "scale", "shift")}
    return _block(f"modulated_layer_norm[{post}]", call, eager, "modulated_layer_norm", **options)


def _modulated_rms_norm(post: str) -> Block:
    def call(input, scale, shift, weight):
        return functional.modulated_rms_norm(input, scale, shift, weight.shape, weight, activation=post)

    def eager(input, scale, shift, weight):
        return ACTIVATIONS[post](F.rms_norm(input, weight.shape, weight) * (1 + scale) + shift)

    options = {"samples": ("scale", "shift"), "coefficients": ("weight",), "kept": ("input", "scale", "shift")}
    return _block(f"modulated_rms_norm[{post}]", call, eager, "modulated_rms_norm", statistics=1, **options)


def _glu(act: str) -> Block:
    def call(gate, value):
        return functional.glu(gate, value, activation=act)

    def eager(gate, value):
        return ACTIVATIONS[act](gate) * value

    options = {"rows": ("gate", "value"), "coefficients": (), "kept": ("gate", "value"), "statistics": 0}
    return _block(f"glu[{act}]", call, eager, "glu", **options)


def _packed_glu(act: str, layout: str) -> Block:
    def call(input):
        return functional.packed_glu(input, activation=act, layout=layout)

    def eager(input):
        first, second = (input[..., ::2], input[..., 1::2]) if layout == "interleaved" else input.chunk(2, -1)
        return first * ACTIVATIONS[act](second) if layout == "value_first" else ACTIVATIONS[act](first) * second

    options = {"coefficients": (), "statistics": 0, "packed": True}
    return _block(f"packed_glu[{act}, {layout}]", call, eager, "packed_glu", **options)


def _bias_act(act: str, kept: Sequence[str], bias: bool = True) -> Block:
    def call(input, bias=None):
        return functional.bias_act(input, bias, activation=act)

    def eager(input, bias=None):
        return ACTIVATIONS[act](input if bias is None else input + bias)

    options = {"coefficients": ("bias",) if bias else (), "kept": kept, "statistics": 0}
    return _block(f"bias_act[{act}{'' if bias else ', no bias'}]", call, eager, "bias_act", **options)


def _batch_norm(act: str, kept: Sequence[str] = ("input",), residual: bool = False) -> Block:
    def call(input, weight, bias, residual=None):
        options = {"activation": act, "residual": residual}
        return functional.batch_norm(input, None, None, weight, bias, training=True, **options)

    def eager(input, weight, bias, residual=None):
        y = F.batch_norm(input, None, None, weight, bias, training=True)
        return ACTIVATIONS[act](y if residual is None else y + residual)

    options = {"rows": ("input", "residual") if residual else ("input",), "kept": kept, "channels": True}
    options["channel_statistics"] = lambda samples, channels: 5 * channels
    return _block(f"batch_norm[{'add ' if residual else ''}{act}]", call, eager, "batch_norm", **options)


def _groups(channels: int) -> int:
    return 2 if channels % 2 == 0 else 1


def _group_norm(act: str) -> Block:
    def call(input, weight, bias):
        return functional.group_norm(input, _groups(input.shape[1]), weight, bias, activation=act)

    def eager(input, weight, bias):
        return ACTIVATIONS[act](F.group_norm(input, _groups(input.shape[1]), weight, bias))

    options = {
        "channels": True,
        "channel_statistics": lambda samples, channels: samples * (2 * _groups(channels) + 3 * channels),
    }
    return _block(f"group_norm[{act}]", call, eager, "group_norm", **options)


def _instance_norm(act: str) -> Block:
    def call(input, weight, bias):
        return functional.instance_norm(input, None, None, weight, bias, activation=act)

    def eager(input, weight, bias):
        return ACTIVATIONS[act](F.instance_norm(input, None, None, weight, bias))

    options = {"channels": True, "channel_statistics": lambda samples, channels: 5 * samples * channels}
    return _block(f"instance_norm[{act}]", call, eager, "instance_norm", **options)


# One of each function, for the contracts that do not depend on the activation.
BLOCKS = (
    _layer_norm("identity", "identity"),
    _layer_norm("identity", "gelu"),
    _rms_norm("identity", "identity"),
    _rms_norm("identity", "silu"),
    _rms_norm("silu", "identity", offset=1.0),
    _rms_norm("identity", "identity", cast=True),
    _add_layer_norm("identity"),
    _add_layer_norm("gelu_tanh"),
    _add_rms_norm("identity"),
    _add_rms_norm("silu"),
    _gated_rms_norm("silu", norm_before_gate=True),
    _gated_rms_norm("sigmoid", norm_before_gate=False),
    _modulated_layer_norm("identity"),
    _modulated_layer_norm("silu"),
    _modulated_rms_norm("identity"),
    _glu("silu"),
    _packed_glu("gelu", "gate_first"),
    _packed_glu("sigmoid", "value_first"),
    _packed_glu("silu", "interleaved"),
    _bias_act("gelu", kept=("input",)),
    _bias_act("silu", kept=("input",), bias=False),
    _bias_act("relu", kept=("output 0",)),
    _bias_act("identity", kept=()),
    _batch_norm("identity"),
    _batch_norm("relu"),
    _batch_norm("relu", kept=("input", "output 0"), residual=True),
    _batch_norm("silu", kept=("input", "residual"), residual=True),
    _batch_norm("identity", residual=True),
    _group_norm("identity"),
    _group_norm("silu"),
    _instance_norm("leaky_relu"),
)

# Every activation in every place that it can take.
ACTIVATION_BLOCKS = (
    *(_layer_norm("identity", name) for name in NAMES),
    *(_layer_norm(name, "identity") for name in NAMES),
    *(_gated_rms_norm(name, norm_before_gate=True) for name in NAMES),
    *(_gated_rms_norm(name, norm_before_gate=False) for name in NAMES),
    *(_glu(name) for name in NAMES),
    *(_bias_act(name, kept=()) for name in NAMES),
    *(_batch_norm(name) for name in NAMES),
    *(_batch_norm(name, residual=True) for name in NAMES),
)


def with_gradients(
    fn: Callable[..., Sequence[Tensor]], operands: Operands, grad_seed: int = 1_000_003
) -> dict[str, Tensor | None]:
    """Outputs ("output 0", ...) and gradients ("grad input", ...) for random incoming gradients."""
    generator = torch.Generator().manual_seed(grad_seed)
    outputs = fn(**operands)
    incoming = [
        torch.randn(y.shape, generator=generator, dtype=torch.float64).bfloat16().to(y.dtype).to(y.device)
        for y in outputs
    ]
    names = [name for name, t in operands.items() if t.requires_grad]
    found = torch.autograd.grad(outputs, [operands[name] for name in names], incoming, allow_unused=True)
    results = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    return results | {f"grad {name}": g for name, g in zip(names, found, strict=True)}


def in_float64(operands: Operands) -> Operands:
    return {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in operands.items()}

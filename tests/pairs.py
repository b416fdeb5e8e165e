"""The registry of blocks with the linear layers that read them: what eager torch computes, what each level keeps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ckpt_kernels import functional
from ckpt_kernels.backends.reference import ACTIVATIONS

from .blocks import Operands


@dataclass(frozen=True)
class Pair:
    """One function with one choice of options.

    `parameters` are the shapes of its weights and biases for an input of so many columns, by name. `kept` is how many
    elements for each token it may keep at each level, as a multiple of the columns, and `statistics` how many numbers
    in the compute type beside these.
    """

    name: str
    function: str
    ours: Callable[..., Tensor | tuple[Tensor, ...]]
    theirs: Callable[..., Tensor | tuple[Tensor, ...]]
    parameters: Callable[[int], dict[str, tuple[int, ...]]]
    kept: dict[str, float]
    statistics: int = 0

    def at(self, level: str) -> Callable[..., Sequence[Tensor]]:
        return lambda **operands: _tuple(self.ours(**operands, recompute=level))

    def call(self, **operands: Tensor) -> Sequence[Tensor]:
        return self.at("output")(**operands)

    def eager(self, **operands: Tensor) -> Sequence[Tensor]:
        return _tuple(self.theirs(**operands))

    def operands(self, lead: Sequence[int], columns: int, dtype: torch.dtype, device: str, seed: int = 0) -> Operands:
        generator = torch.Generator().manual_seed(seed)

        def random(shape: Sequence[int]) -> Tensor:
            scale = shape[-1] ** -0.5 if len(shape) == 2 else 1.0
            return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype).to(device)

        found: Operands = {"input": random((*lead, columns)).requires_grad_()}
        return found | {name: nn.Parameter(random(shape)) for name, shape in self.parameters(columns).items()}


def _tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _norm_linear() -> Pair:
    def ours(input, norm_weight, norm_bias, weight, bias, **options):
        n = norm_weight.shape
        return functional.norm_linear(input, n, norm_weight, norm_bias, weight, bias, activation="silu", **options)

    def theirs(input, norm_weight, norm_bias, weight, bias):
        return F.linear(F.silu(F.layer_norm(input, norm_weight.shape, norm_weight, norm_bias)), weight, bias)

    def parameters(n):
        return {"norm_weight": (n,), "norm_bias": (n,), "weight": (n + 3, n), "bias": (n + 3,)}

    return Pair(
        "norm_linear[layer_norm, silu]",
        "norm_linear",
        ours,
        theirs,
        parameters,
        {"block": 2, "output": 1, "all": 1},
        statistics=2,
    )


def _norm_linears() -> Pair:
    def ours(input, norm_weight, q, k, v, k_bias, **options):
        options |= {"norm": "rms_norm", "eps": 1e-6}
        n = norm_weight.shape
        return functional.norm_linear(input, n, norm_weight, None, (q, k, v), (None, k_bias, None), **options)

    def theirs(input, norm_weight, q, k, v, k_bias):
        y = F.rms_norm(input, norm_weight.shape, norm_weight, 1e-6)
        return F.linear(y, q), F.linear(y, k, k_bias), F.linear(y, v)

    def parameters(n):
        return {"norm_weight": (n,), "q": (n, n), "k": (3, n), "v": (5, n), "k_bias": (3,)}

    return Pair(
        "norm_linear[rms_norm, several]",
        "norm_linear",
        ours,
        theirs,
        parameters,
        {"block": 2, "output": 1, "all": 1},
        statistics=1,
    )


def _act_linear(activation: str, kept: dict[str, float]) -> Pair:
    def ours(input, weight, bias, **options):
        return functional.act_linear(input, weight, bias, activation=activation, **options)

    def theirs(input, weight, bias):
        return F.linear(ACTIVATIONS[activation](input), weight, bias)

    name = f"act_linear[{activation}]"
    return Pair(name, "act_linear", ours, theirs, lambda n: {"weight": (n + 1, n), "bias": (n + 1,)}, kept)


def _mlp(activation: str, kept: dict[str, float], bias: bool = True) -> Pair:
    def ours(input, weight1, weight2, bias1=None, bias2=None, **options):
        return functional.mlp(input, weight1, bias1, weight2, bias2, activation=activation, **options)

    def theirs(input, weight1, weight2, bias1=None, bias2=None):
        return F.linear(ACTIVATIONS[activation](F.linear(input, weight1, bias1)), weight2, bias2)

    def parameters(n):
        biases = {"bias1": (4 * n,), "bias2": (n,)} if bias else {}
        return {"weight1": (4 * n, n), "weight2": (n, 4 * n)} | biases

    return Pair(f"mlp[{activation}{'' if bias else ', no bias'}]", "mlp", ours, theirs, parameters, kept)


_GATED = {"block": 13, "output": 9, "all": 1}


def _gated_mlp(activation: str, bias: bool) -> Pair:
    def ours(input, gate_weight, value_weight, weight, gate_bias=None, value_bias=None, bias=None, **options):
        return functional.gated_mlp(
            input, gate_weight, value_weight, weight, gate_bias, value_bias, bias, activation=activation, **options
        )

    def theirs(input, gate_weight, value_weight, weight, gate_bias=None, value_bias=None, bias=None):
        gate, value = F.linear(input, gate_weight, gate_bias), F.linear(input, value_weight, value_bias)
        return F.linear(ACTIVATIONS[activation](gate) * value, weight, bias)

    def parameters(n):
        biases = {"gate_bias": (4 * n,), "value_bias": (4 * n,), "bias": (n,)} if bias else {}
        return {"gate_weight": (4 * n, n), "value_weight": (4 * n, n), "weight": (n, 4 * n)} | biases

    return Pair(f"gated_mlp[{activation}{', bias' if bias else ''}]", "gated_mlp", ours, theirs, parameters, _GATED)


def _packed_gated_mlp(layout: str) -> Pair:
    def ours(input, gate_weight, weight, gate_bias, **options):
        return functional.gated_mlp(input, gate_weight, None, weight, gate_bias, layout=layout, **options)

    def theirs(input, gate_weight, weight, gate_bias):
        packed = F.linear(input, gate_weight, gate_bias)
        gate, value = (packed[..., ::2], packed[..., 1::2]) if layout == "interleaved" else packed.chunk(2, -1)
        return F.linear(F.silu(gate) * value, weight)

    def parameters(n):
        return {"gate_weight": (8 * n, n), "weight": (n, 4 * n), "gate_bias": (8 * n,)}

    return Pair(f"gated_mlp[packed, {layout}]", "gated_mlp", ours, theirs, parameters, _GATED)


PAIRS = (
    _norm_linear(),
    _norm_linears(),
    _act_linear("gelu", {"block": 2, "output": 1, "all": 1}),
    _act_linear("relu", {"block": 1, "output": 1, "all": 1}),
    _mlp("gelu", {"block": 9, "output": 5, "all": 1}),
    _mlp("relu_squared", {"block": 9, "output": 5, "all": 1}, bias=False),
    _gated_mlp("silu", bias=False),
    _gated_mlp("gelu_tanh", bias=True),
    _packed_gated_mlp("gate_first"),
    _packed_gated_mlp("interleaved"),
)

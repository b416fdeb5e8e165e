"""Functions that several families share: activations and their derivatives, dropout, norms, gradients by autograd."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "relu_squared": lambda x: F.relu(x).square(),
    "elu": F.elu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "mish": F.mish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
    "softplus": F.softplus,
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
}


# grad * activation'(x), by the operators of torch's own backward passes. Autograd is not available where the dispatcher
# runs an op, as in torch.compile's graphs and in batched gradients.
SLOPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "identity": lambda grad, x: grad,
    "relu": lambda grad, x: aten.threshold_backward(grad, x, 0),
    "leaky_relu": lambda grad, x: aten.leaky_relu_backward(grad, x, 0.01, False),
    "relu_squared": lambda grad, x: aten.threshold_backward(grad * (2 * F.relu(x)), x, 0),
    "elu": lambda grad, x: aten.elu_backward(grad, 1, 1, 1, False, x),
    "gelu": lambda grad, x: aten.gelu_backward(grad, x),
    "gelu_tanh": lambda grad, x: aten.gelu_backward(grad, x, approximate="tanh"),
    "quick_gelu": lambda grad, x: _quick_gelu_slope(grad, x, torch.sigmoid(1.702 * x)),
    "silu": lambda grad, x: aten.silu_backward(grad, x),
    "mish": lambda grad, x: aten.mish_backward(grad, x),
    "sigmoid": lambda grad, x: aten.sigmoid_backward(grad, torch.sigmoid(x)),
    "tanh": lambda grad, x: aten.tanh_backward(grad, torch.tanh(x)),
    "hardswish": lambda grad, x: aten.hardswish_backward(grad, x),
    "softplus": lambda grad, x: aten.softplus_backward(grad, x, 1, 20),
    "relu6": lambda grad, x: aten.hardtanh_backward(grad, x, 0, 6),
    "hardtanh": lambda grad, x: aten.hardtanh_backward(grad, x, -1, 1),
}


def _quick_gelu_slope(grad: Tensor, x: Tensor, sigmoid: Tensor) -> Tensor:
    return grad * sigmoid + aten.sigmoid_backward(grad * x, sigmoid) * 1.702


def slope(activation: str, z: Tensor, grad: Tensor) -> Tensor:
    """grad * activation'(z)."""
    return SLOPES[activation](grad, z)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the arithmetic: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _low_32_bits(x: Tensor) -> Tensor:
    return x & 0xFFFFFFFF


def philox_bits(seed: Tensor, rows: int, columns: int) -> Tensor:
    """Return 32 random bits for each element of a (rows, columns) matrix, as int64.

    The bits are lane `column % 4` of Philox4x32-10 (Salmon et al., 2011) with the counter (column // 4, row, row >> 32,
    0) and the 64-bit `seed` as the key.
    """
    row = torch.arange(rows, device=seed.device).reshape(-1, 1)
    quad = torch.arange((columns + 3) // 4, device=seed.device).reshape(1, -1)
    zero = torch.zeros_like(row + quad)
    words = [quad + zero, _low_32_bits(row) + zero, (row >> 32) + zero, zero]
    # As a matrix: vmap over no batches fails on tensors without dimensions.
    seed = seed.reshape(1, 1)
    key = [_low_32_bits(seed), _low_32_bits(seed >> 32)]
    for _ in range(10):
        # The int64 products wrap around, but all their 64 bits are correct. The shift is arithmetic, so the high word
        # is masked.
        first, second = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
        words = [
            _low_32_bits(second >> 32) ^ words[1] ^ key[0],
            _low_32_bits(second),
            _low_32_bits(first >> 32) ^ words[3] ^ key[1],
            _low_32_bits(first),
        ]
        key = [_low_32_bits(key[0] + 0x9E3779B9), _low_32_bits(key[1] + 0xBB67AE85)]
    return torch.stack(words, dim=-1).flatten(1)[:, :columns]


def dropout(x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """Return x / (1 - p) where the element's Philox bits are at least p * 2**32, and 0 elsewhere."""
    if seed is None or p == 0:
        return x
    keep = philox_bits(seed, *x.shape) >= int(p * 4294967296.0)
    return torch.where(keep, x * (1 / (1 - p) if p < 1 else 0.0), 0.0)


def normalize(u: Tensor, eps: float, centered: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return x_hat, the mean (None unless centered) and rstd over the last dimension."""
    mean = u.mean(-1, keepdim=True) if centered else None
    if mean is not None:
        u = u - mean
    rstd = torch.rsqrt(u.square().mean(-1, keepdim=True) + eps)
    return u * rstd, None if mean is None else mean.squeeze(-1), rstd.squeeze(-1)


def gradients(
    block: Callable[..., Sequence[Tensor]],
    operands: Sequence[Tensor | None],
    grad_outputs: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Return autograd's gradients of block(*operands) for the wanted operands, and None for the others.

    `grad_outputs` are the gradients of the block's first outputs; None is zero. The gradients have an autograd graph if
    the caller's grad mode is on.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        outputs = block(*operands)
        pairs = [(y, g) for y, g in zip(outputs, grad_outputs, strict=False) if g is not None and y.requires_grad]
        sources = [operand for operand, w in zip(operands, wanted, strict=True) if w]
        results = iter(
            torch.autograd.grad(
                [y for y, _ in pairs],
                sources,
                [g for _, g in pairs],
                create_graph=create_graph,
                allow_unused=True,
                materialize_grads=True,
            )
            if sources and pairs
            else [torch.zeros_like(source) for source in sources]
        )
    return [next(results) if w else None for w in wanted]


def fill(targets: Sequence[Tensor | None], values: Sequence[Tensor | None]) -> None:
    """Copy each value into the target of the same position, where neither is None."""
    for target, value in zip(targets, values, strict=True):
        if target is not None and value is not None:
            target.copy_(value.reshape(target.shape))

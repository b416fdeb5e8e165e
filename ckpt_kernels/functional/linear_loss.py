"""A linear layer and the cross entropy of the logits, without the logits of all rows at one time."""

import math

import torch
import torch.nn.functional as functional
from torch import Tensor

from .. import ops
from ..arguments import count_or_none, number, one_of, probability, untraced, whole
from .checks import check_device, check_tensor, shape_of
from .linear import check_linear

_REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    r"""The cross entropy of a linear layer's output, with logits computed for one chunk of rows at a time.

    .. math::
        z = c \tanh\big((x W^\top + b) / c\big), \qquad
        \ell_i = \log \textstyle\sum_j e^{z_{ij}} - (1 - s)\, z_{i t_i} - s\, \frac{1}{C} \textstyle\sum_j z_{ij}

    with s the smoothing and C the number of classes; z = x W^T + b if `softcap` is None. Rows with the target
    `ignore_index` do not count. The losses of the rows are returned ("none", with 0 for rows that do not count), summed
    ("sum"), or averaged over the rows that count ("mean").

    The result is that of `F.cross_entropy(F.linear(input, weight, bias).float(), target, ...)`, without `float()` for
    float64 logits. For "mean" and "sum" the forward pass computes the gradients from the logits of each chunk. For
    "none" and for float16 the backward pass computes them, after it has repeated the product. Only required gradients
    are computed, and without any nothing is kept. Under autocast the products are in the autocast dtype. Under
    torch.compile and torch.func, and for gradients of gradients, the logits of all rows exist at one time.

    Args:
        input: x, `(*, in)`; float32, bfloat16, float16 or float64.
        weight: W, `(classes, in)`, of the input's dtype.
        target: t, `(*)`, int64: the class of each row, or `ignore_index`.
        bias: b, `(classes)`, of the input's dtype, or None.
        ignore_index: the target of rows that do not count. As in torch, the mean of none is nan.
        label_smoothing: s, the share of the target that is spread over all classes, from 0 to 1.
        reduction: "mean" over the rows that count, "sum", or "none".
        softcap: c, the limit of the capped logits, as in Gemma 2; None for no cap.
        chunk: the number of rows in a chunk; None chooses chunks whose logits have the input's size, of at least 256
            rows.

    Returns:
        A scalar, or `(*)` for "none"; float32, or float64 for float64 inputs.

    Kept for backward:
        The input; for "mean" and "sum", except in float16, also the required gradients. No logits.

    Raises:
        RuntimeError: a shape, dtype or device is not as described above.
        ValueError: the reduction is unknown, the smoothing is outside [0, 1], or `softcap` or `chunk` is not positive.
        TypeError: an argument is not of the expected type.

    Example:
        >>> x, weight = torch.randn(8, 64, requires_grad=True), torch.randn(1000, 64)
        >>> target = torch.randint(1000, (8,))
        >>> loss = F.linear_cross_entropy(x, weight, target)
        >>> torch.allclose(loss, torch.nn.functional.cross_entropy(x @ weight.T, target), atol=1e-4)
        True
        >>> saved_bytes(lambda: F.linear_cross_entropy(x, weight, target)) - weight.nbytes < 3 * x.nbytes
        True

    Source:
        Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024, for whole chunks of rows.
    """
    chunk, ignored = untraced(chunk), whole(ignore_index, "ignore_index")
    check_tensor(input, "input")
    if input.dim() == 0:
        raise RuntimeError("input has shape (); expected at least one dimension")
    columns, lead = input.shape[-1], input.shape[:-1]
    check_linear(weight, bias, "weight", "bias", columns, input)
    _check_target(target, input)
    one_of(reduction, _REDUCTIONS, "reduction")
    smoothing = probability(label_smoothing, "label_smoothing")
    cap = None if softcap is None else number(softcap, "softcap")
    if cap is not None and not 0 < cap < math.inf:
        raise ValueError(f"softcap is {softcap}; expected a positive finite number, or None")
    chunk = count_or_none(chunk, "chunk")

    def rows(logits: Tensor, target: Tensor) -> Tensor:
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        return functional.cross_entropy(
            logits, target, reduction="none", ignore_index=ignored, label_smoothing=smoothing
        )

    if not -(2**63) <= ignored < 2**63:
        raise ValueError(f"ignore_index is {ignored}; expected a number of 64 bits")
    matrix = ops.products.as_matrix(input)
    targets = target.reshape(-1)
    size = ops.linear_loss.default_chunk(len(matrix), columns, weight.shape[0]) if chunk is None else chunk
    loss = ops.linear_loss.Loss(rows, ops.products.product_dtype(input), size, ignored)
    count = ops.linear_loss.count_of(targets, input.dtype, ignored, reduction)
    output = ops.linear_loss.linear_loss(loss, matrix, weight, bias, targets, count)
    return output.reshape(lead) if reduction == "none" else output


def _check_target(target: Tensor, input: Tensor) -> None:
    if not isinstance(target, Tensor):
        raise TypeError(f"target is {type(target).__name__}; expected a tensor")
    if target.dtype != torch.int64:
        raise RuntimeError(f"target has dtype {target.dtype}; expected int64, the class of each row")
    check_device(target, "target", input)
    if target.shape != input.shape[:-1]:
        raise RuntimeError(f"target has shape {shape_of(target)}; expected {shape_of(input)[:-1]}, one for each row")

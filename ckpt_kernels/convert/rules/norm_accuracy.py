"""Comparison of the outputs and gradients of a fused norm with those of a module."""

import torch
from torch import Tensor

from .norms import Dtypes


def are_close(expected: list[Tensor], results: list[Tensor], dtypes: Dtypes, scale: float) -> bool:
    """Whether outputs round alike and gradients are close, with equal shapes and output strides."""
    if any(a.shape != b.shape for a, b in zip(expected, results, strict=True)):
        return False
    if expected[0].stride() != results[0].stride():
        return False
    # Roundings at other places change a tenth of all results and more, and 1 % is allowed to differ. Beside a wide
    # weight, the fused norm may be more exact on narrow inputs; there only the dtype of the output is in question.
    narrow = dtypes[0].itemsize < 4
    rtol = 1e-5 if not narrow else 0.0 if dtypes[0] == dtypes[1] else 0.02
    (output, *gradients), (other, *others) = ([t.double() for t in tensors] for tensors in (expected, results))
    if (~torch.isclose(output, other, rtol=rtol, atol=1e-6 * scale)).double().mean() > 0.01:
        return False
    allowed = 0.05 if narrow else 1e-4
    return all((a - b).abs().max() <= allowed * a.abs().max() + 1e-12 for a, b in zip(gradients, others, strict=True))


def are_as_exact(truth: list[Tensor], expected: list[Tensor], results: list[Tensor]) -> bool:
    """Whether results are as close to the truth as the module's, which rounds more often, with equal output strides."""
    if any(a.shape != b.shape for a, b in zip(expected, results, strict=True)):
        return False
    if expected[0].stride() != results[0].stride():
        return False
    for true, other, result in zip(truth, expected, results, strict=True):
        error, allowed = ((t.double() - true).abs().max() for t in (result, other))
        if not error <= 1.5 * allowed + torch.finfo(result.dtype).eps * true.abs().max():
            return False
    return True

"""Subclasses of torch's norms that cast before and after: a trial recognises them if they cast only to dtypes. Of
others the norm of `super()` is fused alone."""

import pytest
import torch
from torch import Tensor, nn

import ckpt_kernels

from .conversion import WIDTH, close, kept, random_tensor, reason_of, replacement_of, results_of, twins


class Typed(nn.LayerNorm):
    """The layer norm of CLIP."""

    def forward(self, h: Tensor) -> Tensor:
        original = h.dtype
        output = super().forward(h.type(torch.float32))
        return output.type(original)


class InOneLine(nn.LayerNorm):
    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h.float()).type(h.dtype)


class RootMeanSquare(nn.RMSNorm):
    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h.type(dtype=torch.float32)).type(h.dtype)


FOUND = {Typed: "layer_norm", InOneLine: "layer_norm", RootMeanSquare: "rms_norm"}


def between(norm: type[nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 3 * WIDTH), norm(3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH))


@pytest.mark.parametrize("kind", FOUND, ids=lambda kind: kind.__name__)
def test_norms_that_cast_are_recognised(kind: type[nn.Module]) -> None:
    model, twin = twins(lambda: between(kind))
    assert replacement_of(ckpt_kernels.convert(model), "1") == FOUND[kind]
    assert close(results_of(model, random_tensor(64, WIDTH)), results_of(twin, random_tensor(64, WIDTH)), 1e-5)
    # In units of the input: 1 and 3, and the norm's statistics, of 7 in eager torch. The norm's output is not kept.
    assert kept(model, random_tensor(64, WIDTH)) / kept(twin, random_tensor(64, WIDTH)) <= 4.1 / 7


@pytest.mark.parametrize("kind", FOUND, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_norms_that_cast_return_the_same_dtype(kind: type[nn.Module], dtype: torch.dtype) -> None:
    model, twin = twins(lambda: kind(WIDTH))
    ckpt_kernels.convert(model)
    given = random_tensor(64, WIDTH, dtype=dtype)
    ours, theirs = results_of(model, given), results_of(twin, given)
    assert ours["output"].dtype == theirs["output"].dtype == dtype
    assert close(ours, theirs, 0.02 if dtype == torch.bfloat16 else 0.003)


class ByName(nn.LayerNorm):
    """Computes another function on a GPU."""

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h) * (1 + ("cuda" in h.type()))


class Elsewhere(nn.LayerNorm):
    """Returns a tensor on the CPU, whatever the input's device."""

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h).to("cpu")


class CastByName(nn.LayerNorm):
    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h).type("torch.FloatTensor")


class Wider(nn.LayerNorm):
    """Rounds to float64, in which the fused norm does not compute."""

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h).type(torch.float64).type(h.dtype)


@pytest.mark.parametrize("kind", (ByName, Elsewhere, CastByName, Wider), ids=lambda kind: kind.__name__)
def test_with_other_casts_only_the_norm_of_super_is_fused(kind: type[nn.Module]) -> None:
    model, twin = twins(lambda: nn.Sequential(kind(WIDTH)))
    report = ckpt_kernels.convert(model)
    assert replacement_of(report, "0") == "layer_norm" and reason_of(report, "0") is None
    for dtype in (torch.float32, torch.float64):
        given = random_tensor(64, WIDTH, dtype=dtype)
        ours, theirs = (results_of(each.to(dtype), given) for each in (model, twin))
        assert ours["output"].dtype == theirs["output"].dtype
        assert close(ours, theirs, 1e-5)

"""Functions that resemble rotations but are none: they run unchanged, and the report says why."""

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor, nn

import ckpt_kernels
from ckpt_kernels.convert.rotations.recognition import rotation_of

from .test_convert_rotations import COLUMNS, HEADS, KEYS, Attention, halves, rotary_entry, rotate_half

_COUNT = [0]


def counts(q, k, cos, sin):
    _COUNT.append(1)
    return halves(q, k, cos, sin)


def decides(q, k, cos, sin):
    if q.shape[-2] > 64:
        return q, k
    return halves(q, k, cos, sin)


def names_a_bound(q, k, cos, sin):
    q, k = halves(q, k, cos, sin)
    return torch.cat((q[..., :4096, :] * 1, q[..., 4096:, :] * 2), -2), k


BOUND = 64


def names_a_global_bound(q, k, cos, sin):
    turned, k = halves(q, k, cos, sin)
    return torch.cat((turned[..., :BOUND], q[..., BOUND:]), -1), k


def has_a_bound_by_default(q, k, cos, sin, bound=64):
    turned, k = halves(q, k, cos, sin)
    return torch.cat((turned[:, :, :bound], q[:, :, bound:]), -2), k


def turns_four_heads(q, k, cos, sin):
    turned, k = halves(q, k, cos, sin)
    return torch.cat((turned[:, :4], q[:, 4:]), 1), k


def turns_two_samples(q, k, cos, sin):
    turned, k = halves(q, k, cos, sin)
    return torch.cat((turned[:2], q[2:]), 0), k


def splits_by_a_number(q, k, cos, sin):
    first, *rest = halves(q, k, cos, sin)[0].split(4, 1)
    return torch.cat((first, *rest), 1), k


def multiplies_by_many_halves(q, k, cos, sin):
    q, k = halves(q, k, cos, sin)
    return q * (1 + q.shape[-1] // 2 // 2 // 2 // 2 // 2 // 2), k


def shifts_a_size(q, k, cos, sin):
    q, k = halves(q, k, cos, sin)
    return q * (1 + (q.shape[-1] >> 3 >> 3)), k


def compares_a_size(q, k, cos, sin):
    q, k = halves(q, k, cos, sin)
    c = 4
    return q * (1 + (q.shape[-1] > c * c * c)), k


def unpacks_a_shape(q, k, cos, sin):
    q, k = halves(q, k, cos, sin)
    _, _, _, columns = q.shape
    return q * (1 + columns // 2 // 2 // 2 // 2 // 2 // 2), k


def divides_a_size(q, k, cos, sin):
    q, k = halves(q, k, cos, sin)
    return q * (1 + q.shape[-1] // 4 // 4 // 4), k


def gives_a_size_another_value(q, k, cos, sin):
    q, k = halves(q, k, cos, sin)
    size = q.shape[-1]
    size = size
    return q * (1 + size // 2 // 2 // 2 // 2 // 2 // 2), k


def takes_every_third(q, k, cos, sin):
    q, k = halves(q, k, cos, sin)
    return torch.cat((q[..., ::3], q[..., 1::3], q[..., 2::3]), -1), k


def writes_to_a_table(q, k, cos, sin):
    turned = halves(q, k, cos, sin)
    torch.neg(sin, out=sin)
    return turned


def in_place(q, k, cos, sin):
    return q.mul_(cos.unsqueeze(1)) + rotate_half(q) * sin.unsqueeze(1), k


def detached(q, k, cos, sin):
    return halves(q.detach(), k, cos, sin)


def without_gradients(q, k, cos, sin):
    with torch.no_grad():
        return halves(q, k, cos, sin)


def swaps(q, k, cos, sin):
    q, k = halves(q, k, cos, sin)
    return k, q


def scales(q, k, cos, sin):
    q, k = halves(q, k, cos, sin)
    return q * 2, k


def mixes(q, k, cos, sin):
    q, k = halves(q, k, cos, sin)
    return q + 0 * k.sum(), k


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * grad


def with_a_function(q, k, cos, sin):
    return halves(Scaled.apply(q), k, cos, sin)


def in_16_bits(q, k, cos, sin):
    q, k = halves(q.bfloat16(), k.bfloat16(), cos.bfloat16(), sin.bfloat16())
    return q.float(), k.float()


def drops(q, k, cos, sin):
    return halves(TF.dropout(q, 0.1), k, cos, sin)


def prints(q, k, cos, sin):
    print(q.shape)
    return halves(q, k, cos, sin)


def remembers(q, k, cos, sin, cache=[]):  # noqa: B006
    return halves(q, k, cos, sin)


def of_any(*args, **kwargs):
    return halves(*args, **kwargs)


def apply_rotary_scaled(q, k, cos, sin):
    return scales(q, k, cos, sin)


def apply_rotary_by_size(q, k, cos, sin):
    return decides(q, k, cos, sin)


def rotate_all(q):
    return -q


class Reported(Attention):
    def forward(self, x, cos, sin):
        q = self.q(x).unflatten(-1, (HEADS, COLUMNS)).transpose(1, 2)
        k = self.k(x).unflatten(-1, (KEYS, COLUMNS)).transpose(1, 2)
        return apply_rotary_named(q, k, cos, sin)


class RotatesItself(Attention):
    def forward(self, x, cos, sin):
        q = self.q(x)
        return q * cos + rotate_all(q) * sin


apply_rotary_named = apply_rotary_scaled


@pytest.mark.parametrize(
    ("function", "reason"),
    [(apply_rotary_scaled, "rotates in no way that the rotary op supports"),
     (apply_rotary_by_size, "names a number that a trial may not reach"),
     (of_any, "takes arguments in a way of its own"), (rotate_all, "takes something else than one or two heads")],
)  # fmt: skip
def test_the_report_says_why(function: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "apply_rotary_named", function)
    model = nn.Sequential(RotatesItself() if function is rotate_all else Reported())
    (entry,) = (entry for entry in ckpt_kernels.convert(model).left_alone if "calls" in entry.reason)
    assert entry.name == "0" and entry.reason.startswith(f"calls {function.__name__}, which {reason}")
    report = ckpt_kernels.convert(model, exclude=["0"])
    assert not any("calls" in entry.reason for entry in report.left_alone)


def test_the_report_of_a_fused_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "apply_rotary_named", halves)
    report = ckpt_kernels.convert(nn.Sequential(Reported()))
    assert rotary_entry(report) == "rotary" and not report.left_alone


@pytest.mark.parametrize(
    "function",
    [counts, decides, names_a_bound, names_a_global_bound, has_a_bound_by_default, turns_four_heads,
     turns_two_samples, splits_by_a_number, multiplies_by_many_halves, shifts_a_size, compares_a_size,
     unpacks_a_shape, divides_a_size, gives_a_size_another_value,
     takes_every_third, writes_to_a_table, in_place, detached,
     without_gradients, swaps, scales, mixes,
     with_a_function, in_16_bits, drops, prints, remembers, of_any, sys.getsizeof, TF.scaled_dot_product_attention],
    ids=lambda function: function.__name__,
)  # fmt: skip
def test_other_functions_are_no_rotations(function: Any) -> None:
    count = len(_COUNT)
    assert rotation_of(function) is None
    assert len(_COUNT) == count

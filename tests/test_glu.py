"""Gated linear units: packed layouts, strides, limits and offsets, torch's own module, and errors."""

import pytest
import torch

from ckpt_kernels import functional as F
from ckpt_kernels import nn
from ckpt_kernels.memory import saved_bytes
from ckpt_kernels.ops import glu
from ckpt_kernels.ops.glu import unpack

from .conftest import DEVICE, serving

LAYOUTS = ("gate_first", "value_first", "interleaved")


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("columns", [1, 2, 7, 33, 128, 2100])
def test_packed_equals_the_two_halves(layout: str, columns: int, backend: str) -> None:
    packed = randn(3, 5, 2 * columns)
    ours = F.packed_glu(packed, layout=layout)
    gate, value = unpack(packed, layout)
    theirs = torch.nn.functional.silu(gate) * value
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    g = torch.randn_like(ours)
    (a,), (e,) = torch.autograd.grad(ours, packed, g), torch.autograd.grad(theirs, packed, g)
    torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dim", [-1, 0, 1, -2])
def test_the_module_is_torchs(dim: int) -> None:
    x = randn(4, 6, 10)
    torch.testing.assert_close(nn.GLU(dim)(x), torch.nn.GLU(dim)(x))
    interleaved = nn.GLU(dim, layout="interleaved", activation="silu")(x)
    gate, value = unpack(x.movedim(dim, -1), "interleaved")
    torch.testing.assert_close(interleaved, (torch.nn.functional.silu(gate) * value).movedim(-1, dim))
    torch.testing.assert_close(nn.GLU(activation="gelu")(x, x), torch.nn.functional.gelu(x) * x)


def test_halves_of_one_product_are_not_copied(backend: str) -> None:
    """Two views of one tensor keep this tensor, and are read without a copy."""
    product = randn(4, 3, 64).detach()
    gate, value = (half.requires_grad_() for half in product.chunk(2, -1))
    assert saved_bytes(F.glu, gate, value) == product.nbytes
    torch.testing.assert_close(F.glu(gate, value), torch.nn.functional.silu(gate) * value)


def test_views_that_overlap_are_not_taken_for_interleaved(backend: str) -> None:
    """Gate and value are views of one tensor at offsets that differ by one element."""
    wide = randn(3, 65).detach()
    gate, value = wide[:, :64], wide[:, 1:]
    torch.testing.assert_close(F.glu(gate, value), torch.nn.functional.silu(gate) * value)


EXPANDED = {
    "the dimension before it": (randn(1, 6, 1, 8).expand(3, 6, 4, 8), 1),
    "the last": (randn(6, 1).expand(6, 8), 0),
    "all but it": (randn(1, 4, 1).expand(5, 4, 3), 1),
    "itself": (randn(2, 1, 3).expand(2, 4, 3).transpose(0, 2), 1),
    "a permuted one": (randn(1, 3, 2, 4).expand(5, 3, 2, 4).permute(3, 0, 2, 1), 2),
}


@pytest.mark.parametrize("expanded", EXPANDED)
def test_outputs_of_expanded_inputs_have_torchs_strides(expanded: str, backend: str) -> None:
    input, dim = EXPANDED[expanded]
    found, expected = nn.GLU(dim)(input), torch.nn.GLU(dim)(input)
    assert found.stride() == expected.stride()
    torch.testing.assert_close(found, expected)
    assert nn.GLU(dim, layout="gate_first")(input).stride() == expected.stride()


def limited(gate: torch.Tensor, value: torch.Tensor, limit: float) -> torch.Tensor:
    """The limited gate of GPT-OSS."""
    gate, value = gate.clamp(max=limit), value.clamp(-limit, limit)
    return (value + 1) * (gate * torch.sigmoid(1.702 * gate))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_limits_equal_torchs_clamp_also_at_the_limits(layout: str, backend: str) -> None:
    edges = torch.tensor([-7.5, -7.0, -0.5, 0.0, 3.0, 7.0, 7.5, float("inf")], device=DEVICE)
    gate, value = edges.repeat_interleave(8), edges.repeat(8)
    pair = [value, gate] if layout == "value_first" else [gate, value]
    packed = torch.stack(pair, -1).reshape(1, -1) if layout == "interleaved" else torch.cat(pair)[None]
    packed.requires_grad_()
    expected = limited(*unpack(packed, layout), 7.0)
    (slopes,) = torch.autograd.grad(expected.sum(), packed)
    options = {"activation": "quick_gelu", "limit": 7.0, "offset": 1.0}
    for found in (
        F.packed_glu(packed, layout=layout, **options),
        F.glu(*unpack(packed, layout), **options),
        nn.GLU(layout=layout, **options)(packed),
    ):
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found.sum(), packed)[0], slopes)


CHOICES = ({}, {"limit": 0.5}, {"limit": 0.25}, {"offset": 1.0}, {"offset": -2.0}, {"limit": 0.5, "offset": 1.0})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_limit_and_offset_are_read_at_each_call_of_one_shape(layout: str, backend: str) -> None:
    packed = randn(4, 16)
    gate, value = (part.detach().clone().requires_grad_() for part in unpack(packed, layout))
    g = torch.randn_like(gate)
    for options in CHOICES:
        limit, offset = options.get("limit", float("inf")), options.get("offset", 0.0)
        expected = torch.nn.functional.silu(gate.clamp(max=limit)) * (value.clamp(-limit, limit) + offset)
        slopes = torch.autograd.grad(expected, (gate, value), g)
        found = F.glu(gate, value, **options)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, (gate, value), g), slopes)
        found = F.packed_glu(packed, layout=layout, **options)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(unpack(torch.autograd.grad(found, packed, g)[0], layout), slopes)


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_module_applies_limits_along_every_dimension(layout: str, dim: int) -> None:
    options = {"activation": "quick_gelu", "limit": 0.5, "offset": 1.0}
    module = nn.GLU(dim, layout=layout, **options)
    for x in (randn(4, 6, 8), randn(4, 6, 1).expand(4, 6, 8), randn(8, 6, 4).transpose(0, 2)):
        gate, value = unpack(x.movedim(dim, -1), layout)
        torch.testing.assert_close(module(x), limited(gate, value, 0.5).movedim(-1, dim))
    torch.testing.assert_close(module(x, 2 * x), limited(x, 2 * x, 0.5))
    assert repr(module).endswith(", limit=0.5, offset=1.0)")


@pytest.mark.parametrize("stops", [False, True])
def test_gradients_at_the_limits_are_those_of_either_clamp(
    stops: bool, served: tuple[str, torch.dtype], without_plans: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's clamp has the gradient 1 at the limit itself; 0 from torch 2.14 on."""
    backend, dtype = served
    monkeypatch.setattr(glu, "CLAMP_STOPS_AT_LIMIT", stops)
    gate = torch.tensor([-7.0, 1.0, 7.0, 9.0], dtype=dtype, device=DEVICE).requires_grad_()
    value = torch.tensor([7.0, -7.0, 1.0, -9.0], dtype=dtype, device=DEVICE).requires_grad_()
    through = {"gate": [1, 1, 1 - stops, 0], "value": [1 - stops, 1 - stops, 1, 0]}
    slope = torch.func.grad(lambda u: torch.nn.functional.silu(u).sum())(gate.detach().double().clamp(max=7))
    expected = torch.stack((value.detach().clamp(-7, 7) * slope, torch.nn.functional.silu(gate.clamp(max=7))))
    expected = expected.detach().double() * torch.tensor(list(through.values()), device=DEVICE)
    with serving(backend):
        for _ in range(2):  # the second call is made by a plan
            found = torch.autograd.grad(F.glu(gate, value, limit=7.0).sum(), (gate, value))
            packed = torch.cat((gate, value)).detach().requires_grad_()
            (of_packed,) = torch.autograd.grad(F.packed_glu(packed, limit=7.0).sum(), packed)
            for pair in (torch.stack(found), of_packed.view(2, 4)):
                torch.testing.assert_close(pair.double(), expected, rtol=8 * torch.finfo(dtype).eps, atol=0)


def test_limits_propagate_nan(backend: str) -> None:
    nan, one = torch.tensor([float("nan"), 1.0], device=DEVICE).repeat(8, 1).unbind(1)
    for gate, value in ((nan, one), (one, nan)):
        assert F.glu(gate.contiguous(), value.contiguous(), limit=7.0).isnan().all()


def test_the_gradient_recomputes_the_limited_output(backend: str) -> None:
    packed = randn(3, 14).detach()
    options = glu.PackedOptions("silu", "interleaved", 0.5, 1.0)
    for operands in ((packed,), tuple(part.contiguous() for part in unpack(packed, "interleaved"))):
        expected = glu.forward(operands, options)
        _, output = glu.gradient(torch.ones_like(expected), operands, options, (True, True), rewrite=True)
        torch.testing.assert_close(output, expected)


X = torch.randn(4, 8)
BAD = {
    "not a tensor": (lambda: F.glu([1.0], X), TypeError, "gate is list"),
    "shape": (lambda: F.glu(X, X[:3]), RuntimeError, r"value has shape \(3, 8\); expected the gate's, \(4, 8\)"),
    "dtype": (lambda: F.glu(X, X.half()), RuntimeError, "value has dtype torch.float16; expected the gate's"),
    "device": (lambda: F.glu(X, X.to("meta")), RuntimeError, "value is on meta; expected it on cpu, where gate is"),
    "activation": (lambda: F.glu(X, X, activation="swish"), ValueError, "activation is 'swish'"),
    "odd": (
        lambda: F.packed_glu(X[:, :7]),
        RuntimeError,
        r"input has shape \(4, 7\); expected a last dimension of even",
    ),
    "scalar": (lambda: F.packed_glu(X[0, 0]), RuntimeError, r"input has shape \(\); expected"),
    "module's dim": (lambda: nn.GLU(5)(X), IndexError, "dim is 5; expected a dimension of input"),
    "module's scalar": (lambda: nn.GLU()(X[0, 0]), RuntimeError, r"input has shape \(\); expected at least one"),
    "module's odd dim": (lambda: nn.GLU(0)(X[:3]), RuntimeError, "expected dimension 0 of even length"),
    "module's layout": (lambda: nn.GLU(layout="mixed"), ValueError, "layout is 'mixed'"),
    "limit": (lambda: F.glu(X, X, limit=-7.0), ValueError, "limit is -7.0; expected a number above 0, or None"),
    "limit of nan": (lambda: F.packed_glu(X, limit=float("nan")), ValueError, "limit is nan"),
    "offset": (lambda: F.glu(X, X, offset="1"), TypeError, "offset is '1'; expected a number"),
    "packed offset": (lambda: F.packed_glu(X, offset=None), TypeError, "offset is None; expected a number"),
    "limit of another kind": (lambda: F.glu(X, X, limit="7"), TypeError, "limit is '7'; expected a number"),
    "module's limit": (lambda: nn.GLU(limit=0), ValueError, "limit is 0"),
    "layout": (lambda: F.packed_glu(X, layout="mixed"), ValueError, "layout is 'mixed'; expected one of gate_first"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_named_error(case: str) -> None:
    call, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        call()


def test_every_backend_agrees_on_every_layout() -> None:
    packed = randn(5, 74)
    with serving("reference"):
        expected = [F.packed_glu(packed, layout=layout) for layout in LAYOUTS]
    for found, layout in zip(expected, LAYOUTS, strict=True):
        torch.testing.assert_close(F.packed_glu(packed, layout=layout), found, rtol=1e-5, atol=1e-5)

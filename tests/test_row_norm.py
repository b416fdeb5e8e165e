"""Row norms: options, dropout, strided rows, and errors of bad input."""

import pytest
import torch

from ckpt_kernels import functional as F
from ckpt_kernels import nn
from ckpt_kernels.ops import operands, row_norm

from .conftest import DEVICE, serving, unserved


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()


def test_llamas_rounding_is_matched_to_the_bit(backend: str) -> None:
    """weight * x_hat.to(input dtype), as in transformers."""
    if backend == "triton" and DEVICE == "cpu":
        pytest.skip("Triton's interpreter truncates to bfloat16 where hardware rounds")
    torch.manual_seed(0)
    x, w = randn(8, 64, dtype=torch.bfloat16), randn(64, dtype=torch.bfloat16)
    wide = x.float()
    expected = w * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).bfloat16()
    found = F.rms_norm(x, 64, w, 1e-6, cast_before_weight=True)
    # The two float32 values of x_hat may differ in the last place, and then round to different neighbours.
    assert (found == expected).float().mean() > 0.99
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)


def test_gemmas_offset(backend: str) -> None:
    x, w = randn(8, 64), randn(64)
    torch.testing.assert_close(
        F.rms_norm(x, 64, w, 1e-6, weight_offset=1.0), torch.nn.functional.rms_norm(x, (64,), 1 + w, 1e-6)
    )
    assert (nn.RMSNorm(4, weight_offset=1.0).weight == 0).all()


def test_weight_and_bias_are_each_optional(backend: str) -> None:
    x, w, b = randn(6, 20), randn(20), randn(20)
    for weight in (w, None):
        for bias in (b, None):
            ours = F.layer_norm(x, 20, weight, bias, activation="silu")
            theirs = torch.nn.functional.silu(torch.nn.functional.layer_norm(x, (20,), weight, bias))
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
            sources = [t for t in (x, weight, bias) if t is not None]
            for a, e in zip(
                torch.autograd.grad(ours.square().sum(), sources),
                torch.autograd.grad(theirs.square().sum(), sources),
                strict=True,
            ):
                torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


def test_eps_none_is_torchs() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = randn(4, 16, dtype=dtype).detach() * 1e-4
        torch.testing.assert_close(F.rms_norm(x, 16), torch.nn.functional.rms_norm(x, (16,)))


@pytest.mark.parametrize("shape", [(3, 7), (3, 1, 7), (3, 5, 7)])
def test_modulation_shapes(shape: tuple, backend: str) -> None:
    x, scale, shift = randn(3, 5, 7), randn(*shape), randn(*shape)
    expanded = [t if t.dim() == 3 else t[:, None] for t in (scale, shift)]
    ours = F.modulated_layer_norm(x, scale, shift, 7)
    theirs = torch.nn.functional.layer_norm(x, (7,)) * (1 + expanded[0]) + expanded[1]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    sources = (x, scale, shift)
    for a, e in zip(
        torch.autograd.grad(ours.square().sum(), sources),
        torch.autograd.grad(theirs.square().sum(), sources),
        strict=True,
    ):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


def dropped(x: torch.Tensor, p: float, seed: int = 0, **options: object) -> torch.Tensor:
    """dropout(x), as the residual_out for a residual of zeros."""
    torch.manual_seed(seed)
    return F.add_rms_norm(x, torch.zeros_like(x), x.shape[-1], dropout_p=p, **options)[1]


def test_every_backend_draws_the_same_mask() -> None:
    for columns, dtype in ((1, torch.float32), (30, torch.float32), (20000, torch.float32), (256, torch.bfloat16)):
        x = torch.ones(3, columns, device=DEVICE, dtype=dtype)
        masks = []
        for name in ("reference", "native", "triton", "cuda_on_host"):
            if not unserved(name, x.dtype):
                with serving(name):
                    masks.append(dropped(x, 0.5))
        assert len(masks) >= 2
        for mask in masks[1:]:
            assert torch.equal(mask, masks[0])


def test_keep_rate_is_within_four_sigma() -> None:
    p, x = 0.3, torch.ones(2500, 4000, device=DEVICE)
    kept = (dropped(x, p) != 0).double().mean().item()
    assert abs(kept - (1 - p)) < 4 * (p * (1 - p) / x.numel()) ** 0.5


def test_dropout_of_zero_and_one_is_exact(backend: str) -> None:
    x = randn(4, 33)
    assert torch.equal(dropped(x, 0.0), x)
    assert (dropped(x, 1.0) == 0).all()
    assert torch.equal(dropped(x, 0.7, training=False), x)
    for block in (nn.AddRMSNorm(33, dropout=0.7), nn.AddLayerNorm(33, dropout=0.7)):
        assert torch.equal(block.to(DEVICE).eval()(x, torch.zeros_like(x))[1], x)


@pytest.mark.parametrize("columns", [40, 1100, 17000])
def test_dropout_gradients_use_the_forward_mask(columns: int, backend: str) -> None:
    """In every column, since kernels draw the factors of some hundred columns at a time."""
    x, residual = randn(3, columns), randn(3, columns)
    torch.manual_seed(3)
    y, total = F.add_layer_norm(x, residual, columns, dropout_p=0.4)
    mask = dropped(torch.ones_like(x), 0.4, seed=3)
    torch.testing.assert_close(total, residual + x * mask)
    grad_x, grad_residual = torch.autograd.grad((y.sin() + total).sum(), (x, residual))
    torch.testing.assert_close(grad_x, grad_residual * mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("centered", [True, False])
def test_statistics_are_those_of_the_sum_as_it_is_stored(centered: bool, dtype: torch.dtype, backend: str) -> None:
    """Bit for bit in the storage dtype, because the backward pass and recomputations read the stored sum."""
    x, residual = randn(5, 40, dtype=dtype).detach(), randn(5, 40, dtype=dtype).detach()
    options, absent = row_norm.RowNormOptions(40, 1e-5, centered, activation="silu"), (None,) * 6
    output, total = row_norm.row_norm(x, residual, *absent, options)
    alone, nothing = row_norm.row_norm(total, None, *absent, options)
    assert torch.equal(output, alone) and nothing is None


def test_dropout_follows_torchs_generator_and_checkpoint() -> None:
    x = torch.ones(16, 64, device=DEVICE)
    assert torch.equal(dropped(x, 0.5, seed=1), dropped(x, 0.5, seed=1))
    assert not torch.equal(dropped(x, 0.5, seed=1), dropped(x, 0.5, seed=2))
    leaf = x.clone().requires_grad_()
    block = nn.AddLayerNorm(64, dropout=0.5).to(DEVICE)
    out, total = torch.utils.checkpoint.checkpoint(block, leaf, torch.zeros_like(leaf), use_reentrant=False)
    total.sum().backward()
    assert torch.equal(leaf.grad != 0, total != 0)


def test_dropout_keeps_no_mask() -> None:
    from ckpt_kernels.memory import saved_bytes

    x, residual = randn(64, 256), randn(64, 256)
    kept = saved_bytes(F.add_rms_norm, x, residual, 256, dropout_p=0.5)
    assert kept == x.nbytes + 64 * 4 + 8


X = torch.randn(4, 8)
BAD = {
    "not a tensor": (lambda: F.layer_norm([1.0], 8), TypeError, "input is list"),
    "integers": (lambda: F.layer_norm(X.long(), 8), NotImplementedError, "input has dtype torch.int64"),
    "booleans": (lambda: F.rms_norm(X > 0, 8), NotImplementedError, "input has dtype torch.bool"),
    "complex numbers": (lambda: F.rms_norm(X + 0j, 8), NotImplementedError, "input has dtype torch.complex64"),
    "too few dimensions of rms_norm": (
        lambda: F.rms_norm(X[0], (4, 8)),
        ValueError,
        r"input has shape \(8,\); expected.*\(4, 8\)",
    ),
    "too few of layer_norm": (lambda: F.layer_norm(X[0], (4, 8)), RuntimeError, r"input has shape \(8,\)"),
    "a scalar": (lambda: nn.RMSNorm(8)(X[0, 0]), ValueError, r"input has shape \(\); expected.*\(8,\)"),
    "wrong normalized_shape": (lambda: F.layer_norm(X, 7), RuntimeError, r"input has shape \(4, 8\).*\(7,\)"),
    "empty normalized_shape": (lambda: F.layer_norm(X, ()), RuntimeError, "normalized_shape is empty"),
    "wrong weight": (lambda: F.rms_norm(X, 8, X[0, :7]), RuntimeError, r"weight has shape \(7,\); expected.*\(8,\)"),
    "wrong bias": (lambda: F.layer_norm(X, 8, None, X), RuntimeError, r"bias has shape \(4, 8\)"),
    "meta weight": (lambda: F.rms_norm(X, 8, X[0].to("meta")), RuntimeError, "weight is on meta; expected it on cpu"),
    "unknown activation": (lambda: F.layer_norm(X, 8, activation="swish"), ValueError, "activation is 'swish'"),
    "unknown pre_activation": (lambda: F.rms_norm(X, 8, pre_activation=3), ValueError, "pre_activation is 3"),
    "leaky slope": (
        lambda: F.layer_norm(X, 8, activation=torch.nn.LeakyReLU(0.2)),
        ValueError,
        "activation is LeakyReLU",
    ),
    "p of 1.5": (lambda: F.add_rms_norm(X, X, 8, dropout_p=1.5), ValueError, "dropout_p is 1.5"),
    "p of nan": (lambda: F.add_rms_norm(X, X, 8, dropout_p=float("nan")), ValueError, "dropout_p is nan"),
    "residual shape": (lambda: F.add_layer_norm(X, X[:3], 8), RuntimeError, r"residual has shape \(3, 8\)"),
    "residual dtype": (lambda: F.add_layer_norm(X, X.half(), 8), RuntimeError, "residual has dtype torch.float16"),
    "gate shape": (lambda: F.gated_rms_norm(X, X[0], 8), RuntimeError, r"gate has shape \(8,\)"),
    "scale shape": (lambda: F.modulated_layer_norm(X, X[:3], X, 8), RuntimeError, r"scale has shape \(3, 8\)"),
    "scale columns": (lambda: F.modulated_layer_norm(X, X[:, :4], X, 8), RuntimeError, r"scale has shape \(4, 4\)"),
    "scale of another batch": (
        lambda: F.modulated_rms_norm(X[:1], X, X, 8),
        RuntimeError,
        r"scale has shape \(4, 8\).*input, which has shape \(1, 8\)",
    ),
    "scale with more dimensions": (
        lambda: F.modulated_layer_norm(X, X.view(2, 2, 8), X, 8),
        RuntimeError,
        r"scale has shape \(2, 2, 8\)",
    ),
    "scale and shift of different samples": (
        lambda: F.modulated_layer_norm(X.view(2, 2, 8), X[:2], X.view(2, 2, 8), 8),
        RuntimeError,
        r"shift has shape \(2, 2, 8\); expected that of scale, \(2, 8\)",
    ),
    "scale is no tensor": (lambda: F.modulated_rms_norm(X, 1.0, X, 8), TypeError, "scale is float"),
    "meta shift": (lambda: F.modulated_rms_norm(X, X, X.to("meta"), 8), RuntimeError, "shift is on meta"),
    "modulated weight": (
        lambda: F.modulated_layer_norm(X, X, X, 8, X[0, :7]),
        RuntimeError,
        r"weight has shape \(7,\); expected \(8,\)",
    ),
    "modulated bias": (
        lambda: F.modulated_layer_norm(X, X, X, 8, None, X),
        RuntimeError,
        r"bias has shape \(4, 8\)",
    ),
    "shift shape": (lambda: F.modulated_rms_norm(X, X, X[:, :4], 8), RuntimeError, r"shift has shape \(4, 4\)"),
    "module dropout": (lambda: nn.AddLayerNorm(8, dropout=-1), ValueError, "dropout is -1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_named_error(case: str) -> None:
    call, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        call()


def test_extra_repr_shows_non_default_options() -> None:
    assert "activation='gelu_tanh'" in repr(nn.LayerNorm(8, activation=torch.nn.GELU("tanh")))
    assert repr(nn.LayerNorm(8)) == repr(torch.nn.LayerNorm(8))
    assert "weight_offset=1.0" in repr(nn.RMSNorm(8, weight_offset=1.0))
    assert "dropout=0.5" in repr(nn.AddRMSNorm(8, dropout=0.5))
    assert "norm_before_gate=False" in repr(nn.GatedRMSNorm(8, norm_before_gate=False))


def heads(layout: str, dtype: torch.dtype) -> torch.Tensor:
    """The heads of q in (batch, tokens, heads, 32) or (batch, heads, tokens, 32), as views of one projection."""
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(2, 5, 3 * 4 * 32, generator=generator).to(DEVICE, dtype)
    q = packed.view(2, 5, 3, 4, 32)[:, :, 0]
    return {"packed": q, "transposed": q.transpose(1, 2), "first token": q[:, :1], "one head": q[:, :, 1]}[layout]


@pytest.mark.parametrize("layout", ["packed", "transposed", "first token", "one head"])
def test_strided_heads_are_read_without_a_copy(layout: str, served: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """In forward and backward, including the incoming gradient, which attention returns transposed."""
    _, dtype = served
    q = heads(layout, dtype)
    weight = (torch.arange(32, device=DEVICE) / 32 + 0.5).to(dtype)
    grad = heads(layout, dtype) * 0.5

    def run(q: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
        q, w = q.detach().requires_grad_(), weight.clone().requires_grad_()
        y = F.rms_norm(q, 32, w)
        return [y, *torch.autograd.grad(y, (q, w), grad)]

    expected = run(q.contiguous(), grad.contiguous())
    strided_rows = operands.strided_rows

    def checked(tensor: torch.Tensor, columns: int) -> torch.Tensor:
        rows = strided_rows(tensor, columns)
        assert rows.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        return rows

    monkeypatch.setattr(row_norm, "strided_rows", checked)
    for found, value in zip(run(q, grad), expected, strict=True):
        assert torch.equal(found, value)


def test_rows_with_more_than_three_strides_are_copied() -> None:
    x = torch.randn(3, 2, 4, 5, 8, device=DEVICE).permute(3, 1, 2, 0, 4).requires_grad_()
    torch.testing.assert_close(F.layer_norm(x, 8), torch.nn.functional.layer_norm(x, (8,)))


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize(("shape", "normalized"), [((3, 0), (0,)), ((0, 0), (0,)), ((3, 0, 4), (0, 4))])
def test_rows_without_elements(kind: str, shape: tuple[int, ...], normalized: tuple[int, ...]) -> None:
    found = []
    for module in (getattr(nn, kind)(normalized), getattr(torch.nn, kind)(normalized)):
        x = torch.randn(shape, device=DEVICE, requires_grad=True)
        y = module.to(DEVICE)(x)
        y.sum().backward()
        found.append((y.shape, y.stride(), x.grad.shape, [p.grad.shape for p in module.parameters()]))
    assert found[0] == found[1]


@pytest.mark.parametrize("processors", [2, 2000])
def test_sums_of_weight_gradients_in_a_kernel_of_their_own(processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For rows whose sums do not fit a program: over more than a tile of rows, by one program or several, with a scale
    and a shift for each sample."""
    if reason := unserved("triton", torch.float32):
        pytest.skip(reason)
    from ckpt_kernels.backends.triton import launch

    monkeypatch.setattr(launch, "processors", lambda device: processors)
    # As if a program had registers for the sums of 64 columns.
    monkeypatch.setattr(launch, "BACKWARD_TILE", 64)
    columns = 100
    assert not launch.sums_fit(columns, False)
    x, scale, shift, g = randn(2, 35, columns), randn(2, 1, columns), randn(2, 1, columns), randn(2, 35, columns)
    found = []
    for backend in ("triton", "reference"):
        with serving(backend):
            y = F.modulated_layer_norm(x, scale, shift, columns)
            found.append(torch.autograd.grad(y, (x, scale, shift), g))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_rows_in_flight_fit_the_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads of two further steps are in flight if they fit three quarters of the shared memory; else none."""
    if reason := unserved("triton", torch.float32):
        pytest.skip(reason)
    from ckpt_kernels.backends.triton import launch

    monkeypatch.setattr(launch, "recorded_shared_memory", 227 * 1024)
    meta, narrow, wide = torch.device("meta"), torch.empty(1, dtype=torch.bfloat16), torch.empty(1)
    for columns, rows, stages in (
        (4096, (narrow, None, narrow, None), 3),
        (8192, (wide, None, wide, None), 3),
        (9000, (wide, None, wide, wide), 1),
    ):
        tile = launch.backward_tile(columns)
        assert launch.stages_of(tile, rows, meta) == stages
        read = tile.block * tile.rows * sum(t.element_size() for t in rows if t is not None)
        assert (stages - 1) * read <= launch.shared_memory(meta) * 3 // 4

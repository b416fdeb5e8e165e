"""`recompute.layer`: the tensors that a layer keeps, the ops that its backward pass runs again, and equal gradients."""

import contextlib
import gc
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ckpt_kernels import functional as F
from ckpt_kernels import nn as ours
from ckpt_kernels.memory import saved_bytes
from ckpt_kernels.recompute import discard_outputs, layer

from .conftest import DEVICE

WIDTH, HEADS, TOKENS = 64, 4, 96
PRODUCTS = ("mm", "addmm", "linear")


class Layer(nn.Module):
    """A transformer layer with norms before ("pre") or after ("post") attention and MLP, or both ("sandwich")."""

    def __init__(self, norms: str = "pre", fused: bool = True, causal: bool = True) -> None:
        super().__init__()
        self.norms, self.fused, self.causal = norms, fused, causal
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.mlp = ours.GatedMLP(WIDTH, 3 * WIDTH, recompute="all")
        self.first, self.second, self.third, self.fourth = (ours.RMSNorm(WIDTH) for _ in range(4))
        angles = torch.outer(torch.arange(TOKENS), 10000.0 ** -torch.linspace(0, 1, WIDTH // HEADS // 2))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = (linear(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        q, k = F.rotary_qk(q, k, self.cos, self.sin, rotary_dim=WIDTH // HEADS)
        return self.o(TF.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(-2))

    def forward(self, x: Tensor) -> Tensor:
        if self.norms == "post":
            x = self.first(x + self.attention(x))
            return self.second(x + self.mlp(x))
        if self.norms == "sandwich":
            x = x + self.second(self.attention(self.first(x)))
            return x + self.fourth(self.mlp(self.third(x)))
        attended = self.attention(self.first(x))
        if not self.fused:
            x = x + attended
            return x + self.mlp(self.second(x))
        normed, total = F.add_rms_norm(attended, x, WIDTH, self.second.weight, self.second.eps)
        return total + self.mlp(normed)


def made(**options: Any) -> tuple[Layer, Tensor]:
    torch.manual_seed(0)
    model = Layer(**options).to(DEVICE)
    return model, torch.randn(2, TOKENS, WIDTH, device=DEVICE).requires_grad_()


def gradients(call: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(call(x).square().mean(), [x, *model.parameters()], allow_unused=True))


def assert_same_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    for f, e in zip(found, expected, strict=True):
        assert (f is None) == (e is None)
        assert f is None or torch.equal(f, e)


OPTIONS: list[dict[str, Any]] = [{}, {"fused": False}, {"norms": "post"}, {"norms": "sandwich"}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_layer_gradients_equal_eager(options: dict[str, Any]) -> None:
    model, x = made(**options)
    assert_same_bits(gradients(layer(model), model, x), gradients(model, model, x))


def small_tensors(model: Layer) -> int:
    """Bytes of the small tensors that a layer keeps: rstd of two norms, attention's logsumexp for each head, rotary
    tables, copies of the biases of products that run again, and on CUDA the state of attention's generator."""
    seeds = 0 if DEVICE == "cpu" else 2 * 8
    return (2 + HEADS) * 2 * TOKENS * 4 + 4 * WIDTH * 4 + model.cos.nbytes + model.sin.nbytes + seeds


def test_layer_keeps_input_and_attention_output() -> None:
    model, x = made()
    assert saved_bytes(layer(model), x) == 2 * x.nbytes + small_tensors(model)


def test_stacked_layers_keep_nothing_more() -> None:
    models = [made()[0] for _ in range(3)]

    def stack(x: Tensor) -> Tensor:
        for model in models:
            x = layer(model)(x)
        return x

    _, x = made()
    assert saved_bytes(stack, x) == 3 * (2 * x.nbytes + small_tensors(models[0]))


@pytest.mark.parametrize(
    ("options", "sums"), [({"fused": False}, 1), ({"norms": "post"}, 1), ({"norms": "sandwich"}, 1)]
)
def test_plain_sums_are_kept(options: dict[str, Any], sums: int) -> None:
    """Only the operands that norms made are known to be unwritten, so other sums are kept. Products that norms read run
    again."""
    model, x = made(**options)
    assert saved_bytes(layer(model), x) <= (2 + sums + 0.5) * x.nbytes + 2 * small_tensors(model)
    assert saved_bytes(layer(model), x) < 0.55 * saved_bytes(model, x)


class Post(nn.Module):
    """A converted layer with norms after the sums, as in BERT, and a copy of attention's output before the product."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o, self.up, self.down = (nn.Linear(WIDTH, WIDTH) for _ in range(6))
        self.first, self.second = ours.LayerNorm(WIDTH), ours.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (linear(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        attended = TF.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        x, total = F.add_layer_norm(self.o(attended.clone().flatten(-2)), x, WIDTH, self.first.weight, self.first.bias)
        hidden = F.bias_act(self.up(x), activation="gelu")
        return F.add_layer_norm(self.down(hidden), x, WIDTH, self.second.weight, self.second.bias)[0]


def test_recipes_end_at_layer_boundaries() -> None:
    """With norms last, each layer keeps as much as the first."""
    torch.manual_seed(0)
    model = nn.ModuleList(Post() for _ in range(4)).to(DEVICE)
    x = torch.randn(2, TOKENS, WIDTH, device=DEVICE).requires_grad_()

    def run(count: int, around: Callable[..., Any] = layer) -> Tensor:
        y = x
        with discard_outputs(model, products=True) if around is layer else contextlib.nullcontext():
            for block in model[:count]:
                y = around(block)(y)
            return y

    kept = [saved_bytes(run, count, parameters_of=model) for count in (2, 4)]
    # The layer's input and attention's output; the rest is statistics and copies of biases.
    assert (kept[1] - kept[0]) / 2 <= 2.5 * x.nbytes
    sources = [x, *model.parameters()]
    found, expected = (
        torch.autograd.grad(run(4, around).square().mean(), sources, allow_unused=True)
        for around in (layer, lambda module: module)
    )
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def test_keyword_arguments_and_dict_results_are_boundaries() -> None:
    model, x = made()

    def forward(*, hidden: Tensor) -> dict[str, list[Tensor]]:
        return {"hidden": [model(hidden)]}

    def stack(x: Tensor) -> Tensor:
        for _ in range(2):
            x = layer(forward)(hidden=x)["hidden"][0]
        return x

    assert saved_bytes(stack, x) <= 2 * (2 * x.nbytes + small_tensors(model))
    assert_same_bits(gradients(stack, model, x), gradients(lambda x: model(model(x)), model, x))


class OpCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def backward_ops(call: Callable[[Tensor], Tensor], x: Tensor) -> Counter[str]:
    """The number of calls of each op in the backward pass."""
    output = call(x)
    with OpCounter() as counter:
        output.sum().backward()
    return counter.counts


def test_backward_runs_products_again_but_not_attention() -> None:
    """Six of the seven products run again."""
    model, x = made()
    plain, recomputed = backward_ops(model, x), backward_ops(layer(model), x)
    products = [sum(counts[name] for name in PRODUCTS) for counts in (plain, recomputed)]
    # The MLP's level "all" runs gate and value again in both.
    assert products[1] - products[0] == 4
    assert not [name for name in recomputed if "attention" in name and "backward" not in name]


def test_attention_as_explicit_matmuls() -> None:
    model, x = made()

    def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return (q @ k.transpose(-1, -2)).softmax(-1) @ v

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TF, "scaled_dot_product_attention", attention)
        assert_same_bits(gradients(layer(model), model, x), gradients(model, model, x))
        assert saved_bytes(layer(model), x) < saved_bytes(model, x)


def test_in_place_writes_to_input_and_output() -> None:
    """A write to the output is harmless; a write to the layer's input after the call is torch's own error."""
    model, x = made()

    def writes(x: Tensor) -> Tensor:
        start = x * 1
        output = layer(model)(start)
        output.mul_(2)
        return output + 0 * start

    def plain(x: Tensor) -> Tensor:
        return model(x * 1).mul(2)

    assert_same_bits(gradients(writes, model, x), gradients(plain, model, x))

    def too_late(x: Tensor) -> Tensor:
        start = x * 1
        output = layer(model)(start)
        start.add_(1)
        return output

    with pytest.raises(RuntimeError, match=r"modified by an in-?place operation"):
        gradients(too_late, model, x)


@pytest.mark.parametrize("around", ["layer", "discard", "checkpoint", "frozen", "no gradient of x", "twice"])
def test_layer_composes_with(around: str) -> None:
    model, x = made()
    call: Callable[[Tensor], Tensor] = layer(model)
    plain: Callable[[Tensor], Tensor] = model
    if around == "layer":
        call = layer(layer(model))
    elif around == "discard":
        call = discard_outputs()(call)
    elif around == "checkpoint":
        inner = call
        call = lambda x: checkpoint(inner, x, use_reentrant=False)  # noqa: E731
    elif around == "frozen":
        for linear in (model.q, model.o, model.mlp):
            linear.requires_grad_(False)
        found, expected = (torch.autograd.grad(c(x).square().mean(), x) for c in (call, plain))
        assert torch.equal(*found, *expected)
        return
    elif around == "no gradient of x":
        x = x.detach()
        parameters = [p for p in model.parameters() if p is not model.third.weight and p is not model.fourth.weight]
        found, expected = (list(torch.autograd.grad(c(x).square().mean(), parameters)) for c in (call, plain))
        assert_same_bits(found, expected)
        return
    else:
        loss = call(x).square().mean()
        first = torch.autograd.grad(loss, [x], retain_graph=True)
        assert torch.equal(*first, *torch.autograd.grad(loss, [x]))
    assert_same_bits(gradients(call, model, x), gradients(plain, model, x))


def other_forwards() -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """Forwards of layers that are no transformers, with their operands."""
    torch.manual_seed(0)
    lin, other = nn.Linear(WIDTH, WIDTH).to(DEVICE), nn.Linear(WIDTH, WIDTH).to(DEVICE)
    x = torch.randn(16, WIDTH, device=DEVICE).requires_grad_()
    ones = torch.ones(WIDTH, device=DEVICE)

    def drops(x: Tensor) -> Tensor:
        torch.manual_seed(1)
        y, total = F.add_rms_norm(lin(x), x, WIDTH, ones, dropout_p=0.5)
        return other(y) + total

    def parts(x: Tensor) -> Tensor:
        a, b = (x * 1).chunk(2, -1)
        return layer(lambda a, b: TF.silu(b + a))(a, b)

    def writes(x: Tensor) -> Tensor:
        z = x + lin.bias
        with torch.no_grad():
            x.mul_(2)
        return other(TF.silu(z))

    def picks(x: Tensor) -> Tensor:
        n = F.rms_norm(x, WIDTH, ones)
        rows, columns = torch.arange(8, device=DEVICE), torch.arange(WIDTH, device=DEVICE).flip(0)
        return other(n[rows[:, None], columns])

    return {
        "drops": (drops, [x]),
        "parts": (parts, [x]),
        "writes": (lambda x: layer(writes)(x * 1), [x]),
        "picks": (picks, [x]),
    }


@pytest.mark.parametrize("name", ["drops", "parts", "writes", "picks"])
def test_other_layers_gradients_equal_eager(name: str) -> None:
    forward, operands = other_forwards()[name]
    expected = torch.autograd.grad(forward(*operands).square().sum(), operands)
    with pytest.MonkeyPatch.context() as patch:
        if name in ("parts", "writes"):
            # These call `layer` themselves; the expected gradients are without a layer.
            patch.setitem(globals(), "layer", lambda function: function)
            expected = torch.autograd.grad(forward(*operands).square().sum(), operands)
    found = torch.autograd.grad(layer(forward)(*operands).square().sum(), operands)
    assert torch.equal(*found, *expected)


def test_products_after_an_error_in_a_layer_are_kept() -> None:
    lin, other = nn.Linear(WIDTH, WIDTH).to(DEVICE), nn.Linear(WIDTH, WIDTH).to(DEVICE)
    x = torch.randn(16, WIDTH, device=DEVICE).requires_grad_()

    def fails(x: Tensor) -> Tensor:
        raise ValueError("no")

    def after(x: Tensor) -> Tensor:
        with pytest.raises(ValueError, match="no"):
            layer(fails)(x)
        return other(lin(x))

    kept = [saved_bytes(discard_outputs()(call), x) for call in (after, lambda x: other(lin(x)))]
    assert kept[0] == kept[1]


def test_an_error_in_a_layer_changes_no_later_call() -> None:
    model, x = made()

    def fails(x: Tensor) -> Tensor:
        model(x)
        raise ValueError("no")

    with discard_outputs():
        with pytest.raises(ValueError, match="no"):
            layer(fails)(x)
        assert_same_bits(gradients(model, model, x), gradients(model, model, x))
    plain = saved_bytes(model, x)
    with pytest.raises(ValueError, match="no"):
        layer(fails)(x)
    assert saved_bytes(model, x) == plain


def test_second_gradients() -> None:
    model, x = made(causal=False)

    def second(call: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            (grad,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
            return torch.autograd.grad(grad.square().sum(), x)[0]

    torch.testing.assert_close(second(layer(model)), second(model), rtol=1e-4, atol=1e-4)


def test_input_and_output_are_freed_with_the_graph() -> None:
    model, x = made()
    start = x * 1
    output = layer(model)(start)
    references = [weakref.ref(start), weakref.ref(output)]
    output.sum().backward()
    del start, output
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_compiled_layer_gradients() -> None:
    model, x = made()
    expected = gradients(model, model, x)
    found = gradients(torch.compile(layer(model), backend="aot_eager"), model, x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

"""Layers with frozen weights and LoRA: saved bytes at each level, compared with the floor."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import ckpt_kernels
from ckpt_kernels.convert.adapters import is_adapter
from ckpt_kernels.memory import saved_bytes

from .conftest import DEVICE

WIDTH, INNER, RANK, TOKENS = 32, 86, 2, 64
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Adapter(nn.Module):
    """A hand-written LoRA layer."""

    def __init__(self, base: nn.Linear, p: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.drop = nn.Dropout(p) if p else nn.Identity()
        self.down = nn.Linear(base.in_features, RANK, bias=False)
        self.up = nn.Linear(RANK, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * self.up(self.down(self.drop(x)))


def test_adapters_are_recognised_by_their_matrices() -> None:
    frozen, deep = nn.Linear(2, 2).requires_grad_(False), nn.Sequential(nn.Sequential(nn.Linear(2, 2)))
    assert is_adapter(Adapter(nn.Linear(2, 2), 0.1)) and is_adapter(nn.ModuleList([frozen, nn.Linear(2, 2), deep]))
    # All trained or all frozen; a trained vector; a lazy matrix; an adapter one level deeper.
    for others in ([nn.Linear(2, 2)], [frozen], [frozen, nn.LayerNorm(2)], [frozen, nn.LazyLinear(2)]):
        assert not is_adapter(nn.ModuleList(others))
    assert not is_adapter(nn.ModuleList([frozen, Adapter(nn.Linear(2, 2), 0.1)]))


def llama(layers: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        use_cache=False,
        vocab_size=32,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=4,
    )
    return transformers.LlamaModel(config).to(DEVICE)


def by_hand(layers: int, p: float) -> nn.Module:
    model = llama(layers).requires_grad_(False)
    for layer in model.layers:
        for holder in (layer.self_attn, layer.mlp):
            for name in NAMES:
                if hasattr(holder, name):
                    setattr(holder, name, Adapter(getattr(holder, name), p).to(DEVICE))
    return model


def by_hand_in_attention(layers: int, p: float) -> nn.Module:
    """Adapters of queries and values alone; the MLP is frozen."""
    model = llama(layers).requires_grad_(False)
    for layer in model.layers:
        for name in ("q_proj", "v_proj"):
            setattr(layer.self_attn, name, Adapter(getattr(layer.self_attn, name), p).to(DEVICE))
    return model


def by_peft(layers: int, p: float) -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(
        llama(layers), peft.LoraConfig(r=RANK, lora_dropout=p, target_modules=list(NAMES))
    ).train()


def ids() -> Tensor:
    return torch.arange(TOKENS, device=DEVICE)[None] % 32


def kept_by_layer(adapted: Callable[[int, float], nn.Module], p: float, level: str | None) -> float:
    """The bytes that one more layer keeps, in units of a tensor of (tokens, width)."""
    kept = []
    for layers in (2, 3):
        model = adapted(layers, p)
        if level is not None:
            ckpt_kernels.convert(model, recompute=level)
        kept.append(saved_bytes(lambda model=model: model(input_ids=ids()), parameters_of=model))
    return (kept[1] - kept[0]) / (TOKENS * WIDTH * 4)


def gradients(model: nn.Module) -> list[Tensor]:
    model.zero_grad()
    model(input_ids=ids()).last_hidden_state.square().mean().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


# Small tensors besides the floor: statistics, seeds, and the outputs of `down`.
SMALL = 7 * RANK / WIDTH + 0.3
either = pytest.mark.parametrize("adapted", [by_hand, by_peft])


@either
def test_layers_keep_their_floor(adapted: Callable[[int, float], nn.Module]) -> None:
    eager, inner = kept_by_layer(adapted, 0.0, None), INNER / WIDTH
    # Inputs of both norms, rotated queries and keys, values, attention's output, gate and value.
    floors = {"output": 6 + 2 * inner, "all": 6 + inner, "layer": 2}
    found = {level: kept_by_layer(adapted, 0.0, level) for level in floors}
    for level, floor in floors.items():
        assert floor <= found[level] <= floor + SMALL, level
    assert found["layer"] <= 0.35 * eager


def test_a_frozen_mlp_keeps_its_products_only_at_output() -> None:
    # Inputs of both norms, rotated queries and keys, values, attention's output; of the MLP gate and value.
    floors = {"output": 6 + 2 * INNER / WIDTH, "all": 6, "layer": 2}
    for level, floor in floors.items():
        assert floor <= kept_by_layer(by_hand_in_attention, 0.0, level) <= floor + SMALL, level


@pytest.mark.parametrize(("inner", "level"), [(WIDTH, "all"), (WIDTH // 2 - 1, "output")])
def test_frozen_products_run_again_where_they_are_larger_than_their_input(inner: int, level: str) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(WIDTH, inner), nn.Linear(WIDTH, inner), nn.Linear(inner, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(nn.functional.silu(self.gate(x)) * self.up(x))

    def saved(recompute: str) -> int:
        model = Gated().to(DEVICE).requires_grad_(False)
        ckpt_kernels.convert(model, recompute=recompute)
        # The input is not kept for anything else.
        return saved_bytes(lambda: model(torch.randn(TOKENS, WIDTH, device=DEVICE, requires_grad=True) + 1))

    assert saved("all") <= saved("output")
    assert (saved("all") < saved("output")) is (level == "all")


@either
def test_layers_keep_their_floor_with_dropout(adapted: Callable[[int, float], nn.Module]) -> None:
    eager, inner = kept_by_layer(adapted, 0.1, None), INNER / WIDTH
    found = {level: kept_by_layer(adapted, 0.1, level) for level in ("output", "layer")}
    # No mask is kept, and only the outputs of the dropouts before the last products of attention and MLP.
    assert found["output"] <= 7 + 3 * inner + SMALL
    assert found["layer"] <= min(3 + inner + SMALL, 0.35 * eager)


@pytest.mark.parametrize("level", ["output", "all", "layer"])
@pytest.mark.parametrize("adapted", [by_hand, by_hand_in_attention, by_peft])
def test_gradients_equal_eager(adapted: Callable[[int, float], nn.Module], level: str) -> None:
    model = adapted(2, 0.0)
    twin = copy.deepcopy(model)
    ckpt_kernels.convert(twin, recompute=level)
    for mine, theirs in zip(gradients(twin), gradients(model), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)


def test_a_frozen_linear_keeps_no_input() -> None:
    model = (
        nn.Sequential(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.RMSNorm(WIDTH)).to(DEVICE).requires_grad_(False)
    )
    ckpt_kernels.convert(model)
    x = torch.randn(TOKENS, WIDTH, device=DEVICE, requires_grad=True)
    # Each norm keeps the input, for the input's gradient, and one number a row.
    assert saved_bytes(model, x) == 2 * x.nbytes + 2 * TOKENS * 4


def test_a_dropout_before_an_adapter_is_drawn_again() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(WIDTH), nn.Dropout(0.5), nn.Linear(WIDTH, RANK)).to(DEVICE)
    block, output = copy.deepcopy(model), copy.deepcopy(model)
    ckpt_kernels.convert(block, recompute="block")
    ckpt_kernels.convert(output)
    x = torch.randn(TOKENS, WIDTH, device=DEVICE, requires_grad=True)
    assert saved_bytes(block, x) - saved_bytes(output, x) == x.nbytes
    results = []
    for module in (block, output):
        torch.manual_seed(1)
        module(x).square().sum().backward()
        results.append([p.grad for p in module.parameters()])
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine, theirs)

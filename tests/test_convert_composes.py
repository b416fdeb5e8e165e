"""Converted models with compilation, autocast, checkpointing, adapters, generation, copies, and other uses."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckpt_kernels
from benchmarks import architectures
from ckpt_kernels import memory

from .conftest import DEVICE
from .conversion import close, equal, twins
from .test_convert import LEVELS, built, check_errors, in_float64, step

pytest.importorskip("transformers", reason="the models are those of transformers")


def converted(name: str, dtype: torch.dtype = torch.float32, recompute: str = "output") -> architectures.Built:
    model, inputs = built(name, dtype)
    ckpt_kernels.convert(model, recompute=recompute)
    return model, inputs


def with_dropout(model: nn.Module, p: float) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = p
    return model


@pytest.mark.parametrize("recompute", LEVELS)
def test_levels_give_the_same_bits(recompute: str) -> None:
    model, inputs = converted("bert", recompute="block")
    expected = step(model, inputs)
    ckpt_kernels.convert(model, recompute=recompute)
    assert equal(step(model, inputs), expected)


@pytest.mark.parametrize("name", ("llama", "resnet"))
def test_torch_compile_of_the_whole_model(name: str) -> None:
    model, inputs = converted(name)
    expected = step(model, inputs)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = {key.replace("_orig_mod.", ""): value for key, value in step(compiled, inputs).items()}
    assert close(found, expected, 1e-5)
    if name != "resnet":
        kept = memory.saved_bytes(lambda: architectures.outputs_of(compiled, inputs))
        ckpt_kernels.revert(model)
        torch._dynamo.reset()
        plain = torch.compile(model, backend="aot_eager_decomp_partition")
        assert kept < memory.saved_bytes(lambda: architectures.outputs_of(plain, inputs))


class PreNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = nn.LayerNorm(8), nn.GELU()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(self.act(self.first(self.norm(x))))


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([PreNorm(), PreNorm()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("recompute", ["output", "layer", {"layers.*": "checkpoint"}])
def test_torch_compile_with_dynamic_shapes(recompute: Any) -> None:
    model = Layers().to(DEVICE)
    ckpt_kernels.convert(model, recompute=recompute)
    compiled = torch.compile(model, backend="eager", dynamic=True)
    for rows in (3, 5):
        x = torch.randn(2, rows, 8, device=DEVICE)
        assert torch.allclose(compiled(x), model(x))


def test_torch_compile_draws_dropout_once() -> None:
    """Without dropout in torch's attention, which draws other numbers on GPUs."""
    model, inputs = converted("bert")
    with_dropout(model, 0.3)
    for layer in model.bert.encoder.layer:
        layer.attention.self.dropout.p = 0.0
    torch.manual_seed(3)
    expected = step(model, inputs)
    compiled = torch.compile(model, backend="aot_eager")
    torch.manual_seed(3)
    found = {key.replace("_orig_mod.", ""): value for key, value in step(compiled, inputs).items()}
    assert close(found, expected, 1e-5)


def joined(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """All outputs in one tensor, and all gradients in another: in 16 bits, single gradients through batch norms have
    large errors with both eager torch and this package."""
    return {
        kind: torch.cat([value.flatten() for name, value in results.items() if name.startswith(kind)])
        for kind in ("output", "grad")
    }


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bfloat16", "float16"))
@pytest.mark.parametrize("name", ("llama", "qwen3", "bert", "resnet"))
def test_autocast(name: str, dtype: torch.dtype) -> None:
    model, inputs = built(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    truth = in_float64(name, model, inputs)

    def run() -> tuple[dict[str, Tensor], int]:
        model.load_state_dict(state)
        with torch.autocast(DEVICE, dtype):
            found = step(model, inputs)
            kept = memory.saved_bytes(lambda: architectures.outputs_of(model, inputs))
        # Intermediates were rounded to the 16-bit dtype, so the results are as exact as that dtype.
        return {key: value.to(dtype) for key, value in found.items()}, kept

    eager, kept = run()
    for recompute in ("output", "all"):
        ckpt_kernels.convert(model, recompute=recompute)
        ours, less = run()
        view = joined if name == "resnet" else dict
        check_errors(view(truth), view(eager), view(ours))
        assert less < kept


def test_a_grad_scaler_finds_an_overflow() -> None:
    model, inputs = converted("llama", recompute="all")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**8)
    before = model.lm_head.weight.detach().clone()
    for scale, moves in ((1.0, True), (float("inf"), False)):
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.float16):
            loss = model(**inputs, labels=inputs["input_ids"]).loss * scale
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, model.lm_head.weight) != moves
        before = model.lm_head.weight.detach().clone()


@pytest.mark.parametrize("reentrant", (False, True), ids=("", "reentrant"))
@pytest.mark.parametrize("name", ("llama", "bert", "gpt2"))
def test_gradient_checkpointing_on_top(name: str, reentrant: bool) -> None:
    model, inputs = converted(name)
    with_dropout(model, 0.2)
    torch.manual_seed(1)
    expected = step(model, inputs)
    kept = memory.saved_bytes(lambda: architectures.outputs_of(model, inputs))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    torch.manual_seed(1)
    assert close(step(model, inputs), expected, 1e-6)
    if not reentrant:
        assert memory.saved_bytes(lambda: architectures.outputs_of(model, inputs)) < kept
    model.gradient_checkpointing_disable()
    torch.manual_seed(1)
    assert equal(step(model, inputs), expected)


@pytest.mark.parametrize("reentrant", (False, True), ids=("", "reentrant"))
def test_batch_statistics_in_a_checkpoint_are_torchs(reentrant: bool) -> None:
    def statistics(convert: bool) -> dict[str, Tensor]:
        model, inputs = converted("resnet") if convert else built("resnet")
        x = inputs["pixel_values"].requires_grad_()
        y = torch.utils.checkpoint.checkpoint(lambda x: model(x).logits, x, use_reentrant=reentrant)
        y.sum().backward()
        return {key: value.clone() for key, value in model.named_buffers()}

    assert close(statistics(True), statistics(False), 1e-4)


class LowRank(nn.Module):
    """A LoRA adapter: a frozen linear layer, and two trained layers of low rank."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False, device=base.weight.device)
        self.up = nn.Linear(rank, base.out_features, bias=False, device=base.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def adapted(model: nn.Module, names: tuple[str, ...]) -> nn.Module:
    model.requires_grad_(False)
    for module in list(model.modules()):
        for name in names:
            if isinstance(getattr(module, name, None), nn.Linear):
                setattr(module, name, LowRank(getattr(module, name)))
    return model


@pytest.mark.parametrize("names", (("q_proj", "v_proj"), ("up_proj", "down_proj"), ("gate_proj",)), ids="+".join)
@pytest.mark.parametrize("first", ("convert", "adapt"))
def test_frozen_weights_with_small_adapters(names: tuple[str, ...], first: str) -> None:
    model, inputs = built("llama")
    if first == "convert":
        ckpt_kernels.convert(model)
    torch.manual_seed(7)
    adapted(model, names)
    if first == "adapt":
        ckpt_kernels.convert(model)
    ours, kept = step(model, inputs), memory.saved_bytes(lambda: architectures.outputs_of(model, inputs))
    ckpt_kernels.revert(model)
    eager, more = step(model, inputs), memory.saved_bytes(lambda: architectures.outputs_of(model, inputs))
    assert close(ours, eager, 1e-5) and len(ours) == 1 + 2 * 2 * len(names)
    assert kept < more


@pytest.mark.parametrize("name", ("llama", "gpt2", "gemma3", "t5", "whisper"))
@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode))
def test_generation(name: str, mode: Callable) -> None:
    model, inputs = built(name)
    model.eval()
    key = "input_features" if name == "whisper" else "input_ids"
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}

    def run() -> Any:
        with mode():
            return model.generate(inputs[key], **options, return_dict_in_generate=True, output_logits=True)

    eager = run()
    ckpt_kernels.convert(model)
    ours = run()
    assert torch.equal(eager.sequences, ours.sequences)
    for expected, found in zip(eager.logits, ours.logits, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert type(eager.past_key_values) is type(ours.past_key_values)
    assert eager.past_key_values.get_seq_length() == ours.past_key_values.get_seq_length()


def test_frozen_layers_keep_nothing() -> None:
    model, inputs = converted("llama")
    layers = model.model.layers

    def kept() -> int:
        return memory.saved_bytes(lambda: architectures.outputs_of(model, inputs))

    unfrozen = kept()
    model.model.embed_tokens.requires_grad_(False)
    layers[0].requires_grad_(False)
    assert kept() < 0.6 * unfrozen


def test_nothing_is_kept_without_gradients() -> None:
    model, inputs = converted("llama")
    with torch.no_grad():
        assert memory.saved_bytes(lambda: architectures.outputs_of(model, inputs)) == 0
    model.requires_grad_(False)
    assert memory.saved_bytes(lambda: architectures.outputs_of(model, inputs)) == 0


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", (copied, pickled, saved))
@pytest.mark.parametrize("name", ("llama", "resnet"))
def test_copies_are_converted_too_and_share_nothing(name: str, again: Callable) -> None:
    model, inputs = converted(name)
    step(model, inputs)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    expected = step(model, inputs)
    model.load_state_dict(state)
    other = again(model)
    assert type(other).__name__ == type(model).__name__ and repr(other) == repr(model)
    kept = memory.saved_bytes(lambda: architectures.outputs_of(model, inputs))
    model.load_state_dict(state)
    other.load_state_dict(state)
    assert equal(step(other, inputs), expected)
    assert memory.saved_bytes(lambda: architectures.outputs_of(other, inputs)) == kept
    with torch.no_grad():
        next(other.parameters()).add_(1.0)
    assert not torch.equal(next(other.parameters()), next(model.parameters()))
    ckpt_kernels.revert(other)
    assert equal(step(model, inputs), expected)


def test_checkpoints_load_both_ways(tmp_path: Any) -> None:
    model, inputs = converted("llama")
    plain, _ = architectures.build("llama", seed=1)
    plain.to(DEVICE).load_state_dict(model.state_dict())
    assert close(step(plain, inputs), step(model, inputs), 1e-5)
    model.save_pretrained(tmp_path)
    loaded = type(plain).from_pretrained(tmp_path).to(DEVICE).train()
    assert equal(step(loaded, inputs), step(plain, inputs))
    assert model.config.architectures == ["LlamaForCausalLM"]


def test_averaged_model_follows_the_weights() -> None:
    model, inputs = converted("llama")
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    average.update_parameters(model)
    assert close({"y": average(**inputs).logits.detach()}, {"y": model(**inputs).logits.detach()}, 1e-6)
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    average.update_parameters(model)
    assert torch.allclose(average.module.lm_head.weight, model.lm_head.weight - 0.5)


def test_tied_weights_stay_tied() -> None:
    model, inputs = built("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    eager = step(model, inputs)
    ckpt_kernels.convert(model, recompute="all")
    assert model.lm_head.weight is model.transformer.wte.weight
    assert close(step(model, inputs), eager, 1e-5)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("recompute", LEVELS)
def test_parametrizations_before_and_after(recompute: str) -> None:
    model, inputs = built("llama")
    layer = model.model.layers[0]
    parts = (layer.mlp.up_proj, layer.mlp.down_proj, layer.input_layernorm)
    for part in parts:
        nn.utils.parametrize.register_parametrization(part, "weight", Doubled())
    eager = step(model, inputs)
    ckpt_kernels.convert(model, recompute=recompute)
    assert close(step(model, inputs), eager, 1e-5)
    ckpt_kernels.revert(model)
    for part in parts:
        nn.utils.parametrize.remove_parametrizations(part, "weight", leave_parametrized=False)
    ckpt_kernels.convert(model, recompute=recompute)
    for part in parts:
        nn.utils.parametrize.register_parametrization(part, "weight", Doubled())
    assert close(step(model, inputs), eager, 1e-5)
    with pytest.raises(RuntimeError, match=r"input_layernorm was converted and has become ParametrizedLlamaRMSNorm"):
        ckpt_kernels.revert(model)
    nn.utils.parametrize.remove_parametrizations(layer.input_layernorm, "weight", leave_parametrized=False)
    ckpt_kernels.revert(model)
    assert type(layer.input_layernorm).__name__ == "LlamaRMSNorm"


def test_an_optimizer_made_before_trains_the_converted_model() -> None:
    def losses(convert: bool) -> list[float]:
        model, inputs = built("llama")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if convert:
            ckpt_kernels.convert(model)
        found = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = model(**inputs, labels=inputs["input_ids"]).loss
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    eager, ours = losses(False), losses(True)
    assert eager[-1] < 0.9 * eager[0]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(eager), rtol=1e-3, atol=0)


@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a GPU")
def test_a_captured_step_replays() -> None:
    model, inputs = converted("bert", torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(model, inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step(model, inputs)
    graph.replay()
    torch.cuda.synchronize()
    # cuBLAS may choose another algorithm for another stream, which rounds differently.
    assert close(captured, step(model, inputs), 2 * torch.finfo(torch.bfloat16).eps)


class Counting(nn.Module):
    """A layer with a graph break before a side effect, which counts the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.calls = nn.RMSNorm(16), nn.Linear(16, 16), []

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        self.calls.append(tuple(x.shape))
        return x + self.linear(self.norm(x))


class CountingStack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Counting(), Counting()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("level", ["output", "layer"])
def test_torch_compile_of_layers_whose_graph_breaks(level: str) -> None:
    """No layer runs twice, and gradients are those of the original model."""
    model, twin = twins(CountingStack)
    ckpt_kernels.convert(twin, recompute=level)
    x = torch.randn(4, 16, device=DEVICE)
    compiled = torch.compile(twin, backend="aot_eager")
    found, expected = (
        torch.autograd.grad(call(x).square().sum(), [*owner.parameters()])
        for call, owner in ((compiled, twin), (model, model))
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert [len(layer.calls) for layer in twin.layers] == [1, 1]

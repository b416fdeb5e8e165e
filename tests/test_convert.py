"""`convert` on real architectures: results, parameter names, saved bytes, and the report."""

import functools
import gc
import math
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckpt_kernels
from benchmarks import architectures
from ckpt_kernels import memory

from .conftest import DEVICE
from .conversion import WIDTH, mlps, random_tensor

LEVELS = ("block", "output", "all")


def built(name: str, dtype: torch.dtype = torch.float32) -> architectures.Built:
    if reason := architectures.why_not(name):
        pytest.skip(reason)
    model, inputs = architectures.build(name, dtype)
    return model.to(DEVICE), {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in inputs.items()}


@functools.cache
def projections(shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Random weights of the outputs. They are made once: a copy from the CPU cannot be captured in a CUDA graph."""
    generator = torch.Generator().manual_seed(5)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) / math.sqrt(shape.numel()) for shape in shapes]
    return [weights.to(DEVICE) for weights in made]


def step(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The outputs, and the gradients of a random projection of all outputs for the parameters."""
    model.zero_grad()
    outputs = [y for y in architectures.outputs_of(model, inputs) if y.requires_grad]
    weights = projections(tuple(y.shape for y in outputs))
    sum((y * w.to(y)).sum() for y, w in zip(outputs, weights, strict=True)).backward()
    results = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    results |= {f"grad {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return results


def in_float64(name: str, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The results in float64 for this model's weights and inputs."""
    wide, _ = built(name, torch.float64)
    wide.load_state_dict(model.state_dict())
    return step(
        wide, {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    )


def check_errors(truth: dict[str, Tensor], eager: dict[str, Tensor], ours: dict[str, Tensor]) -> None:
    """Asserts errors of at most 1.5 times eager's plus an ulp; for gradients an ulp of the largest gradient, since some
    gradients are 0 in exact arithmetic."""
    assert truth.keys() == eager.keys() == ours.keys()
    largest = max(t.abs().max().item() for name, t in truth.items() if name.startswith("grad"))
    for name, t in truth.items():
        ulp = torch.finfo(eager[name].dtype).eps
        allowed = ulp * max(t.double().norm().item(), largest if name.startswith("grad") else 0.0)
        error, usual = ((x[name].double() - t).norm().item() for x in (ours, eager))
        assert error <= 1.5 * usual + allowed, f"{name}: {error:.3g}; eager's {usual:.3g}, an ulp {allowed:.3g}"


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_converted_model_gives_the_same_results_and_keeps_less(name: str, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and name in architectures.WITH_EXPERTS:
        pytest.skip("a rounding to 16 bits can choose another expert")
    model, inputs = built(name, dtype)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    truth, eager = in_float64(name, model, inputs), step(model, inputs)
    kept = {"eager": memory.saved_bytes(lambda: architectures.outputs_of(model, inputs))}
    # "all" runs the kernels of the other levels too, so one level serves for the roundings of bfloat16.
    for recompute in LEVELS if dtype == torch.float32 else ("all",):
        model.load_state_dict(state)
        ckpt_kernels.convert(model, recompute=recompute)
        assert dict(model.named_parameters()) == parameters and dict(model.named_modules()) == modules
        assert list(model.state_dict()) == list(state)
        check_errors(truth, eager, step(model, inputs))
        kept[recompute] = memory.saved_bytes(lambda: architectures.outputs_of(model, inputs))
    assert kept["all"] < kept["eager"]
    if dtype == torch.float32:
        assert kept["output"] < min(kept["eager"], kept["block"]) and kept["all"] <= kept["output"]
    model.load_state_dict(state)
    ckpt_kernels.revert(model)
    reverted = step(model, inputs)
    assert all(torch.equal(reverted[key], value) for key, value in eager.items())


@pytest.mark.parametrize("name", architectures.WITH_EXPERTS)
def test_experts_keep_at_most_half(name: str) -> None:
    model, inputs = built(name, torch.bfloat16)
    eager = memory.saved_bytes(lambda: architectures.outputs_of(model, inputs))
    ckpt_kernels.convert(model, recompute="output")
    assert memory.saved_bytes(lambda: architectures.outputs_of(model, inputs)) <= 0.5 * eager


# Architectures that the benchmarks do not list


def _unlisted(name: str) -> architectures.Built:
    import transformers

    text = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    inputs: dict[str, Any] = {"input_ids": architectures.tokens()}
    if name == "cohere":
        return transformers.CohereForCausalLM(transformers.CohereConfig(**text, intermediate_size=172, **ends)), inputs
    if name == "mamba2":
        config = transformers.Mamba2Config(
            vocab_size=128, hidden_size=64, num_hidden_layers=2, state_size=8, head_dim=16, num_heads=8, n_groups=1
        )
        return transformers.Mamba2ForCausalLM(config), inputs
    if name == "falcon":
        return transformers.FalconForCausalLM(transformers.FalconConfig(**text, **ends)), inputs
    if name == "nemotron":
        config = transformers.NemotronConfig(**text, intermediate_size=172, num_key_value_heads=2, head_dim=16, **ends)
        return transformers.NemotronForCausalLM(config), inputs
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}
    if name == "swin":
        config = transformers.SwinConfig(
            image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=10
        )
        return transformers.SwinForImageClassification(config), inputs
    config = transformers.RegNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 2], groups_width=8, num_labels=10
    )
    return transformers.RegNetForImageClassification(config), inputs


@pytest.mark.parametrize(
    ("name", "left_alone", "share"),
    (
        ("cohere", set(), 0.6),
        ("mamba2", {"Mamba2Mixer"}, 1.0),
        ("falcon", set(), 0.8),
        ("nemotron", set(), 0.9),
        ("swin", set(), 0.8),
        ("regnet", set(), 0.7),
    ),
)
def test_unlisted_architectures(name: str, left_alone: set[str], share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setitem(architectures.ARCHITECTURES, name, lambda: _unlisted(name))
    model, inputs = built(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    truth, eager = in_float64(name, model, inputs), step(model, inputs)
    kept = memory.saved_bytes(lambda: architectures.outputs_of(model, inputs))
    model.load_state_dict(state)
    report = ckpt_kernels.convert(model)
    assert {entry.kind for entry in report.left_alone} == left_alone
    check_errors(truth, eager, step(model, inputs))
    assert memory.saved_bytes(lambda: architectures.outputs_of(model, inputs)) < share * kept


@pytest.mark.parametrize("options", ({}, {"recompute": "layer"}, {"recompute": {"*": "checkpoint"}}, {"inputs": True}))
def test_a_deleted_model_is_freed_at_once(options: dict[str, Any]) -> None:
    """No reference cycle holds the model until Python's garbage collector runs."""
    x = random_tensor(4, WIDTH)
    model = mlps().to(DEVICE)
    weight = weakref.ref(next(model.parameters()))
    gc.collect()
    gc.disable()
    try:
        ckpt_kernels.convert(model, **options | ({"inputs": x} if "inputs" in options else {}))
        if "inputs" not in options:
            model(x).sum().backward()
            ckpt_kernels.revert(model)
        del model
        assert weight() is None
    finally:
        gc.enable()

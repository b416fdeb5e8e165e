"""`python -m benchmarks.plan`: peaks and times of plans at several budgets, beside the alternatives that fit.

Each plan is compared with the levels of `convert` for the whole model, the model's own checkpointing, checkpoints of
every k-th layer and, with `--compile`, torch.compile's activation memory budget, all by their own measured peaks. A
step is forward and backward, with gradients allocated before. Times are medians of ratios to eager's in the same turn.
"""

import argparse
import copy
import datetime
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ckpt_kernels
from ckpt_kernels import memory
from ckpt_kernels.cli_arguments import amount, file, positive
from ckpt_kernels.levels import OF_MODELS

from . import report as reports

WIDTH, BATCH, VOCABULARY = 512, 2, 4096
# The intervals k: every k-th layer is checkpointed.
EVERY = (2, 3)


class Case(NamedTuple):
    """A model, the inputs, the layers in order, and the function that enables the model's own checkpointing."""

    model: nn.Module
    inputs: tuple
    kwargs: dict[str, Any]
    layers: Callable[[Any], list[nn.Module]]
    checkpoint: Callable[[nn.Module], object] | None


def _own_checkpointing(model: nn.Module) -> object:
    return model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _llama(layers: int, tokens: int) -> Case:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=1376,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=VOCABULARY,
        use_cache=False,
    )
    return _causal(LlamaForCausalLM(config), tokens, lambda m: list(m.model.layers))


def _gpt2(layers: int, tokens: int) -> Case:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=WIDTH, n_layer=layers, n_head=8, n_positions=tokens, vocab_size=VOCABULARY, use_cache=False
    )
    config.resid_pdrop = config.attn_pdrop = config.embd_pdrop = 0.0
    return _causal(GPT2LMHeadModel(config), tokens, lambda m: list(m.transformer.h))


def _causal(model: nn.Module, tokens: int, layers: Callable[[Any], list[nn.Module]]) -> Case:
    ids = torch.randint(0, VOCABULARY, (BATCH, tokens))
    return Case(model.train(), (), {"input_ids": ids, "labels": ids, "use_cache": False}, layers, _own_checkpointing)


def _vit(layers: int, tokens: int) -> Case:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=384,
        num_hidden_layers=layers,
        num_attention_heads=6,
        intermediate_size=1536,
        hidden_dropout_prob=0.0,
    )
    images = torch.randn(4, 3, 224, 224)
    return Case(ViTModel(config).train(), (images,), {}, lambda m: list(m.layers), _own_checkpointing)


def _resnet(layers: int, tokens: int) -> Case:
    from transformers import ResNetConfig, ResNetModel

    config = ResNetConfig(hidden_sizes=[256, 512, 1024, 2048], depths=[3, 4, 6, 3])
    images = torch.randn(8, 3, 160, 160)
    return Case(ResNetModel(config).train(), (images,), {}, _resnet_layers, None)


def _resnet_layers(model: Any) -> list[nn.Module]:
    return [layer for stage in model.encoder.stages for layer in stage.layers]


def _unet(layers: int, tokens: int) -> Case:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(128, 256, 256),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=8,
    ).train()
    kwargs = {
        "sample": torch.randn(2, 4, 32, 32),
        "timestep": torch.tensor([3, 500]),
        "encoder_hidden_states": torch.randn(2, 16, 128),
    }
    return Case(
        model,
        (),
        kwargs,
        lambda m: [*m.down_blocks, m.mid_block, *m.up_blocks],
        lambda m: m.enable_gradient_checkpointing(),
    )


CASES = {"llama": _llama, "gpt2": _gpt2, "vit": _vit, "resnet": _resnet, "unet": _unet}


def _loss(output: Any) -> Tensor:
    from ckpt_kernels.plan.bench import default_loss

    return default_loss(output)


def _checkpoint_every(case: Case, k: int) -> nn.Module:
    """A copy of the model in which every k-th layer is checkpointed."""
    model = copy.deepcopy(case.model)
    for layer in case.layers(model)[::k]:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    return model


def _compiled(case: Case, budget: float) -> nn.Module:
    """A copy of the model that torch.compile compiles within an activation memory budget.

    Each copy has a backend function of its own: otherwise models of one class would share the graph of the first
    budget.
    """

    # Slow to import.
    from torch._inductor.compile_fx import compile_fx

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        with torch._functorch.config.patch(activation_memory_budget=budget):
            return compile_fx(graph, inputs)

    return torch.compile(copy.deepcopy(case.model), backend=backend)


def _step(model: nn.Module, case: Case) -> None:
    output = model(*case.inputs, **case.kwargs)
    _loss(output).backward()


def _measured(models: dict[str, nn.Module], case: Case, rounds: int) -> dict[str, tuple[int, float]]:
    """For each model the peak in bytes and the time of a step, in units of eager's."""
    peaks, seconds = {}, {name: [] for name in models}
    for name, model in models.items():
        _step(model, case)
        peaks[name] = memory.peak_bytes(lambda model=model: _step(model, case))
    for _ in range(rounds):
        for name, model in models.items():
            start = time.perf_counter()
            _step(model, case)
            seconds[name].append(time.perf_counter() - start)
    # If the machine is slower for a turn, all models of the turn are.
    ratios = {n: [mine / eager for mine, eager in zip(seconds[n], seconds["eager"], strict=True)] for n in models}
    return {name: (peaks[name], statistics.median(ratios[name])) for name in models}


def _others(case: Case, budgets: list[float], is_compiled: bool) -> dict[str, nn.Module]:
    """Eager, the levels of `convert`, checkpointing, and torch.compile at the budgets, each a copy of the model."""
    # The second copy of eager shows how far equal models differ on the machine.
    models: dict[str, nn.Module] = {name: copy.deepcopy(case.model) for name in ("eager", "eager again")}
    for level in OF_MODELS:
        models[level] = copy.deepcopy(case.model)
        ckpt_kernels.convert(models[level], recompute=level)
    if case.checkpoint is not None:
        models["own checkpointing"] = copy.deepcopy(case.model)
        case.checkpoint(models["own checkpointing"])
    models |= {f"checkpoint every {k}": _checkpoint_every(case, k) for k in EVERY}
    if is_compiled:
        models |= {f"torch.compile {budget}": _compiled(case, budget) for budget in (1.0, *reversed(budgets))}
    return models


def run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    case = CASES[name](options.layers, options.tokens)
    models = _others(case, options.budgets, options.compile)
    plans: dict[str, Any] = {}
    for budget in options.budgets:
        start = time.perf_counter()
        try:
            found = ckpt_kernels.plan(case.model, *case.inputs, budget=budget, loss=_loss, **case.kwargs)
        except ValueError as error:
            print(f"{name} {budget}: {error}", flush=True)
            continue
        plans[f"plan {budget}"] = found
        models[f"plan {budget}"] = copy.deepcopy(case.model)
        found.apply(models[f"plan {budget}"])
        print(f"{name} {budget}: planned in {time.perf_counter() - start:.1f} s, {found.count} steps", flush=True)
    measured = _measured(models, case, options.rounds)
    eager_peak, _ = measured["eager"]
    rows = []
    for provider, (peak, seconds) in measured.items():
        row = {"model": name, "provider": provider, "peak": peak / eager_peak, "time": seconds}
        if provider in plans:
            budget = plans[provider].budget
            fitting = [s for p, (b, s) in measured.items() if p not in plans and b <= budget]
            row |= {"budget": budget / eager_peak, "of_budget": peak / budget, "best_other": min(fitting, default=None)}
        rows.append(row)
        extra = "".join(f"  {key} {row[key]:.3f}" for key in ("of_budget", "best_other") if row.get(key) is not None)
        print(f"{name:8} {provider:18} peak {row['peak']:.3f}  time {row['time']:.3f}{extra}", flush=True)
    return {"rows": rows, "layers": options.layers, "tokens": options.tokens}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description=__doc__)
    parser.add_argument("--case", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument("--layers", type=positive, default=8)
    parser.add_argument("--tokens", type=positive, default=512)
    parser.add_argument("--budgets", type=amount, nargs="+", default=[0.25, 0.35, 0.5, 0.7])
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--compile", action="store_true", help="also torch.compile at its activation memory budgets")
    parser.add_argument("--json", type=file)
    options = parser.parse_args()
    command = " ".join(["python -m benchmarks.plan", *sys.argv[1:]])
    found: dict[str, Any] = {"machine": reports.machine(command, datetime.date.today().isoformat())}
    for name in options.case:
        found[name] = run(name, options)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

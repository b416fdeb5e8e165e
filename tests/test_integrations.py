"""The flag `recompute` of the integrations: accepted values, and training with and without it in each framework."""

import copy
import dataclasses
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import ckpt_kernels
from ckpt_kernels.integrations.common import Planned, _moved_to, converted, parsed, tokens
from ckpt_kernels.levels import OF_MODELS
from ckpt_kernels.memory import saved_bytes

from .trained import blocks, same_weights

VOCABULARY, BATCH, TOKENS = 32, 2, 16


@pytest.fixture(scope="module")
def gpt() -> nn.Module:
    """A small GPT-2 in float64, so that two trainings agree to many digits."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=TOKENS, n_embd=16, n_layer=2, n_head=2, use_cache=False,
        embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel(config).double()


@pytest.fixture(scope="module")
def dataset() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(VOCABULARY, (8, TOKENS), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


class TestTheFlag:
    @pytest.mark.parametrize("level", OF_MODELS)
    def test_levels(self, level: str) -> None:
        assert parsed(level) == level

    @pytest.mark.parametrize("budget", ["12GiB", "device", 0.5, "0.5", 10**9, "64 MiB"])
    def test_budgets(self, budget: Any) -> None:
        assert parsed(budget) == Planned(budget)

    def test_mappings_and_parsed_values(self) -> None:
        assert parsed({"layers.*": "all"}) == {"layers.*": "all"}
        assert parsed(parsed(0.5)) == Planned(0.5)

    @pytest.mark.parametrize("wrong", ["outputs", "", "12 parsecs", "1.5", 0, -1.0, float("nan"), "plan.yaml"])
    def test_unknown_values_are_an_error(self, wrong: Any) -> None:
        with pytest.raises(ValueError, match=r"recompute is .*; expected a level \(block, output, all, layer\)"):
            parsed(wrong)

    @pytest.mark.parametrize("wrong", [None, True, ["output"]])
    def test_values_of_another_type_are_an_error(self, wrong: Any) -> None:
        with pytest.raises(TypeError, match=r"recompute is .+, of type \w+; expected a level"):
            parsed(wrong)

    def test_missing_files_and_files_without_a_plan(self, tmp_path: pathlib.Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"recompute is .*, and there is no such file; expected a level"):
            parsed(str(tmp_path / "plan.json"))
        (tmp_path / "other.json").write_text("{}")
        with pytest.raises(ValueError, match="holds no plan"):
            parsed(tmp_path / "other.json")

    def test_budgets_and_saved_plans(self, tmp_path: pathlib.Path) -> None:
        model, x = blocks(), torch.randn(2, 8, 16)
        with pytest.raises(ValueError, match=r"recompute is 0\.9, a budget, and inputs is None"):
            converted(model, 0.9)
        made = ckpt_kernels.plan(model, x, budget=0.9)
        made.save(tmp_path / "plan.json")
        for recompute in (made, str(tmp_path / "plan.json"), tmp_path / "plan.json"):
            report = converted(blocks(), recompute)
            assert str(report) == str(made.apply(blocks()))
        least = pytest.raises(ckpt_kernels.DoesNotFit)
        with least:
            converted(model, 1, inputs=x)

    def test_logits_and_tiles_go_to_convert(self) -> None:
        x = torch.randn(2, 8, 16)
        made = ckpt_kernels.plan(blocks(), x, budget=0.9)
        for recompute in ("all", {"*": "all"}, made):
            with pytest.raises(ValueError, match="logits names 'head', which fits no module"):
                converted(blocks(), recompute, logits="head")
            with pytest.raises(ValueError, match="tiles is 0"):
                converted(blocks(), recompute, tiles=0)
            # A plan may leave all layers unconverted, depending on the measurements.
            assert converted(blocks(), recompute, tiles=2).replaced or recompute is made
        with pytest.raises(ValueError, match="logits names 'head', which fits no module"):
            converted(blocks(), 0.9, inputs=x, logits="head")
        left = dataclasses.replace(made, whole="none")
        assert not left.apply(blocks()).replaced
        # A plan that chooses eager does not undo other options.
        assert left.apply(blocks(), tiles=2).replaced
        with pytest.raises(ValueError, match="logits names 'head', which fits no module"):
            left.apply(blocks(), logits="head")

    def test_a_budget_is_planned_under_the_autocast_of_steps(self) -> None:
        def loss(output: torch.Tensor) -> torch.Tensor:
            raise KeyError(torch.is_autocast_enabled("cpu"))

        with pytest.raises(KeyError, match="True"):
            autocast = torch.autocast("cpu", torch.bfloat16)
            converted(blocks(), 0.9, inputs=torch.randn(2, 8, 16), loss=loss, autocast=autocast)

    def test_inputs_go_to_the_device(self) -> None:
        x, device = torch.ones(2), torch.device("meta")
        first, (second, third) = _moved_to({"x": x, "rest": [x, ("y", 3)]}, device).values()
        assert (first.device, second.device, third) == (device, device, ("y", 3))

    def test_no_framework_is_imported_with_the_package(self) -> None:
        code = (
            "import sys, ckpt_kernels, ckpt_kernels.integrations.common\n"
            "print({'transformers', 'accelerate', 'lightning', 'pytorch_lightning', 'axolotl', 'torchtitan'}"
            " & set(sys.modules))"
        )
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert found.stdout.strip() == "set()"


class TestTransformers:
    @pytest.fixture
    def train(self, gpt: nn.Module, dataset: list, tmp_path: pathlib.Path) -> Iterator[Callable]:
        transformers = pytest.importorskip("transformers")
        pytest.importorskip("accelerate")

        def run(*callbacks: Any, late: Any = None, losses: Any = None, **options: Any) -> nn.Module:
            # Autocast does not cast float64.
            model = copy.deepcopy(gpt).to(torch.float32 if "bf16" in options else torch.float64)
            if losses is not None:
                model.register_forward_hook(lambda module, args, output: losses.append(output.loss.item()))
            args = transformers.TrainingArguments(
                str(tmp_path), max_steps=3, per_device_train_batch_size=BATCH, use_cpu=True, report_to=[],
                save_strategy="no", disable_tqdm=True, learning_rate=1e-2, **options,
            )  # fmt: skip
            trainer = transformers.Trainer(model, args, train_dataset=dataset, callbacks=list(callbacks))
            if late is not None:
                trainer.add_callback(late)
            trainer.train()
            return model

        yield run

    @pytest.mark.parametrize("recompute", ["output", "all", {"transformer.h.*": "layer"}, 0.8])
    def test_a_trainer_trains_the_same(self, train: Callable, recompute: Any) -> None:
        from ckpt_kernels.integrations.transformers import CheckpointKernelsCallback

        eager = train()
        callback = CheckpointKernelsCallback(recompute, inputs=tokens(BATCH, TOKENS))
        ours = train(callback)
        same_weights(eager, ours)
        batch = tokens(BATCH, TOKENS)
        assert callback.report.replaced and saved_bytes(ours, **batch) < saved_bytes(eager, **batch)

    def test_a_head_whose_logits_are_in_chunks_has_the_same_losses(self, train: Callable) -> None:
        from ckpt_kernels.integrations.transformers import CheckpointKernelsCallback

        losses, expected = [], []
        eager = train(losses=expected)
        callback = CheckpointKernelsCallback("output", logits="lm_head")
        ours = train(callback, losses=losses)
        assert "lm_head" in [entry.name for entry in callback.report.replaced]
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0.0)
        same_weights(eager, ours)

    def test_under_autocast_the_forward_is_converted_before_it_is_wrapped(self, train: Callable) -> None:
        """Measured before each step: the forward that the Trainer calls runs under autocast, and keeps less."""
        transformers = pytest.importorskip("transformers")
        from ckpt_kernels.integrations.transformers import CheckpointKernelsCallback

        class Watch(transformers.TrainerCallback):
            def __init__(self) -> None:
                self.kept: list[int] = []

            def on_step_begin(self, *args: Any, model: Any, **kwargs: Any) -> None:
                is_on: list[bool] = []
                watch = model.transformer.wte.register_forward_pre_hook(
                    lambda *_: is_on.append(torch.is_autocast_enabled("cpu"))
                )
                self.kept.append(saved_bytes(model, **tokens(BATCH, TOKENS)))
                watch.remove()
                assert is_on == [True]

        eager, ours = Watch(), Watch()
        train(eager, bf16=True)
        train(ours, CheckpointKernelsCallback("output"), bf16=True)
        assert len(ours.kept) == 3 and max(ours.kept) < min(eager.kept)

    @pytest.mark.parametrize(("first", "second"), [(None, "all"), ("output", None)])
    def test_a_run_is_resumed_with_another_value(
        self, gpt: nn.Module, dataset: list, tmp_path: pathlib.Path, first: Any, second: Any
    ) -> None:
        """From the checkpoint of an unconverted or converted model, with accumulated gradients and evaluations."""
        transformers = pytest.importorskip("transformers")
        pytest.importorskip("accelerate")
        from ckpt_kernels.integrations.transformers import CheckpointKernelsCallback

        def run(recompute: Any, where: str, steps: int, resumed: bool = False) -> Any:
            args = transformers.TrainingArguments(
                str(tmp_path / where), max_steps=steps, per_device_train_batch_size=BATCH, use_cpu=True, report_to=[],
                save_steps=2, disable_tqdm=True, learning_rate=1e-2, lr_scheduler_type="constant", eval_steps=1,
                gradient_accumulation_steps=2, eval_strategy="steps",
            )  # fmt: skip
            callbacks = [] if recompute is None else [CheckpointKernelsCallback(recompute)]
            model = copy.deepcopy(gpt)
            trainer = transformers.Trainer(
                model, args, train_dataset=dataset, eval_dataset=dataset[:BATCH], callbacks=callbacks
            )
            trainer.train(resume_from_checkpoint=resumed)
            evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
            return model, evaluated

        expected, losses = run(None, "whole", 4)
        run(first, "parts", 2)
        resumed, found = run(second, "parts", 4, resumed=True)
        assert len(losses) == 4
        torch.testing.assert_close(found, losses, rtol=1e-5, atol=0.0)
        same_weights(expected, resumed)

    def test_invalid_uses_are_named_errors(self, train: Callable) -> None:
        from ckpt_kernels.integrations.transformers import CheckpointKernelsCallback

        with pytest.raises(RuntimeError, match="expected this callback in the argument callbacks"):
            train(late=CheckpointKernelsCallback())
        with pytest.raises(ValueError, match=r"recompute is 0\.5, a budget, and inputs is None"):
            train(CheckpointKernelsCallback(0.5))
        with pytest.warns(UserWarning, match="every layer runs twice"):
            train(CheckpointKernelsCallback(), gradient_checkpointing=True)

    def test_layers_convert_themselves_as_they_are_built(self, gpt: nn.Module, tmp_path: pathlib.Path) -> None:
        patching = pytest.importorskip("transformers.monkey_patching")
        from transformers import AutoModelForCausalLM
        from transformers.models.gpt2.modeling_gpt2 import GPT2Block

        from ckpt_kernels.integrations.transformers import patch_mapping

        gpt.save_pretrained(tmp_path)
        patching.register_patch_mapping(patch_mapping(GPT2Block, recompute="all"))
        try:
            model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
        finally:
            patching.clear_patch_mapping()
        assert all(map(ckpt_kernels.is_converted, model.transformer.h))
        assert all(isinstance(block, GPT2Block) for block in model.transformer.h)
        batch = tokens(BATCH, TOKENS)
        torch.testing.assert_close(model(**batch).logits, gpt(**batch).logits)
        assert saved_bytes(model, **batch) < saved_bytes(gpt, **batch)
        ckpt_kernels.revert(model)
        assert type(model.transformer.h[0]) is GPT2Block

    def test_the_level_layer_of_a_single_layer_is_an_error(self) -> None:
        pytest.importorskip("transformers")
        from ckpt_kernels.integrations.transformers import patch_mapping

        with pytest.raises(ValueError, match="recompute is 'layer'; expected one of block, output, all"):
            patch_mapping(nn.Linear, recompute="layer")

    def test_subclasses_of_self_converting_layers_are_unchanged(self) -> None:
        pytest.importorskip("transformers")
        from ckpt_kernels.integrations.transformers import patch_mapping

        made = patch_mapping(nn.LayerNorm)["LayerNorm"]
        derived = type("Derived", (made,), {})
        assert ckpt_kernels.is_converted(made(4)) and type(derived(4)) is derived

    def test_a_budget_is_planned_without_a_cache_like_the_steps(self) -> None:
        pytest.importorskip("transformers")
        from ckpt_kernels.integrations.transformers import CheckpointKernelsCallback

        model, args = blocks(), SimpleNamespace(use_cache=False, bf16=False, fp16=False)
        model.config = SimpleNamespace(use_cache=True)
        with pytest.raises(ValueError, match="inputs is None"):
            CheckpointKernelsCallback(0.5).on_init_end(args, None, None, model=model)
        assert model.config.use_cache is False

    @pytest.mark.parametrize("lora", [False, True])
    def test_trl_trains_the_same(self, gpt: nn.Module, dataset: list, tmp_path: pathlib.Path, lora: bool) -> None:
        trl = pytest.importorskip("trl")
        datasets = pytest.importorskip("datasets")
        peft = pytest.importorskip("peft") if lora else None
        from ckpt_kernels.integrations.transformers import CheckpointKernelsCallback

        table = datasets.table.InMemoryTable.from_pydict({"input_ids": [row["input_ids"].tolist() for row in dataset]})
        rows = datasets.Dataset(table, fingerprint="rows")

        def run(*callbacks: Any) -> nn.Module:
            args = trl.SFTConfig(
                str(tmp_path), max_steps=2, per_device_train_batch_size=BATCH, max_length=TOKENS, use_cpu=True,
                bf16=False, report_to=[], save_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
                dataset_kwargs={"skip_prepare_dataset": True},
                learning_rate=1e-2,
            )  # fmt: skip
            config = _lora(peft) if peft else None
            torch.manual_seed(0)
            trainer = trl.SFTTrainer(
                copy.deepcopy(gpt), args, train_dataset=rows, processing_class=_tokenizer(), peft_config=config,
                callbacks=list(callbacks),
            )  # fmt: skip
            trainer.train()
            return trainer.model

        # A budget needs no inputs here, because TRL's arguments have the length of a step.
        callback = CheckpointKernelsCallback(0.9)
        eager, ours = run(), run(callback)
        same_weights(eager, ours)
        batch = tokens(BATCH, TOKENS)
        assert callback.report.replaced and saved_bytes(ours, **batch) < saved_bytes(eager, **batch)


def _lora(peft: Any) -> Any:
    """With a task, PEFT's model keeps a method of the model inside."""
    return peft.LoraConfig(r=2, target_modules=["c_attn", "c_fc"], lora_dropout=0.0, task_type="CAUSAL_LM")


def _tokenizer() -> Any:
    """A tokenizer whose words are the token ids."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {str(index): index for index in range(VOCABULARY)}
    model = models.WordLevel(words, unk_token="0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), pad_token="0", eos_token="1")

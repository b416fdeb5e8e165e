"""axolotl's plugin, with the real package if installed: the configuration, and trainings on a CPU."""

import copy
import importlib
import pathlib
from typing import Any

import pytest
import torch

import ckpt_kernels
from ckpt_kernels.integrations.common import tokens
from ckpt_kernels.memory import saved_bytes

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
BATCH, TOKENS = 2, 32


@pytest.fixture(autouse=True)
def harness(monkeypatch: pytest.MonkeyPatch) -> Any:
    """examples/axolotl_on_cpu.py. axolotl reads the variables when it is imported."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    found = importlib.import_module("axolotl_on_cpu")
    for name, value in found.OFFLINE.items():
        monkeypatch.setenv(name, value)
    return found


class TestAxolotl:
    """axolotl's plugin manager and merged configuration."""

    def test_the_plugin_of_a_configuration(self) -> None:
        base = pytest.importorskip("axolotl.integrations.base")
        transformers = pytest.importorskip("transformers")
        from axolotl.utils.dict import DictDefault

        name = "ckpt_kernels.integrations.axolotl.CheckpointKernelsPlugin"
        manager = base.PluginManager.get_instance()
        manager.register(name)
        try:
            (found,) = [entry for entry in manager.get_input_args() if "ckpt_kernels" in entry]
            where, _, kind = found.rpartition(".")
            args = getattr(importlib.import_module(where), kind)
            config = transformers.LlamaConfig(
                vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
            )
            for recompute in ("all", 0.9):
                given = args(ckpt_kernels_recompute=recompute).model_dump()
                assert given.pop("ckpt_kernels_logits") is None and given.pop("ckpt_kernels_tiles") == 1
                assert given == {"ckpt_kernels_recompute": recompute}
                model = transformers.LlamaForCausalLM(config)
                eager = copy.deepcopy(model)
                cfg = DictDefault({"micro_batch_size": 2, "sequence_len": 16, "gradient_checkpointing": False, **given})
                manager.post_model_load(cfg, model)
                batch = tokens(2, 16)
                assert saved_bytes(model, **batch) < saved_bytes(eager, **batch)
            sizes = {"micro_batch_size": 2, "sequence_len": 16}
            for name_of_size in sizes:
                cfg = DictDefault({**sizes, name_of_size: None, "ckpt_kernels_recompute": 0.9})
                with pytest.raises(ValueError, match=f"{name_of_size} is None; expected the .* planned for"):
                    manager.post_model_load(cfg, model)
            found = importlib.import_module(where)._largest_batch(DictDefault(sizes))
            assert found["input_ids"].shape == (2, 16)
            # Levels, unlike budgets, need no sizes.
            with pytest.raises(ValueError, match="tiles is -1"):
                manager.post_model_load(DictDefault({"ckpt_kernels_recompute": "all", "ckpt_kernels_tiles": -1}), model)
            cfg = DictDefault({"ckpt_kernels_recompute": "all", "ckpt_kernels_logits": "head"})
            with pytest.raises(ValueError, match="logits names 'head', which fits no module"):
                manager.post_model_load(cfg, model)
            with pytest.raises(ValueError, match="recompute is 'most'"):
                manager.post_model_load(DictDefault({"ckpt_kernels_recompute": "most"}), model)
        finally:
            manager.plugins.pop(name)


class TestTraining:
    """Trains a small Llama by a configuration of axolotl; see examples/axolotl_on_cpu.py."""

    @pytest.mark.parametrize("adapter", [None, "lora"])
    def test_levels_a_plan_and_a_budget_train_the_same(
        self, harness: Any, tmp_path: pathlib.Path, adapter: Any
    ) -> None:
        for package in ("axolotl.train", "axolotl.core.builders"):
            pytest.importorskip(package, reason="axolotl with all that its trainer imports is not installed")
        import transformers

        harness.save_model(
            tmp_path,
            transformers.LlamaConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=64,
            ),
        )
        text, batch = (EXAMPLES.parent / "LICENSE").read_text(), tokens(BATCH, TOKENS)
        texts = [text[start : start + TOKENS - 2] for start in range(0, 2000, TOKENS)]
        keys: dict[str, Any] = {"sequence_len": TOKENS, "micro_batch_size": BATCH, "gradient_accumulation_steps": 2}
        if adapter is not None:
            # axolotl's own kernels for adapters need a GPU.
            kernels = dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), False)
            keys |= {"adapter": adapter, "lora_r": 2, "lora_alpha": 4, "lora_target_linear": True, **kernels}
        file, losses, kept = tmp_path / "plan.json", {}, {}
        for recompute in (None, "output", str(file), 0.9):
            with harness.trained(recompute, tmp_path, texts, 3, **keys) as trainer:
                losses[recompute] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
                model = trainer.model.train()
                assert any(map(ckpt_kernels.is_converted, model.modules())) is (recompute is not None)
                kept[recompute] = saved_bytes(model, **batch)
                if recompute is None:
                    ckpt_kernels.plan(model, budget=0.9, **batch).save(file)
        assert len(losses[None]) == 3
        for recompute in ("output", str(file), 0.9):
            torch.testing.assert_close(losses[recompute], losses[None], rtol=1e-5, atol=0.0)
            assert kept[recompute] < kept[None]

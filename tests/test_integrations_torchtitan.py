"""torchtitan's converter and specification, with the real packages if installed: registries, and trainings on a CPU."""

import dataclasses
import importlib
import importlib.util
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ckpt_kernels
from ckpt_kernels.memory import saved_bytes

from .trained import blocks

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
LAYERS, STEPS = 2, 3


def texts() -> list[str]:
    """The licence of the package, in pieces."""
    text = (EXAMPLES.parent / "LICENSE").read_text()
    return [text[start : start + 500] for start in range(0, len(text), 500)]


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Any:
    """examples/torchtitan_on_cpu.py, which must be the first to import torchtitan."""
    for package in ("torchtitan", "datasets", "tokenizers"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    found = importlib.import_module("torchtitan_on_cpu")
    found.import_for_cpu()
    return found


class TestTorchtitan:
    @pytest.fixture
    def module(self) -> Any:
        return importlib.import_module("ckpt_kernels.integrations.torchtitan")

    def test_its_own_container_of_converters(self, harness: Any, module: Any) -> None:
        """With version 0.2."""
        converters = pytest.importorskip("torchtitan.protocols.model_converter")
        converters.register_model_converter(module.converter("output"), "ckpt_kernels")
        try:
            from torchtitan.config import JobConfig

            config = JobConfig()
            config.model.converters = ["ckpt_kernels"]
            found = converters.build_model_converters(config, parallel_dims=None)
            with torch.device("meta"):
                model = blocks()
            found.convert(model)
            found.post_optimizer_hook(model)
        finally:
            converters._registry_model_converter_cls.pop("ckpt_kernels")
        assert ckpt_kernels.is_converted(model[0])

    @pytest.mark.parametrize("real", [True, False])
    def test_a_specification(self, module: Any, real: bool, request: pytest.FixtureRequest) -> None:
        """With version 0.3, or a class with the same fields if this version is not installed."""

        @dataclasses.dataclass
        class ModelSpec:
            name: str
            parallelize_fn: Callable

        def parallelize(model: nn.Module, degree: int) -> tuple[bool, int]:
            return ckpt_kernels.is_converted(model[0]), degree

        if real:
            request.getfixturevalue("harness")
            specs = pytest.importorskip("torchtitan.protocols.model_spec", exc_type=ImportError)
            if not hasattr(specs, "ModelSpec"):
                pytest.skip("this version has another specification")
            spec = specs.ModelSpec("", "", None, parallelize, None, None, None)
        else:
            spec = ModelSpec("", parallelize)
        with torch.device("meta"):
            model = blocks()
        assert module.with_conversion(spec, "block").parallelize_fn(model, degree=3) == (True, 3)
        assert spec.parallelize_fn is parallelize
        for options, message in (({"logits": "head"}, "logits names 'head'"), ({"tiles": 0}, "tiles is 0")):
            with pytest.raises(ValueError, match=message):
                module.with_conversion(spec, "all", **options).parallelize_fn(blocks(), degree=3)

    def test_a_budget_is_an_error(self, module: Any) -> None:
        for make in (module.converter, lambda recompute: module.with_conversion(None, recompute)):
            with pytest.raises(ValueError, match=r"recompute is 0\.5, a budget"):
                make(0.5)


class TestTraining:
    """Trains a small Llama with torchtitan's own Trainer; see examples/torchtitan_on_cpu.py for the stand-ins."""

    @pytest.fixture
    def train(self, harness: Any, tmp_path: pathlib.Path) -> Callable:
        """Trains, and returns the losses, the kept bytes, and the weights."""

        def run(recompute: Any, **options: Any) -> tuple[list[float], int, dict[str, Any]]:
            sizes = {"steps": STEPS, "seq_len": 32, "local_batch_size": 2} | options
            with harness.trainer(recompute, texts(), tmp_path, layers=LAYERS, **sizes) as (made, found):
                made.train()
                model, (args, kwargs) = made.model_parts[0], found.model_inputs
                assert any(map(ckpt_kernels.is_converted, model.modules())) is (recompute is not None)
                weights = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
                return list(found.losses), saved_bytes(model, *args, **kwargs), weights

        return run

    @pytest.fixture
    def plan(self, harness: Any, tmp_path: pathlib.Path) -> str:
        """The file of a plan for the model, made without a Trainer's sharding."""
        with harness.trainer(None, texts(), tmp_path, layers=LAYERS, steps=1, seq_len=32, local_batch_size=2) as (
            made,
            found,
        ):
            made.train()
            args, kwargs = found.model_inputs
            plan = ckpt_kernels.plan(harness.plain_model(made), *args, budget=0.8, **kwargs)
        plan.save(tmp_path / "plan.json")
        return str(tmp_path / "plan.json")

    def test_a_level_by_name_and_a_plan_train_the_same(self, train: Callable, plan: str) -> None:
        losses, kept, weights = train(None)
        assert len(losses) == STEPS
        for recompute in ("output", {"layers.1": "all"}, plan):
            found, fewer, others = train(recompute)
            torch.testing.assert_close(found, losses, rtol=1e-5, atol=0.0)
            assert fewer < kept
            assert weights.keys() == others.keys()

    def test_accumulated_gradients_and_bfloat16_train_the_same(self, train: Callable) -> None:
        for options, rtol in (({"global_batch_size": 4}, 1e-5), ({"mixed_precision_param": "bfloat16"}, 2e-2)):
            losses, kept, _ = train(None, **options)
            assert len(losses) == STEPS * options.get("global_batch_size", 2) // 2
            found, fewer, _ = train("output", **options)
            torch.testing.assert_close(found, losses, rtol=rtol, atol=0.0)
            assert fewer < kept

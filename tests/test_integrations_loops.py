"""accelerate, diffusers' training loop and Lightning, with the real packages if installed."""

import importlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ckpt_kernels.memory import saved_bytes

from .trained import blocks, same_weights

STEPS = 2


def batches() -> list[Tensor]:
    return list(torch.randn(STEPS, 2, 8, 16, generator=torch.Generator().manual_seed(0)))


class TestAccelerate:
    def trained(self, prepare: Callable, **options: Any) -> nn.Module:
        accelerate = pytest.importorskip("accelerate")
        model = blocks()
        accelerator = accelerate.Accelerator(cpu=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model, optimizer = prepare(accelerator, model, optimizer, **options)
        for x in batches():
            accelerator.backward(model(x).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        return accelerator.unwrap_model(model)

    @pytest.mark.parametrize("recompute", ["output", 0.9])
    def test_a_loop_trains_the_same(self, recompute: Any) -> None:
        accelerate = pytest.importorskip("accelerate")
        from ckpt_kernels.integrations.accelerate import prepare

        eager = self.trained(accelerate.Accelerator.prepare)
        ours = self.trained(prepare, recompute=recompute, inputs=batches()[0])
        same_weights(eager, ours)
        assert saved_bytes(ours, batches()[0]) < saved_bytes(eager, batches()[0])

    def test_the_loop_of_a_script_of_diffusers(self) -> None:
        """A UNet, a scheduler's noise, and an average of the weights, as in these scripts."""
        accelerate = pytest.importorskip("accelerate")
        diffusers = pytest.importorskip("diffusers")
        from diffusers.training_utils import EMAModel

        from ckpt_kernels.integrations.accelerate import prepare

        def run(prepare: Callable) -> nn.Module:
            torch.manual_seed(0)
            unet = diffusers.UNet2DModel(
                sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), norm_num_groups=4,
                layers_per_block=1, down_block_types=("DownBlock2D", "AttnDownBlock2D"), attention_head_dim=8,
                up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            )  # fmt: skip
            ema = EMAModel(unet.parameters(), model_cls=type(unet), model_config=unet.config)
            schedule = diffusers.DDPMScheduler()
            accelerator = accelerate.Accelerator(cpu=True)
            unet, optimizer = prepare(accelerator, unet, torch.optim.SGD(unet.parameters(), lr=0.01))
            for _ in range(STEPS):
                with accelerator.accumulate(unet):
                    images, noise = torch.randn(2, 2, 1, 8, 8)
                    times = torch.randint(1000, (2,))
                    found = unet(schedule.add_noise(images, noise, times), times).sample
                    accelerator.backward(nn.functional.mse_loss(found, noise))
                    accelerator.clip_grad_norm_(unet.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
                ema.step(unet.parameters())
            unet = accelerator.unwrap_model(unet)
            ema.copy_to(unet.parameters())
            return unet

        eager, ours = run(accelerate.Accelerator.prepare), run(prepare)
        same_weights(eager, ours)
        assert eager.state_dict().keys() == ours.state_dict().keys()
        given = torch.randn(1, 1, 8, 8), torch.tensor([3])
        assert saved_bytes(ours, *given) < saved_bytes(eager, *given)


class TestLightning:
    @pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
    def train(self, request: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Callable:
        pl = pytest.importorskip(request.param)
        if request.param == "pytorch_lightning":
            for name in ("lightning", "lightning.pytorch"):
                monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, "ckpt_kernels.integrations.lightning", raising=False)
        module = importlib.import_module("ckpt_kernels.integrations.lightning")
        assert issubclass(module.CheckpointKernelsCallback, pl.Callback)

        class Task(pl.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.model, self.loss = blocks(), nn.MSELoss()
                # A second name for one of the layers.
                self.first = self.model[0]

            def training_step(self, batch: Tensor, index: int) -> Tensor:
                return self.loss(self.model(batch), batch)

            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.parameters(), lr=0.1)

        def run(recompute: Any = None, **options: Any) -> nn.Module:
            callbacks = [] if recompute is None else [module.CheckpointKernelsCallback(recompute, **options)]
            task = Task()
            trainer = pl.Trainer(
                max_steps=STEPS, accelerator="cpu", callbacks=callbacks, logger=False, enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
            )  # fmt: skip
            trainer.fit(task, torch.utils.data.DataLoader(batches(), batch_size=None))
            return task.model

        return run

    def test_a_trainer_trains_the_same(self, train: Callable) -> None:
        eager, ours = train(), train("output")
        same_weights(eager, ours)
        assert saved_bytes(ours, batches()[0]) < saved_bytes(eager, batches()[0])

    def test_a_budget_and_levels_by_name_are_for_one_model(self, train: Callable) -> None:
        eager = train()
        for recompute in ({"*": "output"}, 0.9):
            ours = train(recompute, module="model", inputs=batches()[0])
            same_weights(eager, ours)
            assert saved_bytes(ours, batches()[0]) < saved_bytes(eager, batches()[0])
        with pytest.raises(ValueError, match=r"the LightningModule holds model, loss, first; expected module="):
            train({"*": "block"})
        with pytest.raises(ValueError, match=r"the LightningModule holds model, loss, first; expected module="):
            train("output", logits="head")
        for missing in ("net", ""):
            with pytest.raises(ValueError, match=f"module is '{missing}'; expected the name"):
                train("output", module=missing)

    @pytest.mark.parametrize("name", ["first", "model.0"])
    def test_a_module_of_two_names(self, train: Callable, name: str) -> None:
        eager, ours = train(), train("output", module=name)
        same_weights(eager, ours)
        assert saved_bytes(ours, batches()[0]) < saved_bytes(eager, batches()[0])

    def test_modules_are_found_in_nested_lists(self) -> None:
        pytest.importorskip("pytorch_lightning")
        from ckpt_kernels.integrations.lightning import _callable_children

        model = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.ModuleList([nn.Linear(1, 1), nn.ModuleList([nn.ReLU()])])})
        assert [name for name, _ in _callable_children(model)] == ["a", "b.0", "b.1.0"]

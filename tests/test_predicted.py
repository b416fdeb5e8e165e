"""Estimates beside measurements: the launches of a peer, the measured shares, and the summary of errors."""

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks import liger_kernels, predicted
from ckpt_kernels.backends.triton.launch import Tile, processors
from ckpt_kernels.inspect import MACHINES, Usage, Work, estimate

# Reads and writes in bfloat16, with few instructions.
COPY = Work(
    steady=3.0, instructions=3.0, fp32=0.0, integer=1.0, special=0.0, load_store=0.25, moved=4.0, memory=4.0, again=0.0,
    passes=1, elements=2048.0, reads=4096.0, programs=4, warps=4, stages=1, exchanges=0, barriers=0,
)  # fmt: skip


def kernel(work: Work, stack: int = 0) -> Usage:
    return Usage("kernel", "bf16", 512, 4, 32, stack, 0, 0, (16,), 100, 3.0, 3, 0.5, work)


def row(**fields: Any) -> dict[str, Any]:
    times = {"copy_ms": 1.0, "forward_ms": 1.25, "backward_ms": 2.0}
    return {"case": "rms_norm", "shape": "64x512", "dtype": "bfloat16", "provider": predicted.OURS} | times | fields


def test_shares_are_of_the_bytes_that_the_pass_must_move(monkeypatch: pytest.MonkeyPatch) -> None:
    # The backward pass moves 8 bytes an element in two kernels, of which 6 are needed.
    compiled = {"forward": [kernel(COPY)], "backward": [kernel(COPY), kernel(COPY, stack=24)]}
    monkeypatch.setattr(predicted, "kernels", lambda name, columns, arch: compiled)
    alone = {"block": "rms_norm", "rows": 64, "columns": 512, "provider": predicted.OURS} | {
        name: value for name, value in row().items() if name.endswith("_ms")
    }
    others = [row(dtype="float32"), row(case="other"), row(provider="eager"), row(shape="64x64")]
    found = list(predicted.lines({"machine": {"device": "NVIDIA H200"}, "results": [row(), *others, alone]}))
    forward, backward = found[:2]
    assert found[2:] == [forward, backward] and forward.shape == "64x512"
    share = estimate(COPY, MACHINES["H200"]).share
    assert forward.predicted == pytest.approx(share) and backward.predicted == pytest.approx(share * 6 / 8)
    assert (forward.measured, backward.measured) == pytest.approx((1 / 1.25, 1.5 / 2))
    assert (forward.spills, backward.spills) == (0, 24)


def test_errors_are_summed_up_with_and_without_spills() -> None:
    made = [predicted.Line("x", "1x512", "forward", p, "memory", 1.0, spills) for p, spills in ((0.9, 0), (1.3, 8))]
    text = predicted.table(made)
    assert "forward: off by 20% on average, +10% with its sign, +30% at most, of 2." in text
    assert "forward without spills: off by 10% on average, -10% with its sign, -10% at most, of 1." in text
    assert "without spills" not in predicted.table(made[:1]) and "backward" not in text


def test_a_launch_is_recorded_with_defaults_in_the_kernels_order() -> None:
    def function(x: Any, stride: int, scale: float, BLOCK_SIZE: int, flag: bool = True) -> None:
        """Stands in for a kernel."""

    signature = inspect.signature(function)
    stand_in = SimpleNamespace(signature=signature, arg_names=list(signature.parameters))
    x = torch.empty(7, 48, device="meta")
    named = {"BLOCK_SIZE": 64, "scale": 0.5, "num_warps": 8, "num_stages": 2}
    one = liger_kernels.recorded(stand_in, (7,), (x, 48), named)
    assert one.arguments == (x, 48, 0.5, 64, True) and one.tile == Tile(1, 64, 8, True)
    assert one.programs == 7 * processors(torch.device("meta"))

    def of_rows(x: Any, BLOCK_SIZE: int, BLOCK_ROW: int) -> None:
        """Stands in for a kernel with several rows a program."""

    stand_in = SimpleNamespace(signature=inspect.signature(of_rows), arg_names=["x", "BLOCK_SIZE", "BLOCK_ROW"])
    one = liger_kernels.recorded(stand_in, (7,), (x,), {"BLOCK_SIZE": 64, "BLOCK_ROW": 16, "num_warps": 4})
    assert one.tile == Tile(16, 64, 4, True)

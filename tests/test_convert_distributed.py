"""Converted models under DDP and FSDP2: two processes compute the same as one."""

import os
import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import ckpt_kernels
from benchmarks import architectures

pytest.importorskip("transformers", reason="the model is one of transformers")


def model_and_tokens(name: str, recompute: str | None) -> tuple[nn.Module, Tensor]:
    model, inputs = architectures.build(name)
    if recompute is not None:
        ckpt_kernels.convert(model, recompute=recompute)
    return model, torch.cat([inputs["input_ids"], inputs["input_ids"].flip(1)])


def layers_of(model: nn.Module) -> nn.ModuleList:
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


def replicated(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def sharded(model: nn.Module) -> nn.Module:
    for layer in layers_of(model):
        fully_shard(layer)
    return fully_shard(model)


def sharded_finely(model: nn.Module) -> nn.Module:
    for layer in layers_of(model):
        fully_shard(layer.mlp.up_proj)
        fully_shard(layer.input_layernorm)
    return sharded(model)


def sharded_and_checkpointed(model: nn.Module) -> nn.Module:
    model.gradient_checkpointing_enable()
    return sharded(model)


def train(model: nn.Module, tokens: Tensor) -> list[float]:
    """The losses of three steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


CASES: tuple[tuple[str, Callable[[nn.Module], nn.Module], str], ...] = (
    ("llama", replicated, "all"),
    ("llama", sharded, "all"),
    ("llama", sharded_finely, "output"),
    ("llama", sharded_and_checkpointed, "all"),
    # Layers here read the output of the previous layer's norm.
    ("bert", sharded, "output"),
)


def _process(rank: int, port: int, results: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    found = []
    for name, wrap, recompute in CASES:
        model, tokens = model_and_tokens(name, recompute)
        wrapped = wrap(model)
        losses = train(wrapped, tokens.chunk(2)[rank])
        named: dict[str, Any] = {name.removeprefix("module."): p for name, p in wrapped.named_parameters()}
        weights = {name: p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for name, p in named.items()}
        found.append((losses, weights))
    torch.save(found, f"{results}/{rank}.pt")
    dist.barrier()
    # Without the interpreter's shutdown, in which the destructors of DDP and gloo may deadlock over the GIL.
    os._exit(0)


def test_two_processes_train_as_one(tmp_path: Any) -> None:
    """All cases run in one pair of processes, because a start takes longer than a case."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_process, (port, str(tmp_path)), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for case, (first, weights), (second, others) in zip(CASES, *results, strict=True):
        model, tokens = model_and_tokens(case[0], None)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        expected = torch.tensor(train(model, tokens))
        mean = (torch.tensor(first) + torch.tensor(second)) / 2
        torch.testing.assert_close(mean, expected, rtol=1e-5, atol=0, msg=lambda text, case=case: f"{case}: {text}")
        moved = {name: (p.detach() - before[name]).norm().item() for name, p in model.named_parameters()}
        for name, p in model.named_parameters():
            assert torch.equal(others[name], weights[name]), (case, name)
            # Some gradients are 0 but for rounding.
            allowed = 1e-4 * moved[name] + 1e-7 * max(moved.values())
            assert (weights[name] - p).norm() <= allowed, (case, name)

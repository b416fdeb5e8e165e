"""DTensors: two processes with shards compute the same as one process with whole tensors.

One pair of processes runs all checks. A check is a function that both run, and that raises if a result is wrong.
"""

import functools
import os
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.experimental import implicit_replication
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import ckpt_kernels
from ckpt_kernels import functional
from ckpt_kernels import nn as ours
from ckpt_kernels.catalogue.block import Block, Operands
from ckpt_kernels.catalogue.blocks import BLOCKS
from ckpt_kernels.nested_values import tensors_in

from .blocks import in_float64, with_gradients

WIDTH, HIDDEN, HEADS = 16, 32, 4
LEVELS = ("block", "output", "all")
ONE_OF_EACH = {(block.function, *block.rows): block for block in reversed(BLOCKS)}.values()

# Blocks, with operands in every placement


def placements_of(tensor: Tensor) -> list[Placement]:
    return [Replicate(), Partial(), *(Shard(dim) for dim in range(tensor.dim()))]


def placed(tensor: Tensor, mesh: DeviceMesh, placement: Placement) -> DTensor:
    """The tensor as a leaf with this placement; both processes have the whole tensor."""
    whole = tensor.detach()
    if isinstance(placement, Partial):
        part = whole * (0.25 if mesh.get_local_rank() == 0 else 0.75)
        return DTensor.from_local(part, mesh, [placement]).requires_grad_()
    return distribute_tensor(whole, mesh, [placement], src_data_rank=None).requires_grad_()


def ways_of(block: Block, operands: Operands) -> Iterator[dict[str, Placement]]:
    """Every placement of the rows, and of each coefficient with rows that are replicated or split by samples."""
    others = [name for name in operands if name not in block.rows]
    replicated = dict.fromkeys(operands, Replicate())
    for placement in placements_of(operands[block.rows[0]]):
        yield replicated | {block.rows[0]: placement}
        yield replicated | dict.fromkeys(block.rows, placement)
    for placement in placements_of(operands[block.rows[-1]]):
        yield replicated | {block.rows[-1]: placement, block.rows[0]: Shard(0)}
    for name in others:
        for placement in placements_of(operands[name]):
            yield replicated | {name: placement}
            yield replicated | dict.fromkeys(block.rows, Shard(0)) | {name: placement}


def check_block(mesh: DeviceMesh, block: Block) -> None:
    # Shards of 2 and 1 samples, and of 3 and 2 rows; a dimension of size 1 has an empty shard.
    operands = in_float64(block.operands((3, 5) if not block.channels else (3, 4), 6, torch.float64, "cpu"))
    expected = with_gradients(block.eager, operands)
    for way in ways_of(block, operands):
        ready = {name: placed(t, mesh, way[name]).requires_grad_(t.requires_grad) for name, t in operands.items()}
        found = dict(with_gradients_of_sharded(block, ready, mesh))
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].shape == tensor.shape, (way, name)
            torch.testing.assert_close(found[name].full_tensor(), tensor, rtol=1e-11, atol=1e-11, msg=f"{way} {name}")


def with_gradients_of_sharded(block: Block, operands: Operands, mesh: DeviceMesh) -> dict[str, Any]:
    """`with_gradients` for DTensors, with the same incoming gradients, replicated."""
    generator = torch.Generator().manual_seed(1_000_003)
    outputs = block.call(**operands)
    incoming = [torch.randn(y.shape, generator=generator, dtype=torch.float64).bfloat16().double() for y in outputs]
    loss = sum((y * placed(g, mesh, Replicate()).detach()).sum() for y, g in zip(outputs, incoming, strict=True))
    names = [name for name, t in operands.items() if t.requires_grad]
    found = torch.autograd.grad(loss.full_tensor(), [operands[name] for name in names], allow_unused=True)
    results = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    return results | {f"grad {name}": g for name, g in zip(names, found, strict=True)}


# Models, with torch's own plans


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class OurMLP(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.bias_act(self.fc1(x), activation="gelu"))


class GatedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (
            nn.Linear(*sizes, bias=False) for sizes in ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class OurGatedMLP(GatedMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.glu(self.gate_proj(x), self.up_proj(x)))


class Layer(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module], mlp: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2, self.mlp = norm(WIDTH), Attention(), norm(WIDTH), mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def layers(fused: bool = False, handwritten: bool = False, recompute: str = "output") -> nn.Module:
    """Two layers with the same weights for all options: of torch's modules, of our norms and functions
    (`handwritten`), or of our norms and MLPs (`fused`)."""
    norms = (ours.LayerNorm, ours.RMSNorm) if fused or handwritten else (nn.LayerNorm, nn.RMSNorm)
    mlps: tuple[Callable[[], nn.Module], ...] = (OurMLP, OurGatedMLP) if handwritten else (MLP, GatedMLP)
    if fused:
        mlps = (
            lambda: ours.MLP(WIDTH, HIDDEN, recompute=recompute),
            lambda: ours.GatedMLP(WIDTH, HIDDEN, recompute=recompute),
        )
    torch.manual_seed(0)
    model = nn.Sequential(*(Layer(norm, mlp) for norm, mlp in zip(norms, mlps, strict=True))).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model


def in_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Sequence parallel between attention and MLP, tensor parallel within, as in torch's tutorial."""
    plan: dict[str, Any] = {}
    for place, (firsts, last) in enumerate(((("fc1",), "fc2"), (("gate_proj", "up_proj"), "down_proj"))):
        plan |= {f"{place}.norm1": SequenceParallel(), f"{place}.norm2": SequenceParallel()}
        plan |= {f"{place}.attention.{name}": ColwiseParallel() for name in "qkv"}
        plan |= {f"{place}.attention.out": RowwiseParallel(output_layouts=Shard(1))}
        plan |= {f"{place}.mlp.{name}": ColwiseParallel() for name in firsts}
        plan |= {f"{place}.mlp.{last}": RowwiseParallel(output_layouts=Shard(1))}
        for name in ("attention", "mlp"):
            plan[f"{place}.{name}"] = PrepareModuleInput(
                input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)
            )
    return parallelize_module(model, mesh, plan)


def whole(tensor: Tensor) -> Tensor:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()


def trained(model: nn.Module, x: Tensor, share: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    """The output after two steps, the gradients of both steps, and the parameters afterwards."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.002)
    found = {}
    for step in range(2):
        optimizer.zero_grad()
        (model(x).square().sum() * share).backward()
        found |= {f"{name}, gradient {step}": whole(p.grad) for name, p in model.named_parameters()}
        optimizer.step()
    found |= {name: whole(p) for name, p in model.named_parameters()}
    return model(x).detach(), found


def input_of_all() -> Tensor:
    return torch.randn(2, 6, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def check_training(make: Callable[[DeviceMesh], nn.Module], mesh: DeviceMesh) -> None:
    """Tensor parallel."""
    compare_training(make(mesh), mesh.get_local_rank(), 2, slice(None))


def check_sharded_training(make: Callable[[DeviceMesh], nn.Module], shape: tuple[int, int]) -> None:
    """FSDP2 with tensor parallel; `shape` has the number of processes for each."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
    model = make(mesh["tp"])
    for layer in model:
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    own = mesh.get_local_rank("dp")
    compare_training(model, mesh.get_local_rank("tp"), shape[1], slice(own, own + 1) if shape[0] > 1 else slice(None))


def compare_training(model: nn.Module, place: int, places: int, samples: slice) -> None:
    """Compares with one process that has all samples and the whole sequence."""
    every = input_of_all()
    own = every[samples]
    # FSDP averages gradients over the processes.
    output, expected = trained(layers(), every, len(own) / len(every))
    own_output, found = trained(model, own.chunk(places, 1)[place])
    torch.testing.assert_close(own_output, output[samples].chunk(places, 1)[place], rtol=1e-9, atol=1e-9)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-9, msg=name)


def converted(model: nn.Module, recompute: str) -> nn.Module:
    ckpt_kernels.convert(model, recompute=recompute)
    return model


# Further checks


def check_modules_of_linears(mesh: DeviceMesh) -> None:
    """Calls with plain tensors that every process has; the hooks of the parts make DTensors."""
    columns, rows = ColwiseParallel(), RowwiseParallel()
    gathered = ColwiseParallel(output_layouts=Replicate())
    torch.manual_seed(0)
    for module, plan in (
        (ours.MLP(WIDTH, HIDDEN), {"fc1": columns, "fc2": rows}),
        (ours.GatedMLP(WIDTH, HIDDEN), {"gate_proj": columns, "up_proj": columns, "down_proj": rows}),
        (ours.NormLinear(WIDTH, HIDDEN), {"linear": gathered}),
        (ours.NormLinear(WIDTH, (HIDDEN, WIDTH)), {"linears.0": gathered, "linears.1": gathered}),
        (ours.ActLinear(WIDTH, HIDDEN), gathered),
        (ours.ActLinear(WIDTH, HIDDEN), RowwiseParallel(input_layouts=Replicate())),
    ):
        module, x = module.double(), input_of_all()
        expected = [y.detach() for y in tensors_in(module(x))]
        found = list(tensors_in(parallelize_module(module, mesh, plan)(x)))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def check_modules_of_linears_with_dtensors(mesh: DeviceMesh) -> None:
    """DTensor inputs in every placement, with replicated and with split parameters."""
    split = {"norm": SequenceParallel(), "linear": ColwiseParallel(use_local_output=False)}
    x = input_of_all()
    for recompute in LEVELS:
        for parallel in (distribute_module, functools.partial(parallelize_module, parallelize_plan=split)):
            torch.manual_seed(0)
            module = ours.NormLinear(WIDTH, HIDDEN, recompute=recompute).double()
            expected = [module(x), *torch.autograd.grad(module(x).square().sum(), [*module.parameters()])]
            parallel(module, mesh)
            for placement in placements_of(x):
                output = module(placed(x, mesh, placement)).full_tensor()
                found = [output, *torch.autograd.grad(output.square().sum(), [*module.parameters()])]
                for tensor, other in zip(found, expected, strict=True):
                    torch.testing.assert_close(whole(tensor), other.detach(), rtol=1e-11, atol=1e-11)


def check_placements(mesh: DeviceMesh) -> None:
    """Placements and strides of results and gradients are those of torch's norms."""
    for norm, theirs in ((ours.LayerNorm, nn.LayerNorm), (ours.RMSNorm, nn.RMSNorm)):
        found = []
        for kind in (norm, theirs):
            module = parallelize_module(kind(WIDTH), mesh, SequenceParallel())
            x = distribute_tensor(torch.ones(4, 6, WIDTH), mesh, [Shard(1)]).requires_grad_()
            output = module(x)
            output.sum().backward()
            found.append((output.placements, output.stride(), x.grad.placements, module.weight.grad.placements))
        assert found[0] == found[1]


def check_dropout(mesh: DeviceMesh) -> None:
    """Shards drop different elements, replicas the same, and the backward pass the same as the forward."""
    torch.manual_seed(0)
    ones = torch.ones(64, 6, WIDTH)
    for placement, alike in ((Replicate(), True), (Shard(0), False), (Shard(1), False)):
        x, residual = (placed(ones, mesh, placement) for _ in range(2))
        weight = placed(ones[0, 0], mesh, Replicate())
        dropped = functional.bias_act(x, dropout_p=0.5)
        _, total = functional.add_layer_norm(x, residual, WIDTH, weight, dropout_p=0.5)
        for output, kept in ((dropped, dropped.to_local()), (total, total.to_local() - 1)):
            assert 0.4 < (kept == 2).double().mean() < 0.6 and ((kept == 0) | (kept == 2)).all()
            (grad,) = torch.autograd.grad(output.sum(), x)
            assert grad.placements == output.placements and torch.equal(grad.to_local(), kept)
            everyone = [torch.empty_like(kept) for _ in range(2)]
            dist.all_gather(everyone, kept.detach())
            assert torch.equal(*everyone) == alike


def check_running_statistics(mesh: DeviceMesh) -> None:
    given = torch.randn(4, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for kind in (ours.BatchNorm1d, ours.InstanceNorm1d):
        for placement in (Shard(0), Shard(1), Shard(2), Replicate()):
            plain = kind(6, affine=True, track_running_stats=True).double()
            module = kind(6, affine=True, track_running_stats=True).double()
            for holder in (module._parameters, module._buffers):
                for name, tensor in holder.items():
                    distributed = distribute_tensor(tensor, mesh, [Replicate()])
                    holder[name] = nn.Parameter(distributed) if holder is module._parameters else distributed
            for training in (True, False):
                output = module.train(training)(placed(given, mesh, placement))
                torch.testing.assert_close(output.full_tensor(), plain.train(training)(given))
            for name, tensor in plain.named_buffers():
                torch.testing.assert_close(whole(module.get_buffer(name)), tensor)


def check_second_order(mesh: DeviceMesh) -> None:
    def penalty(x: Tensor, weight: Tensor) -> list[Tensor]:
        output = functional.layer_norm(x, 6, weight, activation="silu")
        (first,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (x, weight))

    x, weight = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 6), (6,)))
    for t in (x, weight):
        dist.broadcast(t.detach(), 0)
    leaf = placed(x, mesh, Shard(0))
    (slope,) = torch.autograd.grad(leaf.to_local().pow(3).sum(), leaf, create_graph=True)
    if slope.grad_fn is None:
        # `to_local` has no second derivative in torch 2.11.
        return
    found = penalty(placed(x, mesh, Shard(0)), placed(weight, mesh, Replicate()))
    for ours_, theirs in zip(found, penalty(x, weight), strict=True):
        torch.testing.assert_close(ours_.full_tensor(), theirs)


def check_compiled(mesh: DeviceMesh) -> None:
    def blocks(x: Tensor, weight: Tensor) -> Tensor:
        y, total = functional.add_rms_norm(x, x.sin(), 6, weight)
        z = functional.bias_act(functional.glu(y, total), weight, activation="gelu")
        return functional.group_norm(functional.layer_norm(z, 6, weight), 2)

    x, weight = torch.arange(48, dtype=torch.float64).sin().view(2, 4, 6), torch.arange(6, dtype=torch.float64)
    found = []
    for function in (blocks, torch.compile(blocks, fullgraph=True, backend="aot_eager")):
        operands = placed(x, mesh, Shard(0)), placed(weight, mesh, Replicate())
        output = function(*operands)
        found.append([output, *torch.autograd.grad(output.square().sum(), operands)])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled.full_tensor(), eager.full_tensor())


def check_errors(mesh: DeviceMesh) -> None:
    x, weight = torch.randn(4, 6), torch.ones(6)
    sharded = placed(x, mesh, Shard(0))
    for operands in ((sharded, weight), (x, placed(weight, mesh, Replicate()))):
        with pytest.raises(RuntimeError, match="mixed"):
            functional.rms_norm(operands[0], 6, operands[1])
    with implicit_replication():
        found = functional.rms_norm(sharded, 6, weight)
    torch.testing.assert_close(found.full_tensor(), functional.rms_norm(sharded.full_tensor(), 6, weight))
    other = init_device_mesh("cpu", (2, 1))
    with pytest.raises(RuntimeError, match="expected one mesh"):
        functional.rms_norm(sharded, 6, distribute_tensor(weight, other, [Replicate()] * 2))


def checks(mesh: DeviceMesh) -> dict[str, Callable[[], None]]:
    simple = (
        check_modules_of_linears,
        check_modules_of_linears_with_dtensors,
        check_placements,
        check_dropout,
        check_running_statistics,
        check_second_order,
        check_compiled,
        check_errors,
    )
    found = {check.__name__: functools.partial(check, mesh) for check in simple}
    found |= {block.name: functools.partial(check_block, mesh, block) for block in ONE_OF_EACH}
    models = {
        "torch": lambda mesh: in_parallel(layers(), mesh),
        "handwritten": lambda mesh: in_parallel(layers(handwritten=True), mesh),
        "converted afterwards": lambda mesh: converted(in_parallel(layers(), mesh), "all"),
    }
    for level in LEVELS:
        models[f"fused, {level}"] = lambda mesh, level=level: in_parallel(layers(fused=True, recompute=level), mesh)
        models[f"converted, {level}"] = lambda mesh, level=level: in_parallel(converted(layers(), level), mesh)
    found |= {
        f"tensor parallel, {name}": functools.partial(check_training, make, mesh) for name, make in models.items()
    }
    for name in ("handwritten", "fused, all", "converted, all"):
        for shape in ((1, 2), (2, 1)):
            found[f"FSDP2 {shape}, {name}"] = functools.partial(check_sharded_training, models[name], shape)
    return found


def _process(rank: int, store: str, results: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    torch.set_num_threads(1)
    faults = {}
    for name, check in checks(init_device_mesh("cpu", (2,))).items():
        try:
            check()
        except Exception:
            faults[name] = traceback.format_exc()
    torch.save(faults, f"{results}/{rank}.pt")
    dist.barrier()
    os._exit(0)


def test_two_processes_compute_the_same_as_one(tmp_path: Any) -> None:
    mp.spawn(_process, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    faults = [
        f"{name}, rank {rank}: {fault}"
        for rank in range(2)
        for name, fault in torch.load(tmp_path / f"{rank}.pt").items()
    ]
    assert not faults, "\n".join(faults)

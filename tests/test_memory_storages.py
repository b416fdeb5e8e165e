"""What is kept is counted by storages: also of tensors without addresses, and of tensors that hold other tensors."""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ckpt_kernels import memory, nn


def block(device: str) -> tuple[torch.nn.Module, torch.Tensor]:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), nn.LayerNorm(64, activation="gelu"), torch.nn.Tanh())
    return model.to(device), torch.randn(8, 64, device=device)


def chain(x: torch.Tensor) -> torch.Tensor:
    """Keeps its input, and the results of tanh and relu."""
    return torch.relu(torch.tanh(x.sin()))


def test_meta_tensors_are_kept_one_by_one() -> None:
    expected = memory.saved_tensors(block("cpu")[0], block("cpu")[1])
    assert sum(tensor.counted for tensor in expected) > 0
    assert memory.saved_tensors(*block("meta")) == expected
    x = torch.randn(8, 64, device="meta", requires_grad=True)
    assert memory.saved_bytes(chain, x) == 3 * x.nbytes


@pytest.mark.filterwarnings("error")
def test_fake_tensors_are_kept_one_by_one() -> None:
    with FakeTensorMode():
        x = torch.randn(8, 64, requires_grad=True)
        assert memory.saved_bytes(chain, x) == 3 * x.nbytes
        assert memory.saved_bytes(lambda x: (x.sin(), x.cos()), x) == x.nbytes


def test_jagged_tensors_count_by_the_tensors_inside() -> None:
    values, offsets = torch.randn(6, 64, requires_grad=True), torch.tensor([0, 2, 6])

    def two_functions(values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        jagged = torch.nested.nested_tensor_from_jagged(values, offsets)
        return jagged.sin(), jagged.cos()

    kept = memory.saved_tensors(two_functions, values)
    assert sum(tensor.counted for tensor in kept) == values.nbytes + offsets.nbytes


def _sparse(layout: torch.layout) -> torch.Tensor:
    given = {"blocksize": (2, 2)} if layout in (torch.sparse_bsr, torch.sparse_bsc) else {}
    return torch.eye(4).to_sparse(layout=layout, **given)


@pytest.mark.parametrize("layout", (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr))
@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_sparse_tensors_count_by_the_tensors_inside(layout: torch.layout) -> None:
    model = torch.nn.Sequential(torch.nn.Tanh())
    model.register_buffer("graph", _sparse(layout))
    x = torch.randn(4, 8, requires_grad=True)
    assert memory.saved_bytes(model, x) == x.nbytes
    graph = _sparse(layout)
    values = graph._values() if layout is torch.sparse_coo else graph.values()
    assert memory.saved_bytes(lambda x: torch.sparse.mm(graph, x), x) > values.nbytes


class Keeping(torch.autograd.Function):
    """Saves a tensor."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(kept)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


PARTS = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}


@pytest.mark.parametrize("layout", PARTS)
@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_each_tensor_inside_a_sparse_tensor_counts(layout: torch.layout) -> None:
    kept = _sparse(layout)
    expected = sum(getattr(kept, name)().untyped_storage().nbytes() for name in PARTS[layout])
    assert memory.saved_bytes(Keeping.apply, torch.ones(2, requires_grad=True), kept) == expected > 0


def test_memory_that_is_used_again_is_no_parameter_of_before() -> None:
    """A parameter that is freed while the call runs leaves its address to what is made next."""

    def function(x: torch.Tensor) -> torch.Tensor:
        for _ in range(4):
            (torch.nn.Parameter(torch.ones(8, 64)) * x.detach()).sum()
        return chain(x)

    x = torch.randn(8, 64, requires_grad=True)
    assert memory.saved_bytes(function, x) == 3 * x.nbytes


def test_dtensors_count_by_the_shards(tmp_path: Any) -> None:
    """Flattened, a DTensor also has its mesh, which is no tensor and takes no bytes."""
    distributed = torch.distributed
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        x = distributed.tensor.distribute_tensor(torch.randn(4, 8), mesh).requires_grad_()
        assert memory.saved_bytes(chain, x) == 3 * 4 * 8 * 4
    finally:
        distributed.destroy_process_group()

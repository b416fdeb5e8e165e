"""Checkpointed layers with tensors of which there is no copy: which these are, and what a call keeps that writes to
one."""

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import ckpt_kernels
from ckpt_kernels.call_state import BufferSnapshot
from ckpt_kernels.runs.calls import Saved

from .test_runs import WIDTH, Tree, flat, inputs
from .test_runs_again import FunctionLayer, by_tree, derived

LARGEST = 2**16
TENSORS = {
    "largest": (lambda: torch.ones(LARGEST), True),
    "too large": (lambda: torch.ones(LARGEST + 1), False),
    "expanded in a dimension of one element": (lambda: torch.ones(3).as_strided((1, 3), (0, 1)), True),
    "expanded": (lambda: torch.ones(1).expand(3), False),
    "sparse": (lambda: torch.eye(3).to_sparse(), False),
    "sparse rows": (lambda: torch.eye(3).to_sparse_csr(), False),
    "on no device": (lambda: torch.ones(3, device="meta"), False),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("name", TENSORS)
def test_which_tensors_are_copied(name: str) -> None:
    make, is_copied = TENSORS[name]
    assert BufferSnapshot(make(), nn.Linear(1, 1)).is_copied is is_copied


@pytest.mark.parametrize("is_training", (True, False))
def test_large_statistics_of_a_norm_in_training_are_copied(is_training: bool) -> None:
    norm = nn.BatchNorm1d(LARGEST + 1).train(is_training)
    assert BufferSnapshot(norm.running_mean, norm).is_copied is is_training


def plain(self: FunctionLayer, x: Tensor) -> Tensor:
    return self.linear(x).sin()


def writing(self: FunctionLayer, x: Tensor) -> Tensor:
    self.bank[0] += 1.0
    return self.linear(x).exp() * self.bank[0].clone()


def overwriting(self: FunctionLayer, x: Tensor) -> Tensor:
    y = writing(self, x).exp()
    y.add_(1.0)
    return y


def layers_of(*functions: Callable[..., Tensor]) -> list[nn.Module]:
    torch.manual_seed(0)
    layers = [FunctionLayer(function) for function in functions]
    for layer in layers:
        layer.bank = torch.full((LARGEST + 1,), 0.5)
    return list(layers)


@pytest.mark.parametrize("place", (0, 1, 2))
def test_a_layer_of_a_run_that_writes_to_a_large_tensor(place: int) -> None:
    def found(tree: Tree) -> list[Tensor]:
        functions = [plain] * 3
        functions[place] = writing
        net = by_tree(layers_of(*functions), tree)
        return [*derived(net), *(layer.bank for layer in net.layers)]

    tree = Tree(["none"] * 3)
    for ours, expected in zip(found(tree), found(flat(tree)), strict=True):
        torch.testing.assert_close(ours, expected)


def test_a_write_over_a_saved_tensor_is_an_error() -> None:
    ckpt_kernels.convert(net := nn.Sequential(*layers_of(overwriting)), recompute={"0": "checkpoint"})
    loss = net(inputs()).sum()
    with pytest.raises(RuntimeError, match="modified by an in-place operation"):
        loss.backward()


def test_what_is_kept_lives_as_long_as_the_graph() -> None:
    def node_of_output(net: nn.Module, alive: list[int]) -> None:
        node = net(inputs()).grad_fn
        assert node is not None
        node.metadata["alive"] = Alive(alive)

    class Alive:
        def __init__(self, alive: list[int]) -> None:
            self.alive = alive
            alive.append(1)

        def __del__(self) -> None:
            self.alive.pop()

    def exp_last(self: FunctionLayer, x: Tensor) -> Tensor:
        return writing(self, x).exp()

    ckpt_kernels.convert(net := nn.Sequential(*layers_of(exp_last)), recompute={"0": "checkpoint"})
    alive: list[int] = []
    gc.disable()
    try:
        node_of_output(net, alive)
        assert not alive
    finally:
        gc.enable()


@pytest.mark.parametrize("has_large", (False, True))
def test_while_a_call_runs_values_are_kept_only_with_a_large_tensor(has_large: bool) -> None:
    found: list[Saved] = []

    def looking(self: FunctionLayer, x: Tensor) -> Tensor:
        self.count.add_(1.0)
        y = self.linear(x).exp() * self.count.clone()
        found.extend(saved for saved in gc.get_objects() if type(saved) is Saved and id(saved) not in earlier)
        during.extend(saved.value is not None for saved in found)
        return y

    (layer,) = layers_of(looking)
    layer.count = torch.zeros(WIDTH)
    if not has_large:
        del layer.bank
    ckpt_kernels.convert(net := nn.Sequential(layer), recompute={"0": "checkpoint"})
    during: list[bool] = []
    earlier = {id(saved) for saved in gc.get_objects() if type(saved) is Saved}
    loss = net(inputs()).sum()
    assert found and set(during) == {has_large}
    # The call has written to a copied tensor alone, so it can run again.
    assert all(saved.value is None for saved in found)
    del loss


def test_a_sparse_tensor_is_saved_beside_a_restored_buffer() -> None:
    def function(self: FunctionLayer, x: Tensor) -> Tensor:
        self.count.add_(1.0)
        return self.linear(torch.sparse.mm(self.edges, x * self.count.clone())).exp()

    def gradients(level: str) -> list[Tensor]:
        (layer,) = layers_of(function)
        layer.count, layer.edges = torch.ones(WIDTH), torch.eye(len(inputs())).to_sparse()
        ckpt_kernels.convert(net := nn.Sequential(layer), recompute={"0": level})
        x = inputs()
        return [*torch.autograd.grad(net(x).sum(), [x, *net.parameters()]), layer.count]

    for ours, expected in zip(gradients("checkpoint"), gradients("none"), strict=True):
        torch.testing.assert_close(ours, expected)

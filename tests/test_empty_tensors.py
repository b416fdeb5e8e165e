"""Tensors without elements, and transforms over no batches: results have torch's shapes, and nothing is drawn."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ckpt_kernels import functional as F

BLOCKS: dict[str, Callable[[Tensor], Tensor]] = {
    "layer_norm": lambda x: F.layer_norm(x, 4, torch.ones(4), torch.ones(4)),
    "rms_norm": lambda x: F.rms_norm(x, 4),
    "add_layer_norm": lambda x: F.add_layer_norm(x, x, 4, dropout_p=0.5)[0],
    "gated_rms_norm": lambda x: F.gated_rms_norm(x, x, 4),
    "modulated_layer_norm": lambda x: F.modulated_layer_norm(x, torch.ones(4), torch.ones(4), 4, torch.ones(4)),
    "glu": lambda x: F.glu(x, x),
    "bias_act": lambda x: F.bias_act(x, torch.ones(4), activation="gelu", dropout_p=0.5),
    "dyt": lambda x: F.dyt(x, torch.ones(1)),
    "rotary": lambda x: F.rotary(x, torch.ones(4), torch.ones(4), norm="rms"),
    "mlp": lambda x: F.mlp(x, torch.ones(3, 4), None, torch.ones(4, 3), None, dropout_p=0.5),
}
TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "none": lambda block, x: block(x),
    "jvp": lambda block, x: torch.func.jvp(block, (x,), (x,))[1],
    "gradient": lambda block, x: torch.func.grad(lambda x: block(x).sum())(x),
    "hessian": lambda block, x: torch.func.hessian(lambda x: block(x).sum())(x).sum((0, 1, 2)),
    "vmap": lambda block, x: torch.vmap(block)(x.expand(3, *x.shape))[0],
    "vmap over none": lambda block, x: torch.vmap(block, randomness="different")(x.new_zeros(0, 2, 4)).sum(0)[:, None][
        :, :0
    ],
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_take_tensors_without_elements(block: str, transform: str) -> None:
    result = TRANSFORMS[transform](BLOCKS[block], torch.zeros(2, 0, 4))
    assert result.shape == (2, 0, 4)


@pytest.mark.parametrize(("shape", "p"), [((2, 0, 4), 0.5), ((2, 3, 4), 1.0)])
def test_dropout_of_nothing_or_all_draws_no_random_number(shape: tuple[int, ...], p: float) -> None:
    x = torch.randn(shape)
    before = torch.get_rng_state()
    torch.nn.functional.dropout(x, p)
    assert torch.equal(torch.get_rng_state(), before)
    for _ in range(2):  # the second call is made by a plan
        assert not F.bias_act(x, dropout_p=p).any()
        assert torch.equal(F.add_rms_norm(x, x, 4, dropout_p=p)[1], x)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("recompute", ["block", "output", "all"])
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_a_product_of_rows_without_elements_is_the_bias(norm: str, recompute: str) -> None:
    x, weight, bias = torch.randn(4, 0, requires_grad=True), torch.randn(3, 0, requires_grad=True), torch.randn(3)
    bias.requires_grad_()
    for _ in range(2):  # the second call is made by a plan
        y = F.norm_linear(x, 0, None, None, weight, bias, norm=norm, recompute=recompute)
        assert torch.equal(y, bias.expand(4, 3))
        grads = torch.autograd.grad(y.sum(), (x, weight, bias))
        assert [grad.shape for grad in grads] == [(4, 0), (3, 0), (3,)] and torch.equal(grads[2], torch.full((3,), 4.0))

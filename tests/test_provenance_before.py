"""Ops that ran before a context are not run again: a parameter that they read may have been written to since."""

import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor, nn

from ckpt_kernels import functional as F
from ckpt_kernels import recompute
from ckpt_kernels.recompute import nodes

from .conftest import DEVICE
from .discarded_outputs import (
    UNIT,
    WIDTH,
    Parameters,
    assert_same_bits,
    assert_unchanged,
    kept_bytes,
    loss_of,
    rows,  # noqa: F401, the fixture x
    shows_saved,
)

pytestmark = pytest.mark.skipif(not shows_saved, reason="this torch does not show what nodes hold")

MAKERS: dict[str, Callable[[Tensor], Tensor]] = {
    "by a result": torch.tanh,
    "by a number": lambda gate: gate * 2.0,
    "by nothing": lambda gate: -gate,
    "by a cast": lambda gate: gate.to(torch.float64, copy=True).to(torch.float32),
    "a view of it": lambda gate: (gate * 2.0).view(1, -1),
    "several": lambda gate: torch.cat([gate[1:], gate[:1]]),
}


def shifted(x: Tensor, p: Parameters, shift: Tensor) -> Tensor:
    return TF.linear(TF.silu(TF.linear(x, p["a"])) * shift + shift, p["c"])


def added(x: Tensor, p: Parameters, shift: Tensor) -> Tensor:
    return TF.linear(TF.silu(TF.linear(x, p["a"])).add(shift), p["c"])


def product(x: Tensor, p: Parameters, shift: Tensor) -> Tensor:
    return F.bias_act(TF.linear(x, p["a"], shift.view(-1)), activation="gelu").sin()


@pytest.mark.parametrize("model", [shifted, added, product])
@pytest.mark.parametrize("maker", MAKERS)
def test_an_op_before_the_context_is_not_run_again(maker: str, model: Callable[..., Tensor], x: Tensor) -> None:
    p = Parameters()
    shift = MAKERS[maker](p["bias"])
    with torch.no_grad():
        p["bias"].add_(1)
    model(x, p, shift)
    sources = [x, *(tensor for name, tensor in p.items() if name != "bias")]
    assert_unchanged(lambda: model(x, p, shift), sources, products=True, temporaries=True)


def test_an_op_within_the_context_runs_again(x: Tensor) -> None:
    p = Parameters()
    kept = kept_bytes(recompute.discard_outputs(temporaries=True)(lambda: added(x, p, p["bias"] * 2.0)))
    assert kept == 2 * UNIT + WIDTH * 4
    shift = p["bias"] * 2.0
    assert kept_bytes(recompute.discard_outputs(temporaries=True)(lambda: added(x, p, shift))) == 3 * UNIT


def test_another_threads_op_is_not_run_again(x: Tensor) -> None:
    p = Parameters()
    made: list[Tensor] = [p["bias"] * 2.0]
    far = made[0].grad_fn._sequence_nr() + 1000

    def make() -> None:
        # Each thread counts its own nodes.
        while made[0].grad_fn._sequence_nr() < far:
            made[0] = p["bias"] * 2.0

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    with torch.no_grad():
        p["bias"].add_(1)
    added(x, p, made[0])
    assert_unchanged(lambda: added(x, p, made[0]), [x, p["a"], p["c"]], temporaries=True)


def test_a_bias_that_autocast_cast_before_the_context_is_copied_once(x: Tensor) -> None:
    p = Parameters()

    def call() -> Tensor:
        return TF.linear(F.bias_act(TF.linear(x, p["a"], p["bias"]), activation="gelu"), p["c"])

    first, second = (recompute.discard_outputs(products=True)(call) for _ in range(2))
    with torch.autocast(DEVICE, torch.bfloat16):
        assert kept_bytes(first) == kept_bytes(second)
        expected = call()
        # The cast, and the products, keep the old value.
        with torch.no_grad():
            p["bias"].add_(1)
        found = second()
    sources = [x, *p.values()]
    assert_same_bits(*(torch.autograd.grad(loss_of(y), sources) for y in (found, expected)))


def test_a_bias_that_eager_torch_cast_is_not_copied_after_a_write(x: Tensor) -> None:
    p = Parameters()

    def call() -> Tensor:
        return TF.linear(F.bias_act(TF.linear(x, p["a"], p["bias"]), activation="gelu"), p["c"])

    with torch.autocast(DEVICE, torch.bfloat16):
        expected = call()
        with torch.no_grad():
            p["bias"].add_(1)
        found = recompute.discard_outputs(products=True)(call)()
    sources = [x, *p.values()]
    assert_same_bits(*(torch.autograd.grad(loss_of(y), sources) for y in (found, expected)))


def test_a_number_that_this_thread_has_not_reached_is_another_threads() -> None:
    x, made = torch.ones(1, requires_grad=True), []
    first, number = 0, nodes.next_number()

    def make() -> None:
        while not made or made[-1]._sequence_nr() < number:
            made[-2:] = [*made[-1:], (x * 1).grad_fn]

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert made[-1]._sequence_nr() == number == nodes.next_number()
    assert not nodes.is_made_since(made[-1], first)
    own = (x * 1).grad_fn
    assert own._sequence_nr() == number and nodes.is_made_since(own, number)
    assert not nodes.is_made_since(own, number + 1)


class Cached(nn.Module):
    """Keeps a tensor that the first call made of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(WIDTH))
        self.inner, self.outer = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.cache: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.cache is None:
            self.cache = self.gate * 2.0
        return self.outer(TF.silu(self.inner(x)) + self.cache)


def test_a_tensor_kept_between_calls_keeps_its_value() -> None:
    torch.manual_seed(0)
    model, x = Cached(), torch.randn(8, WIDTH)

    def gradients(call: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        model.cache = None
        with torch.no_grad():
            model.gate.copy_(torch.linspace(-1, 1, WIDTH))
        call(x)
        with torch.no_grad():
            model.gate.add_(1)
        return torch.autograd.grad(loss_of(call(2 * x)), list(model.parameters()))

    expected = gradients(model)
    assert_same_bits(gradients(recompute.discard_outputs(model, temporaries=True)(model)), expected)

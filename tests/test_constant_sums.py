"""The sum that an add norm returns has a gradient exactly where one of its terms has, as torch's own sum does."""

from itertools import product

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ckpt_kernels import functional, use_backend


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("wanted", list(product((False, True), repeat=3)), ids=str)
def test_a_sum_has_a_gradient_where_its_terms_have(wanted: tuple[bool, ...], backend: str) -> None:
    x, residual, weight = (
        torch.randn(shape, requires_grad=is_wanted)
        for shape, is_wanted in zip(((4, 8), (4, 8), (8,)), wanted, strict=True)
    )
    with use_backend(backend):
        for _ in range(2):  # the second call is made by a plan
            output, total = functional.add_rms_norm(x, residual, 8, weight)
            assert output.requires_grad == any(wanted)
            assert total.requires_grad == (residual + x).requires_grad
    leaves = [tensor for tensor in (x, residual, weight) if tensor.requires_grad]
    if leaves:
        expected = torch.nn.functional.rms_norm(residual + x, (8,), weight)
        gradients = torch.autograd.grad(output.sin().sum(), leaves)
        torch.testing.assert_close(gradients, torch.autograd.grad(expected.sin().sum(), leaves))


def test_the_dispatcher_says_the_same() -> None:
    with FakeTensorMode():
        x, weight = torch.randn(4, 8), torch.ones(8, requires_grad=True)
        output, total = functional.add_rms_norm(x, x, 8, weight)
    assert output.requires_grad and not total.requires_grad

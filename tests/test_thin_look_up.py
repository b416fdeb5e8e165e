"""The look-up of plans: a call finds a plan only if the checks of an earlier call also hold for this call."""

import decimal
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as theirs
from torch import Tensor, nn

import ckpt_kernels.nn as ours
from ckpt_kernels import functional
from ckpt_kernels.thin import direct, plan_cache

pytestmark = [
    pytest.mark.skipif(not direct.is_available, reason="calls cannot be made directly here"),
    pytest.mark.usefixtures("without_plans"),
]


class _EqualToGelu:
    def __eq__(self, other: object) -> bool:
        return other == "gelu"

    def __hash__(self) -> int:
        return hash("gelu")

    def __repr__(self) -> str:
        return "no name"


X = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
# A call, and a wrong call whose options compare equal.
EQUAL: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
    "float shape": (lambda: functional.layer_norm(X, 64), lambda: functional.layer_norm(X, 64.0)),
    "float in a shape": (lambda: functional.layer_norm(X, (64,)), lambda: functional.layer_norm(X, (64.0,))),
    "decimal": (lambda: functional.rms_norm(X, 64), lambda: functional.rms_norm(X, decimal.Decimal(64))),
    "float groups": (lambda: functional.group_norm(X, 2), lambda: functional.group_norm(X, 2.0)),
    "complex eps": (lambda: functional.layer_norm(X, 64, eps=1.0), lambda: functional.layer_norm(X, 64, eps=1 + 0j)),
    "complex p": (
        lambda: functional.bias_act(X, activation="gelu"),
        lambda: functional.bias_act(X, activation="gelu", dropout_p=0j),
    ),
    "not a name": (
        lambda: functional.bias_act(X, activation="gelu"),
        lambda: functional.bias_act(X, activation=_EqualToGelu()),
    ),
}


def _error(call: Callable[[], object]) -> str | None:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize("name", EQUAL)
def test_equal_options_of_another_type_are_checked(name: str) -> None:
    right, wrong = EQUAL[name]
    expected = _error(wrong)
    right()
    assert plan_cache._plans and _error(right) is None
    assert expected is not None and _error(wrong) == expected


def test_keys_distinguish_none_dtypes_and_shapes() -> None:
    x, w1, w2, b2 = torch.randn(4, 8), torch.randn(6, 8), torch.randn(1, 6), torch.randn(1)

    def wrong() -> Tensor:
        return functional.mlp(x, w1, torch.tensor(5), torch.randn(6).half(), b2)

    expected = _error(wrong)
    functional.mlp(x, w1, None, w2, b2)
    assert "bias1 has dtype" in expected and _error(wrong) == expected
    one = torch.ones
    assert direct.key("a", (one(3, 4), None), ()) != direct.key("a", (one(3), one(4)), ())
    assert direct.key("a", (None, one(2)), ()) != direct.key("a", (one(2), None), ())
    assert direct.key("a", (one(2, dtype=torch.int32),), ()) is None
    assert direct.key("a", (one(2, dtype=torch.int64),), ()) != direct.key("a", (one(2),), ())
    assert direct.key("a", (one(2),), tuple(range(30))) != direct.key("a", (one(2),), tuple(map(float, range(30))))
    assert direct.key("a", (one(*(1,) * 20),) * 4, ()) is None, "too long to be told"


# Inputs with a dimension of size one whose stride differs from that of a contiguous tensor.
ODD: dict[str, Callable[[], Tensor]] = {
    "a row": lambda: torch.randn(1, 128)[:, :64],
    "transposed": lambda: torch.randn(1, 8, 64).transpose(0, 1),
    "a column": lambda: torch.randn(8).as_strided((8, 1), (1, 5)),
    "no space": lambda: torch.randn(8, 4, 1),
    "no space, transposed": lambda: torch.randn(8, 1, 4).transpose(1, 2),
    "one pixel": lambda: torch.randn(8, 4, 1, 1),
    "one pixel, channels last": lambda: torch.randn(8, 4, 1, 1).contiguous(memory_format=torch.channels_last),
    "a sample": lambda: torch.randn(1, 8, 4, 4)[:, :4],
    "a sample, channels last": lambda: torch.randn(2, 4, 4, 4).contiguous(memory_format=torch.channels_last)[::2],
}
LIKE: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "relu": (lambda x: functional.bias_act(x, activation="relu"), theirs.relu),
    "gelu": (lambda x: functional.bias_act(x, activation="gelu"), theirs.gelu),
    "glu": (lambda x: functional.glu(x, x), lambda x: theirs.silu(x) * x),
    "layer_norm": (lambda x: functional.layer_norm(x, x.shape[-1]), lambda x: theirs.layer_norm(x, x.shape[-1:])),
    "group_norm": (lambda x: functional.group_norm(x, 1), lambda x: theirs.group_norm(x, 1)),
    "batch_norm": (
        lambda x: functional.batch_norm(x, None, None, training=True),
        lambda x: theirs.batch_norm(x, None, None, training=True),
    ),
}


# torch's batch norm rejects one value a channel.
@pytest.mark.parametrize(("layout", "block"), [(a, b) for a in ODD for b in LIKE if (a, b) != ("a row", "batch_norm")])
def test_strides_are_torchs_in_every_call(layout: str, block: str) -> None:
    """Strides of outputs and gradients, also in dimensions of size one."""
    x = ODD[layout]()

    def strides(call: Callable[[Tensor], Tensor]) -> list[tuple[int, ...]]:
        given = x.detach().requires_grad_()
        output = call(given)
        return [output.stride(), torch.autograd.grad(output, given, torch.ones_like(output))[0].stride()]

    call, eager = LIKE[block]
    expected = strides(eager)
    usual = torch.randn(x.shape)
    for given in (None, usual, usual, None):
        # The second call makes a plan for the usual strides, which must not serve `x`.
        if given is None:
            assert strides(call) == expected
        else:
            call(given)


def test_hooks_that_unpack_a_lazy_negation() -> None:
    x = torch.randn(8, 64, requires_grad=True)

    def gradient() -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: -t.detach(), torch._neg_view):
            y = functional.layer_norm(x, 64, activation="gelu")
        return torch.autograd.grad(y, x, torch.ones_like(y))[0]

    by_the_full_path = gradient()
    assert torch.equal(gradient(), by_the_full_path)


LINEAR: dict[str, Callable[..., Tensor]] = {
    "norm_linear": lambda x, w, v, n, **how: functional.norm_linear(x, 64, n, n, w, activation="gelu", **how),
    "act_linear": lambda x, w, v, n, **how: functional.act_linear(x, w, **how),
    "mlp": lambda x, w, v, n, **how: functional.mlp(x, w, None, v, None, **how),
    "gated_mlp": lambda x, w, v, n, **how: functional.gated_mlp(x, w, w, v, **how),
}


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("level", ["block", "output", "all"])
@pytest.mark.parametrize("frozen", [False, True])
def test_linear_layers_whose_hooks_unpack_a_lazy_negation(name: str, level: str, frozen: bool) -> None:
    x, w, v, n = (torch.randn(shape) for shape in ((8, 64), (32, 64), (16, 32), (64,)))
    for tensor in (w, v) if frozen else (x, w, v, n):
        tensor.requires_grad_()
    sources = [t for t in (x, w, v, n) if t.requires_grad]

    def gradients(output: Tensor) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(output, sources, torch.ones_like(output), allow_unused=True)

    expected = gradients(LINEAR[name](x, w, v, n, recompute=level))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: -t.detach(), torch._neg_view):
        output = LINEAR[name](x, w, v, n, recompute=level)
    for a, b in zip(gradients(output), expected, strict=True):
        torch.testing.assert_close(a, b)


class _FunctionMode(torch.overrides.TorchFunctionMode):
    def __init__(self, raises: type[BaseException] | None = None) -> None:
        super().__init__()
        self.seen: list[str] = []
        self._raises = raises

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        if self._raises is not None:
            raise self._raises
        return function(*args, **(kwargs or {}))


def test_a_function_mode_sees_every_call() -> None:
    seen = []
    for _ in range(3):
        with _FunctionMode() as mode:
            functional.layer_norm(X, 64)
        seen.append(mode.seen)
        functional.layer_norm(X, 64)
    assert any("row_norm_forward" in name for name in seen[0]) and seen[1:] == seen[:1] * 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_errors_in_a_look_up_are_raised(error: type[BaseException]) -> None:
    functional.layer_norm(X, 64)
    with _FunctionMode(error), pytest.raises(error):
        functional.layer_norm(X, 64)


def test_errors_of_functions_that_the_look_up_calls_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> bool:
        raise KeyboardInterrupt

    from ckpt_kernels import _thin

    arguments = (torch.Tensor.__dlpack_c_exchange_api__, Tensor, nn.Parameter, torch.Size)
    functions = {"watcher": (Tensor.is_neg, (interrupted,)), "is_neg": (interrupted, ())}
    try:
        for negative, watchers in functions.values():
            _thin.set_up(*arguments, negative, Tensor.storage_offset, watchers)
            for call in (lambda: direct.key("a", (X,), ()), lambda: direct.is_plain(X)):
                with pytest.raises(KeyboardInterrupt):
                    call()
    finally:
        _thin.set_up(*arguments, Tensor.is_neg, Tensor.storage_offset, direct.WATCHERS)
    assert not direct.is_plain(X.to_sparse()), "a sparse tensor takes the full path, which rejects it"


@pytest.mark.parametrize("kind", [ours.LayerNorm, ours.RMSNorm])
def test_a_class_that_changes_after_a_call(kind: type) -> None:
    class Norm(kind):
        pass

    norm, plain = Norm(64), kind(64)
    norm(X)
    three_times = property(lambda self: self._parameters["weight"] * 3)
    Norm.weight = three_times
    torch.testing.assert_close(norm(X), plain(X) * 3)
    del Norm.weight
    search = nn.Module.__getattr__
    Norm.__getattr__ = lambda self, name: search(self, name) * (3 if name == "weight" else 1)
    torch.testing.assert_close(norm(X), plain(X) * 3)
    expected = plain(X) * 3
    try:
        kind.weight = three_times
        torch.testing.assert_close(plain(X), expected)
    finally:
        del kind.weight
    torch.testing.assert_close(plain(X) * 3, expected)


def test_classes_are_not_kept_alive() -> None:
    def made(base: type) -> weakref.ref:
        class Norm(base):
            pass

        Norm(64)(X)
        return weakref.ref(Norm)

    for base in (nn.LayerNorm, ours.LayerNorm, ours.BatchNorm1d):
        norm = made(base)
        gc.collect()
        assert norm() is None

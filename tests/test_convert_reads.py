"""Converted modules check at every call whatever the original code reads; and the analysis of in-place writes."""

import functools
import importlib
import operator
import pickle
import types
from operator import iadd as plus
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn, relu_

import ckpt_kernels
from ckpt_kernels.convert.code.in_place_writes import in_place_writer

from . import test_convert_tried as tried
from .test_convert_rules import x as random
from .test_convert_tried import Patched, Sloped, found_in, rows


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x) if x.shape[0] < 5000 else x


class Loops(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(x.shape[0] // 5000):
            x = 2 * x
        return F.silu(x)


others = types.ModuleType("others")
others.silu = lambda x: F.silu(x) if x.shape[0] < 5000 else x


class FromElsewhere(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return others.silu(x)


@pytest.mark.parametrize("kind", [Branches, Loops, FromElsewhere])
def test_branches_on_lengths_beyond_the_trials(kind) -> None:
    module = kind()
    ckpt_kernels.convert(nn.Sequential(module))
    long = random(6000, 2)
    now = module(long)
    ckpt_kernels.revert(module)
    torch.testing.assert_close(now, module(long))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x) * self.scale


def test_a_setting_that_becomes_a_tensor_gets_a_gradient() -> None:
    module = Scaled()
    assert found_in(ckpt_kernels.convert(module)) == {"": "bias_act (silu)"}
    module.scale = torch.ones((), requires_grad=True)
    module(rows()).sum().backward()
    assert module.scale.grad is not None


class Held(Scaled):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.ones(())


def test_a_tensor_attribute_is_read_at_every_call() -> None:
    module = Held()
    ckpt_kernels.convert(module)
    module.scale.fill_(3)
    torch.testing.assert_close(module(rows()), 3 * F.silu(rows()))


class OfClass(nn.Module):
    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x) * self.scale


def test_a_changed_class_attribute_is_read(monkeypatch) -> None:
    module = OfClass()
    ckpt_kernels.convert(module)
    monkeypatch.setattr(OfClass, "scale", 3.0)
    torch.testing.assert_close(module(rows()), 3 * F.silu(rows()))


class KeywordDefault(nn.Module):
    def forward(self, x: Tensor, *, scale=[1.0]) -> Tensor:  # noqa: B006
        return F.silu(x) * scale[0]


def test_changed_keyword_defaults_are_read() -> None:
    module = KeywordDefault()
    ckpt_kernels.convert(module)
    KeywordDefault.forward.__kwdefaults__["scale"][0] = 3.0
    try:
        torch.testing.assert_close(module(rows()), 3 * F.silu(rows()))
    finally:
        KeywordDefault.forward.__kwdefaults__["scale"][0] = 1.0


def factor() -> float:
    return 1.0


class Method(nn.Module):
    def act(self, x: Tensor) -> Tensor:
        return F.silu(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x)


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (lambda t: F.silu(t) * factor())(x)


class Builtin(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x) * float(1)


class Imports(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        from tests.test_convert_reads import factor

        return F.silu(x) * factor()


def enclosed() -> nn.Module:
    def act(x: Tensor) -> Tensor:
        return F.silu(x) * factor()

    class Enclosed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return act(x)

    return Enclosed()


@pytest.mark.parametrize("how", ["method", "inner", "builtin", "import", "variable"])
def test_changed_functions_are_called(how, monkeypatch) -> None:
    make, change = {
        "method": (Method, lambda: monkeypatch.setattr(Method, "act", lambda self, x: F.relu(x))),
        "inner": (Inner, lambda: monkeypatch.setitem(globals(), "factor", lambda: 3.0)),
        "builtin": (Builtin, lambda: monkeypatch.setitem(globals(), "float", lambda _: 3.0)),
        "import": (Imports, lambda: monkeypatch.setitem(globals(), "factor", lambda: 3.0)),
        "variable": (enclosed, lambda: monkeypatch.setitem(globals(), "factor", lambda: 3.0)),
    }[how]
    module = make()
    before = module(rows())
    ckpt_kernels.convert(module)
    change()
    now = module(rows())
    ckpt_kernels.revert(module)
    torch.testing.assert_close(now, module(rows()))
    assert not torch.allclose(now, before)


swap = importlib.import_module("ckpt_kernels.convert.swap")
LAST = None


class StoresGlobal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        global LAST
        LAST = x
        return F.silu(x)


def test_an_assigned_global_is_assigned_only_by_calls() -> None:
    global LAST
    LAST = None
    module = StoresGlobal()
    ckpt_kernels.convert(module)
    assert LAST is None
    given = rows()
    module(given)
    assert LAST is given


@pytest.mark.parametrize("kind", [Sloped, Patched])
def test_an_unpickled_module_checks_too(kind, monkeypatch) -> None:
    module = kind()
    ckpt_kernels.convert(module)
    loaded = pickle.loads(pickle.dumps(module))
    monkeypatch.setitem(vars(tried), "slope", F.relu)
    monkeypatch.setattr(F, "silu", F.relu)
    assert torch.equal(loaded(rows()), kind.forward(loaded, rows()))


@pytest.mark.parametrize("forward", ["untried", "other"])
def test_an_unpickled_module_of_a_changed_class(forward, monkeypatch) -> None:
    module = Sloped()
    ckpt_kernels.convert(module)
    data = pickle.dumps(module)
    monkeypatch.setattr(swap, "_classes", {})
    monkeypatch.setattr(swap, "_PROCESS", "another")
    function = (lambda self, x: x.cumsum(-1)) if forward == "untried" else (lambda self, x: F.gelu(x))
    monkeypatch.setattr(Sloped, "forward", function)
    loaded = pickle.loads(data)
    assert torch.equal(loaded(rows()), function(loaded, rows()))


def test_a_second_conversion_reads_changed_globals(monkeypatch) -> None:
    module = Sloped()
    assert found_in(ckpt_kernels.convert(module)) == {"": "bias_act (silu)"}
    monkeypatch.setitem(vars(tried), "slope", F.gelu)
    ckpt_kernels.convert(module)
    torch.testing.assert_close(module(rows()), F.gelu(rows()))


# writes


def write_to(x: Tensor) -> Tensor:
    return x.add_(1)


def local_writer() -> type[nn.Module]:
    def write(x: Tensor) -> Tensor:
        return x.add_(1)

    class Local(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return write(x)

    return Local


class ByGlobal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return write_to(x)


class ByModule(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return others.add_one(x)


@pytest.mark.parametrize("make", [ByGlobal, ByModule, local_writer], ids=["global", "module", "variable"])
def test_functions_that_write_are_reached(make) -> None:
    kind = make if isinstance(make, type) else make()
    assert in_place_writer(kind())


def w_view(self, x):
    v = x.view(-1)
    v.add_(1)
    return x


def w_handed(self, x):
    h = torch.zeros_like(x)
    y = self.norm(h)
    h.add_(1)
    return y


def w_item(self, x):
    x[0] = 0
    return x


def w_dunder(self, x):
    x.__iadd__(1)
    return x


def w_operator(self, x):
    operator.iadd(x, 1)
    return x


def w_positional(self, x):
    return F.relu(x, True)


def w_out(self, x):
    return torch.add(x, 1, out=x)


def w_order(self, x):
    h = x
    h.add_(1)
    h = h.clone()
    return h


def w_loop(self, x):
    h = torch.zeros(1)
    for h in x.unbind(0):
        h.add_(1)
    return h


def w_either(self, x):
    h = x.clone() if self.training else x
    h.add_(1)
    return h


def n_own(self, x):
    h = torch.zeros_like(x)
    h += 1
    h[0] = 2
    return h + x


def n_asks(self, x):
    flags = [getattr(self, "flag", True), True]
    return x * flags.index(True) * torch.tensor(True)


def n_sets_items(self, x):
    tables = {}
    for key in ("a", "b"):
        tables[key] = self.get_parameter(key)
    return self.compute(x, tables)


def w_sets_an_item_that_may_be_another(self, x):
    tables = {}
    tables = self.find(x)
    tables[x.shape[0]] = 0
    return tables


def w_a_flag(self, x):
    return torch.nn.functional.relu(x, True)


def w_held_in_a_list(self, x):
    held = [x]
    held[0] += 1
    return x


def w_held_in_a_dict(self, x):
    held = {"x": x}
    held["x"].mul_(2)
    return x


def w_a_multiple_of_a_list(self, x):
    held = [x] * 2
    held[1].add_(1)
    return x


def w_two_targets(self, x):
    x[..., 0], x[..., 1] = 0.0, 1.0
    return x


def w_an_annotated_target(self, x):
    x[..., 0]: Tensor = 0.0
    return x


def w_the_target_of_a_loop(self, x):
    for x[:, 0] in (0.0,):
        pass
    return x


def w_einsum_that_is_a_view(self, x):
    y = torch.einsum("bd->db", x)
    y[0] = 0.0
    return x


def w_a_method_that_is_bound_first(self, x):
    add = x.add_
    add(1)
    return x


def w_a_method_by_name(self, x):
    x.add_(1)
    return x


def w_a_method_by_a_name_put_together(self, x):
    getattr(x, "add" + "_")(1)
    return x


def w_the_larger_of_two(self, x):
    y = max(x, 0)
    y += 1
    return x


def w_by_another_name(self, x):
    plus(x, 1)
    return x


def w_a_function_in_place(self, x):
    return relu_(x)


def w_a_flag_by_position(self, x):
    return F.relu(x, self.flag)


def w_a_flag_in_a_dict(self, x):
    return F.relu(x, **self.flags)


def w_setitem(self, x):
    x.__setitem__(0, 1)
    return x


def w_setitem_as_a_function(self, x):
    operator.setitem(x, 0, 1)
    return x


def w_foreach(self, x):
    torch._foreach_mul_([x], 2)
    return x


def w_of_a_module_with_the_name_of_a_function(self, x):
    y = self.pad(x)
    y += 1
    return x


def n_a_flag_that_is_off(self, x):
    return F.relu(x, False) + F.dropout(x, 0.5, self.training)


def n_grows_a_list(self, x):
    found = []
    found += [x]
    found[0] = x + 1
    return found


WRITES = {k: v for k, v in list(globals().items()) if k.startswith("w_")}


@pytest.mark.parametrize("how", WRITES)
def test_in_place_writes_are_found(how) -> None:
    kind = type("Writes", (nn.Module,), {"forward": WRITES[how]})
    assert in_place_writer(kind())


@pytest.mark.parametrize(
    "how", [n_own, n_asks, n_sets_items, n_grows_a_list, n_a_flag_that_is_off], ids=lambda how: how.__name__
)
def test_other_code_is_no_in_place_write(how) -> None:
    assert not in_place_writer(type("Own", (nn.Module,), {"forward": how})())


class Doubles:
    def __call__(self, x: Tensor) -> Tensor:
        return x.mul_(2)


@pytest.mark.parametrize(
    "held",
    [Doubles(), [write_to], functools.partial(write_to), Doubles().__call__],
    ids=["object", "list", "partial", "method"],
)
def test_callables_that_a_module_holds_may_write(held: Any) -> None:
    module = nn.Module()
    module.held = held
    assert in_place_writer(module)
    module.held = [F.gelu, functools.partial(torch.add, alpha=2), {"a": 1}]
    assert not in_place_writer(module)


def test_torchs_inplace_modules_write() -> None:
    assert in_place_writer(nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True))) == "ReLU (inplace=True)"


def test_a_function_without_source_may_write() -> None:
    names: dict = {}
    exec("def forward(self, x):\n    return x.add_(1)", {}, names)
    assert in_place_writer(type("Made", (nn.Module,), names)())


others.add_one = write_to

"""Rewritten methods keep Python's evaluation order and the values of local variables."""

import ast
import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor, nn

from ckpt_kernels.convert.code import evaluation_order

from .conversion import WIDTH
from .test_convert_replaced import MLP, alike

# Evaluation order


class Value:
    """An object that supports every operation."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def _same(self, *_: Any, **__: Any) -> "Value":
        return self

    def __setattr__(self, name: str, value: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def __iter__(self) -> Iterator["Value"]:
        return iter([self, self])

    __call__ = __getitem__ = __add__ = __radd__ = __iadd__ = __neg__ = __mul__ = __lt__ = _same


_STATEMENTS = """f(1) + f(2) * -f(3)
f(1)(f(2), *f(3), a=f(4), b=f(5))
f(1)(f(2), a=f(4), *f(3))
f(1).a(f(2)).b(f(3))
(f(1), [f(2), {f(3)}], f(4)[f(5)])
f(1)[f(2) : f(3) : f(4), f(5)]
x = f(1)
f(1)[f(2)] = f(3)
f(1).a = f(2)
f(1)[f(2)] = f(3).b = x = f(4)
f(1)[f(2)], f(3).a = f(4)
(f(1)[f(2)], [f(3).a, y]), x = f(4)
f(1)[f(2)] += f(3)
f(1)[f(2)].a += f(3)
x += f(1)
f(1)[f(2)]: f(9) = f(3)
x: f(9) = f(1)
f(1) if f(2) else f(3)
f(1) and f(2) and f(3)
f(1) < f(2) < f(3)
(z := f(1)) + f(2)
return f(1)[f(2)]""".split("\n")


@pytest.mark.parametrize("statement", _STATEMENTS)
def test_evaluation_order_is_pythons(statement: str) -> None:
    evaluated: list[int] = []
    names: dict[str, Any] = {}
    exec(f"def run(f, x):\n    {statement}", names)
    names["run"](lambda number: (evaluated.append(number), Value())[1], Value())
    tree = ast.parse(f"def run(f, x):\n    {statement}").body[0].body[0]
    predicted = [
        node.args[0].value
        for node in evaluation_order.in_evaluation_order(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "f"
    ]
    certain = not any(word in statement for word in (" if ", " and ", " < "))
    assert predicted == (evaluated if certain else evaluated[: len(predicted)])
    assert predicted


class Routed(MLP):
    """An MLP whose forward swaps two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.other, self.out = nn.Linear(WIDTH, WIDTH), [0.0]

    def route(self, index: int = 0) -> int:
        self.down, self.other = self.other, self.down
        return index


class AugmentedItem(Routed):
    def forward(self, x: Tensor) -> Tensor:
        out = [0.0]
        h = self.act(self.up(x))
        out[self.route()] += self.down(h)
        return out[0]


class AugmentedAttribute(Routed):
    @property
    def total(self) -> Any:
        self.route()
        return 0.0

    @total.setter
    def total(self, value: Tensor) -> None:
        self.out[0] = value

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.up(x))
        self.total += self.down(h)
        return self.out[0]


class Item(Routed):
    def forward(self, x: Tensor) -> Tensor:
        out = [0.0]
        h = self.act(self.up(x))
        out[self.route()] = self.down(h)
        return out[0] + self.down(x)


class Keyword(Routed):
    def add(self, *parts: Any, **named: Any) -> Tensor:
        return sum(part for part in (*parts, *named.values()) if isinstance(part, Tensor))

    def parts(self) -> Iterator[Any]:
        yield self.route()

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.up(x))
        y = self.add(*self.parts(), y=self.down(h))
        h = self.act(self.up(x))
        return y + self.add(z=self.route(), y=self.down(h))


class Conditional(Routed):
    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.up(x))
        y = self.down(h) if self.route() else self.down(h + 1)
        h = self.act(self.up(x))
        z = self.route() or self.down(h)
        return y + z


class Walrus(Routed):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        y = self.norm(h + (h := h.sin()))
        return y + self.down(self.act(self.up(h)))


_ORDERED = [AugmentedItem, AugmentedAttribute, Item, Keyword, Conditional, Walrus]


@pytest.mark.parametrize("kind", _ORDERED)
def test_rewritten_methods_keep_the_evaluation_order(kind: type[nn.Module]) -> None:
    def without_gradients(model: nn.Module) -> None:
        model.requires_grad_(False)

    assert alike(kind)
    assert alike(kind, without_gradients)


# Local variables that are read later


class Chained(MLP):
    def forward(self, x: Tensor) -> Tensor:
        store: dict[Any, Tensor] = {}
        h = self.act(self.up(x))
        y = self.down(h)
        store[h] = h = y
        return next(iter(store)) + h


class ChainedLast(MLP):
    def forward(self, x: Tensor) -> Tensor:
        store: dict[Any, Tensor] = {}
        h = self.act(self.up(x))
        store[h] = h = self.down(h)
        return next(iter(store)) + h


class Augmented(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.down.requires_grad_(False)  # so that the input, which is written to, is not saved

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.up(x))
        y = self.down(h)
        h += 1
        h = y
        return h


class AugmentedLast(Augmented):
    def forward(self, x: Tensor) -> Tensor:
        held = []
        for _ in range(2):
            h = self.act(self.up(x))
            h += self.down(h)
            held.append(h)
        return held[0] + held[1]


class Broken(MLP):
    def forward(self, x: Tensor) -> Tensor:
        h = x
        for index in range(2):
            h = self.act(self.up(x))
            y = self.down(h)
            if index:
                break
            h = y
        return h + y


class Suppressed(MLP):
    def forward(self, x: Tensor) -> Tensor:
        h = x
        with contextlib.suppress(KeyError):
            h = self.act(self.up(x))
            y = self.down(h)
            {}["nothing"]
            h = y
        return h + y


class ArgumentInLoop(MLP):
    """All uses of the argument are in one run, which begins with a read of the value that the last turn bound."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)
        self.down = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        total = 0.0
        for _ in range(3):
            x = self.act(self.up(x))
            total = total + self.down(x)
        return total


class ArgumentInBranchOfLoop(ArgumentInLoop):
    def forward(self, x: Tensor) -> Tensor:
        total = 0.0
        for turn in range(4):
            if turn != 1:
                x = self.act(self.up(x))
                total = total + self.down(x)
        return total


class ArgumentInElseOfLoop(ArgumentInLoop):
    def forward(self, x: Tensor) -> Tensor:
        total = 0.0
        for turn in range(4):
            if turn == 1:
                total = total * 2.0
            else:
                x = self.act(self.up(x))
                total = total + self.down(x)
        return total


class HalvesInLoop(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        total = 0.0
        while not isinstance(total, Tensor) or total.dim() < 4:
            x, gate = self.up(x).chunk(2, dim=-1)
            total = (total + self.down(nn.functional.silu(gate) * x))[None]
        return total


class ArgumentInBranch(MLP):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = self.act(self.up(x))
            return self.down(x)
        return x


_NAMED = [Chained, ChainedLast, Augmented, AugmentedLast, Broken, Suppressed, ArgumentInLoop, HalvesInLoop]
_NAMED += [ArgumentInBranch, ArgumentInBranchOfLoop, ArgumentInElseOfLoop]


@pytest.mark.parametrize("kind", _NAMED)
def test_local_variables_keep_their_values(kind: type[nn.Module]) -> None:
    assert alike(kind)

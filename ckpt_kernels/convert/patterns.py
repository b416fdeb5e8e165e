"""Expressions that one function of `sites` computes: what is written, held against what its parts are.

A pattern is recognised by its form, and by what the loads in it were when the model was converted (`Loads`): a linear
layer, an activation, a norm, a dropout. What they are at a call is the site's question.
"""

import ast
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .flow import Half, Meaning, Run
from .pointwise import KEPT_BY_OUTPUT
from .reading import Match, Operand, Part, Reader, settled


class Attempt:
    """One try to read an expression in one way. Methods return None, or False, where it is something else."""

    def __init__(self, reader: Reader, run: Run | None) -> None:
        self.reader = reader
        self.meanings = run.meanings if run else {}
        self.looked_through: set[int] = set()
        self.operands: list[Operand] = []
        self.options: dict[str, Any] = {}
        # Of the activation in it.
        self.act = Part()

    def through(self, tree: Meaning) -> Meaning:
        """What a name that the run makes stands for."""
        while isinstance(tree, ast.AST) and id(tree) in self.meanings:
            self.looked_through.add(id(tree))
            tree = self.meanings[id(tree)]
        return tree

    def called(self, tree: Meaning, part: str, name: str) -> ast.expr | None:
        """The argument of a call of something that is `part`, which becomes the operand `name`."""
        tree = self.through(tree)
        if isinstance(tree, ast.Call) and len(tree.args) == 1 and not tree.keywords:
            found = self.reader.part(tree.func)
            if found.kind == part:
                self.act = found if part == "act" else self.act
                self.operands.append(Operand(name, tree.func))
                return tree.args[0]
        return self.formula_of(tree) if part == "act" else None

    def formula_of(self, tree: Meaning) -> ast.expr | None:
        """The value that a formula of an activation is of; the functions in it become operands."""
        found = self.reader.formula(tree) if isinstance(tree, ast.BinOp | ast.Call) else None
        part = self.reader.loads.get(found[0], Part()) if found else Part()
        if part.kind != "act":
            return None
        _, value, functions = found
        self.operands += [Operand(f"f{i}", function) for i, function in enumerate(functions)]
        self.options |= {"act": part.name, "functions": functions}
        self.act = part
        return value

    def keeps_its_input(self) -> bool:
        """Whether eager torch keeps what the activation is of: there is something to win, and nobody writes to it."""
        return self.act.name not in KEPT_BY_OUTPUT and not self.act.of_new

    def dropped(self, tree: Meaning) -> Meaning:
        """What a dropout is called on, or the expression itself where it calls none."""
        inner = self.called(tree, "dropout", "drop")
        if inner is not None:
            return inner
        tree = self.through(tree)
        if not isinstance(tree, ast.Call) or self.reader.part(tree.func).kind != "F.dropout" or not tree.args:
            return tree
        given = dict(zip(("input", "p", "training"), tree.args, strict=False)) | {k.arg: k.value for k in tree.keywords}
        if given.keys() != {"input", "p", "training"} or not all(map(self.reader.is_plain, list(given.values())[1:])):
            return tree
        self.operands += [Operand("drop", tree.func), Operand("p", given["p"]), Operand("training", given["training"])]
        return given["input"]

    def leaf(self, tree: Meaning, name: str) -> bool:
        """An expression that is an operand as it is."""
        tree = self.through(tree)
        if isinstance(tree, Half) or isinstance(tree, ast.Starred):
            return False
        self.operands.append(Operand(name, tree))
        return True

    def pair(self, tree: Meaning, op: type[ast.operator]) -> tuple[ast.expr, ast.expr] | None:
        tree = self.through(tree)
        return (tree.left, tree.right) if isinstance(tree, ast.BinOp) and isinstance(tree.op, op) else None

    def same_leaf(self, trees: Sequence[Meaning]) -> bool:
        """Whether all are one local name, which becomes the operand `input`."""
        through = [self.through(tree) for tree in trees]
        names = {tree.id for tree in through if isinstance(tree, ast.Name)}
        alike = len(names) == 1 and all(isinstance(tree, ast.Name) for tree in through)
        return alike and names <= self.reader.fast and self.leaf(through[0], "input")

    # Patterns

    def mlp(self, tree: Meaning) -> str | None:
        if (inner := self.called(tree, "linear", "last")) is None:
            return None
        if (inner := self.called(self.dropped(inner), "act", "act")) is None:
            return None
        inner = self.called(inner, "linear", "first")
        return "MLP" if inner is not None and self.leaf(inner, "input") else None

    def gated_mlp(self, tree: Meaning, first: int) -> str | None:
        if (inner := self.called(tree, "linear", "last")) is None:
            return None
        if (sides := self.pair(self.dropped(inner), ast.Mult)) is None:
            return None
        return "gated MLP" if self._gate(sides[first], sides[1 - first]) else None

    def packed_mlp(self, tree: Meaning, first: int) -> str | None:
        if (inner := self.called(tree, "linear", "last")) is None:
            return None
        whole = self._halves(self.dropped(inner), first)
        if whole is None or (inner := self.called(whole, "linear", "packed")) is None:
            return None
        return "packed gated MLP" if self.leaf(inner, "input") else None

    def gated_products(self, tree: Meaning, first: int) -> str | None:
        sides = self.pair(tree, ast.Mult)
        return "gate of two products" if sides and self._gate(sides[first], sides[1 - first]) else None

    def packed_glu(self, tree: Meaning, first: int) -> str | None:
        whole = self._halves(tree, first)
        return "packed gate" if whole is not None and self.keeps_its_input() and self.leaf(whole, "input") else None

    def glu(self, tree: Meaning, first: int) -> str | None:
        if (sides := self.pair(tree, ast.Mult)) is None:
            return None
        gate = self.called(sides[first], "act", "act")
        if gate is None or not self.keeps_its_input():
            return None
        return "gate" if self.leaf(gate, "gate") and self.leaf(sides[1 - first], "value") else None

    def _gate(self, gated: ast.expr, value: ast.expr) -> bool:
        """act(gate(input)) * value(input)."""
        if (inner := self.called(gated, "act", "act")) is None:
            return False
        if (gate_input := self.called(inner, "linear", "gate")) is None:
            return False
        value_input = self.called(value, "linear", "value")
        return value_input is not None and self.same_leaf((gate_input, value_input))

    def _halves(self, tree: Meaning, first: int) -> ast.expr | None:
        """What act(half) * half are the halves of."""
        if (sides := self.pair(tree, ast.Mult)) is None:
            return None
        if (gate := self.called(sides[first], "act", "act")) is None:
            return None
        halves = self.through(gate), self.through(sides[1 - first])
        if not all(isinstance(half, Half) for half in halves) or halves[0].tensor is not halves[1].tensor:
            return None
        self.options["layout"] = "gate_first" if halves[0].index == 0 else "value_first"
        return halves[0].tensor if {half.index for half in halves} == {0, 1} else None

    def norm_act(self, tree: Meaning) -> str | None:
        if (inner := self.called(tree, "act", "act")) is None:
            return None
        inner = self.called(inner, "norm", "norm")
        return "norm, activation" if inner is not None and self.leaf(inner, "input") else None

    def act_drop(self, tree: Meaning) -> str | None:
        inner = self.dropped(tree)
        if inner is tree or (inner := self.called(inner, "act", "act")) is None:
            return None
        return "activation, dropout" if self.keeps_its_input() and self.leaf(inner, "input") else None

    def add_norm(self, tree: Meaning, first: int) -> str | None:
        """The norm of a sum that nobody else reads."""
        if (inner := self.called(tree, "norm", "norm")) is None:
            return None
        self.options["total"] = False
        return "add, norm" if self.sum(inner, first) else None

    def sum(self, tree: Meaning, first: int) -> bool:
        """left + right, which may be dropped out."""
        if (sides := self.pair(tree, ast.Add)) is None:
            return False
        right = self.dropped(sides[1 - first])
        dropped = right is not sides[1 - first]
        return (dropped or first == 0) and self.leaf(sides[first], "left") and self.leaf(right, "right")

    def modulated(self, tree: Meaning, outer: int, inner: int, one: int) -> str | None:
        """norm(input) * (1 + scale) + shift; which side is which is tried."""
        if (sums := self.pair(tree, ast.Add)) is None:
            return None
        if (factors := self.pair(sums[outer], ast.Mult)) is None:
            return None
        if (ones := self.pair(factors[1 - inner], ast.Add)) is None or getattr(ones[one], "value", None) not in (
            1,
            1.0,
        ):
            return None
        normed = self.called(factors[inner], "norm", "norm")
        if normed is None or not self.leaf(normed, "input"):
            return None
        for name, view in (("scale", ones[1 - one]), ("shift", sums[1 - outer])):
            base = self.through(view)
            text = base if isinstance(base, ast.AST) else None
            while isinstance(base, ast.Subscript) and _is_view(base.slice):
                base = base.value
            if not isinstance(base, ast.Name) or base.id not in self.reader.fast:
                return None
            self.operands.append(Operand(name, base))
            self.options[f"{name}_view"] = _viewed(ast.unparse(text), base.id)
        return "norm, scale and shift"

    def activation(self, tree: Meaning) -> str | None:
        """A formula by itself; what is a call of a module is the module's affair."""
        inner = self.formula_of(tree)
        if inner is None or not self.keeps_its_input() or not self.leaf(inner, "input"):
            return None
        return f"bias_act ({self.act.name})"


# Larger ones first.
_PATTERNS: tuple[tuple[str, Callable[..., str | None]], ...] = (
    ("mlp", Attempt.mlp),
    *(("gated_mlp", functools.partial(Attempt.gated_mlp, first=i)) for i in (0, 1)),
    *(("packed_mlp", functools.partial(Attempt.packed_mlp, first=i)) for i in (0, 1)),
    *(
        ("modulated", functools.partial(Attempt.modulated, outer=i, inner=j, one=k))
        for i in (0, 1)
        for j in (0, 1)
        for k in (0, 1)
    ),
    ("norm_act", Attempt.norm_act),
    *(("add_norm", functools.partial(Attempt.add_norm, first=i)) for i in (1, 0)),
    *(("packed_glu", functools.partial(Attempt.packed_glu, first=i)) for i in (0, 1)),
    *(("gated_products", functools.partial(Attempt.gated_products, first=i)) for i in (0, 1)),
    *(("glu", functools.partial(Attempt.glu, first=i)) for i in (0, 1)),
    ("act_drop", Attempt.act_drop),
    ("activation", Attempt.activation),
)


def matches(reader: Reader, root: ast.expr, run: Run | None, begins: ast.expr) -> Iterator[Match]:
    """What the expression may be read as, larger patterns first. `begins` is what is evaluated first: the root, or the
    value of the run's first statement."""
    for kind, pattern in _PATTERNS:
        attempt = Attempt(reader, run)
        said = pattern(attempt, root)
        if said is None or len(attempt.looked_through) != (run.made if run else 0):
            continue
        match = settled(reader, kind, root, attempt.operands, attempt.options, begins, said)
        if match is not None:
            yield match


def _is_view(index: ast.AST) -> bool:
    """None, `:` and `...`, which make a view whatever the tensor's shape is."""
    parts = index.elts if isinstance(index, ast.Tuple) else [index]
    return all(
        (isinstance(part, ast.Constant) and part.value in (None, ...))
        or (isinstance(part, ast.Slice) and part.lower is part.upper is part.step is None)
        for part in parts
    )


def _viewed(text: str, name: str) -> Callable[[Any], Any]:
    return eval(f"lambda {name}: {text}")

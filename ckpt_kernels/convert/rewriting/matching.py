"""Expressions that one of our calls computes: what is written, held against the templates of `sites`.

A pattern is recognised by its form, and by what the loads in it were when the model was converted (`Roles`): a linear
layer, an activation, a norm, a dropout. What they are at a call is the site's question.
"""

import ast
from collections.abc import Iterator
from typing import Any

from ..code.straight_line import Binding, Half, Run
from ..rules.pointwise import KEPT_BY_OUTPUT
from .fused_patterns import PATTERNS
from .reader import Match, Operand, Reader, match_of
from .roles import ADAPTED, Role
from .templates import Pattern, kind_of


class Attempt:
    """One try to read an expression in one way."""

    def __init__(self, reader: Reader, run: Run | None) -> None:
        self.reader = reader
        self.bindings = run.bindings if run else {}
        self.looked_through: set[int] = set()
        self.operands: list[Operand] = []
        self.options: dict[str, Any] = {}
        self.act = Role()
        # The name of an activation that is written out.
        self.activation: str | None = None
        self._halves: dict[str, Half] = {}

    def fits(self, tree: Binding, template: Any) -> bool:
        """Whether an expression is written like a template. What stands for its names becomes operands."""
        if isinstance(template, ast.Name):
            return self._leaf(tree, template.id)
        tree = self._through(tree)
        if isinstance(template, ast.Constant):
            return isinstance(tree, ast.Constant) and type(tree.value) in (int, float) and tree.value == template.value
        if isinstance(template, ast.BinOp):
            if not isinstance(tree, ast.BinOp) or type(tree.op) is not type(template.op):
                return False
            return self.fits(tree.left, template.left) and self.fits(tree.right, template.right)
        name, inner = template.func.id, template.args[0]
        if name == "view":
            return self._viewed(tree, inner.id)
        if name in ("gate_half", "value_half"):
            return self._half(tree, name, inner)
        if name == "formula":
            argument = self._formula(tree)
        else:
            argument = self._dropped(tree) if name == "drop" else self._called(tree, name)
        return argument is not None and self.fits(argument, inner)

    def _through(self, tree: Binding, *others: ast.AST) -> Binding:
        """What a name that the run makes stands for, in this place and the `others`. It must not stand elsewhere."""
        while isinstance(tree, ast.AST) and id(tree) in self.bindings:
            meaning = self.bindings[id(tree)]
            if self._is_read(meaning):
                return tree
            self.looked_through.update(map(id, (tree, *others)))
            tree, others = meaning, ()
        return tree

    def _is_read(self, meaning: Binding) -> bool:
        return any(self.bindings[number] is meaning for number in self.looked_through)

    def _leaf(self, tree: Binding, name: str) -> bool:
        """An expression that is an operand as it is; where it stands twice, one local name."""
        tree = self._through(tree)
        if isinstance(tree, Half | ast.Starred):
            return False
        before = next((operand.tree for operand in self.operands if operand.name == name), None)
        if before is None:
            self.operands.append(Operand(name, tree))
            return True
        if not isinstance(tree, ast.Name) or not isinstance(before, ast.Name):
            return False
        return tree.id == before.id and tree.id in self.reader.private_locals

    def _called(self, tree: Binding, name: str) -> Binding | None:
        """The argument of a call of the part `name`, which becomes an operand."""
        kind = kind_of(name)
        if isinstance(tree, ast.Call) and len(tree.args) == 1 and not tree.keywords:
            part = self.reader.part(tree.func)
            if part.kind == kind:
                self.act = part if kind == "act" else self.act
                self.operands.append(Operand(name, tree.func))
                return tree.args[0]
        return self._formula(tree) if kind == "act" else None

    def _formula(self, tree: Binding) -> Binding | None:
        """The value that a formula of an activation is of; the functions in it become operands."""
        if not isinstance(tree, ast.BinOp | ast.Call):
            return None
        # A name in it may be the value, or stand for a part of the formula.
        for bindings in ({}, self.bindings) if self.bindings else ({},):
            found = self.reader.formula(tree, bindings)
            if found is None or not self._are_one(found.values):
                continue
            part = self.reader.loads.get(found.text, Role())
            if part.kind != "act":
                continue
            if any(self._is_read(self.bindings[number]) for number in found.names):
                return None
            self.looked_through |= found.names
            self.operands += [Operand(f"f{i}", function) for i, function in enumerate(found.functions)]
            self.act, self.activation = part, part.name
            return self._through(*found.values)
        return None

    def _are_one(self, values: list[ast.expr]) -> bool:
        """Whether a name that stands in several places stands for the same in all."""
        return len({id(self.bindings.get(id(value))) for value in values}) == 1

    def _dropped(self, tree: Binding) -> ast.expr | None:
        """What a dropout is called on."""
        if not isinstance(tree, ast.Call):
            return None
        kind = self.reader.part(tree.func).kind
        if kind == "dropout" and len(tree.args) == 1 and not tree.keywords:
            self.operands.append(Operand("drop", tree.func))
            return tree.args[0]
        given = dict(zip(("input", "p", "training"), tree.args, strict=False)) | {k.arg: k.value for k in tree.keywords}
        if kind != "F.dropout" or given.keys() != {"input", "p", "training"}:
            return None
        if not self.reader.is_plain(given["p"]) or not self.reader.is_plain(given["training"]):
            return None
        self.operands += [Operand("drop", tree.func), Operand("p", given["p"]), Operand("training", given["training"])]
        return given["input"]

    def _half(self, tree: Binding, name: str, whole: ast.expr) -> bool:
        if not isinstance(tree, Half):
            return False
        self._halves[name] = tree
        if len(self._halves) == 1:
            if tree.function is not None:
                self.operands.append(Operand("halves", tree.function))
            return self.fits(tree.tensor, whole)
        gate, value = self._halves["gate_half"], self._halves["value_half"]
        self.options["layout"] = "gate_first" if gate.number == 0 else "value_first"
        self.options["dim"] = gate.dim
        return gate.tensor is value.tensor and {gate.number, value.number} == {0, 1}

    def is_of_parts(self, pattern: Pattern) -> bool:
        """Whether the activation is of a part of what eager torch keeps, as a factor of the activation."""
        if self.act.name == "identity":
            return False
        if pattern.halved:
            return True
        gate, value = (next((o.tree for o in self.operands if o.name == name), None) for name in ("gate", "value"))
        if "parts" not in pattern.takes or gate is None or value is None or not self.reader.are_parts(gate, value):
            return False
        self.options["parts"] = True
        return True

    def said(self, pattern: Pattern) -> str:
        """What the pattern computes here, for people."""
        dim = self.options.get("dim", -1)
        where = f" (where dimension {dim} is the last)" if dim >= 0 else ""
        if any(self.reader.part(operand.tree).name == ADAPTED for operand in self.operands):
            where += " (once its adapters are taken out)"
        return pattern.said.format(self.act.name) + where

    def _viewed(self, tree: Binding, name: str) -> bool:
        """A view of a local name, which becomes the operand, and how it is taken."""
        base = tree
        while isinstance(base, ast.Subscript) and _is_view(base.slice):
            base = base.value
        if isinstance(tree, Half) or not isinstance(base, ast.Name) or base.id not in self.reader.private_locals:
            return False
        self.operands.append(Operand(name, base))
        self.options[f"{name}_view"] = eval(f"lambda {base.id}: {ast.unparse(tree)}")
        return True


def matches(reader: Reader, root: ast.expr, run: Run | None, begins: ast.expr) -> Iterator[Match]:
    """What the expression may be read as, larger patterns first. `begins` is what is evaluated first: the root, or the
    value of the run's first statement."""
    for pattern in PATTERNS:
        for attempt in attempts(reader, root, run, pattern):
            match = match_of(reader, root, begins, pattern, attempt)
            if match is not None:
                yield match


def attempts(
    reader: Reader, root: ast.expr, run: Run | None, pattern: Pattern, spellings: tuple[ast.expr, ...] | None = None
) -> Iterator[Attempt]:
    """The ways to read an expression as a pattern; or as part of it, in the place of the whole."""
    for spelling in pattern.spellings if spellings is None else spellings:
        attempt = Attempt(reader, run)
        if not attempt.fits(root, spelling) or attempt.looked_through != attempt.bindings.keys():
            continue
        # Eager torch keeps what such an activation is of: there is something to win, and nobody writes to it.
        if pattern.made or (attempt.act.name not in KEPT_BY_OUTPUT and not attempt.act.of_new):
            yield attempt
        elif attempt.is_of_parts(pattern):
            yield attempt


def _is_view(index: ast.AST) -> bool:
    """None, `:` and `...`, which make a view whatever the tensor's shape is."""
    parts = index.elts if isinstance(index, ast.Tuple) else [index]
    return all(
        (isinstance(part, ast.Constant) and part.value in (None, ...))
        or (isinstance(part, ast.Slice) and part.lower is part.upper is part.step is None)
        for part in parts
    )

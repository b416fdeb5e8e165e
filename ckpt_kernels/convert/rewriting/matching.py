"""Pattern matching: compares expressions with the templates of `fused_patterns`.

An expression matches by its form and by the roles that its loads had during conversion: a linear layer, an activation,
a norm, a dropout. The guards check at each call whether the loads still have these roles.
"""

import ast
from collections.abc import Iterator
from typing import Any, NamedTuple

from ..code.evaluation_order import in_evaluation_order, is_evaluated_first
from ..code.straight_line import Binding, Half, Run
from ..code.syntax_trees import index_parts, keeps_dimensions
from ..rules.pointwise import KEPT_BY_OUTPUT
from .formulas import formula_of
from .fused_patterns import PATTERNS
from .reader import Operand, Reader
from .roles import ADAPTED, Role
from .templates import Pattern, kind_of


class Attempt:
    """An attempt to match an expression with one spelling of a pattern.

    `substituted` are the ids of the nodes of names that bindings replaced, `options` the constant arguments of the
    fused call, and `act` the role of the activation.
    """

    def __init__(self, reader: Reader, run: Run | None) -> None:
        self.reader = reader
        self.bindings = run.bindings if run else {}
        self.substituted: set[int] = set()
        self.operands: list[Operand] = []
        self.options: dict[str, Any] = {}
        self.act = Role()
        self._halves: dict[str, Half] = {}

    def fits(self, tree: Binding, template: Any) -> bool:
        """Whether an expression has the form of a template. The names in the template collect operands."""
        if isinstance(template, ast.Name):
            return self._operand_fits(tree, template.id)
        tree = self._resolved(tree)
        if isinstance(template, ast.Constant):
            return isinstance(tree, ast.Constant) and type(tree.value) in (int, float) and tree.value == template.value
        if isinstance(template, ast.BinOp):
            if not isinstance(tree, ast.BinOp) or type(tree.op) is not type(template.op):
                return False
            return self.fits(tree.left, template.left) and self.fits(tree.right, template.right)
        name, inner = template.func.id, template.args[0]
        if name == "view":
            return self._view_fits(tree, inner.id)
        if name in ("gate_half", "value_half"):
            return self._half_fits(tree, name, inner)
        if name == "formula":
            argument = self._formula(tree)
        else:
            argument = self._dropout_argument(tree) if name == "drop" else self._call_argument(tree, name)
        return argument is not None and self.fits(argument, inner)

    def _resolved(self, tree: Binding, *others: ast.AST) -> Binding:
        """The binding of a name that the run binds, if all reads of the binding are here and in `others`."""
        while isinstance(tree, ast.AST) and id(tree) in self.bindings:
            binding = self.bindings[id(tree)]
            if self._is_used(binding):
                return tree
            self.substituted.update(map(id, (tree, *others)))
            tree, others = binding, ()
        return tree

    def _is_used(self, binding: Binding) -> bool:
        """Whether a binding has replaced another read already, and so would be evaluated twice."""
        return any(self.bindings[number] is binding for number in self.substituted)

    def _operand_fits(self, tree: Binding, name: str) -> bool:
        """Whether an expression can be the operand `name`: if that stands twice in the template, one local name."""
        tree = self._resolved(tree)
        if isinstance(tree, Half | ast.Starred):
            return False
        before = next((operand.tree for operand in self.operands if operand.name == name), None)
        if before is None:
            self.operands.append(Operand(name, tree))
            return True
        if not isinstance(tree, ast.Name) or not isinstance(before, ast.Name):
            return False
        return tree.id == before.id and tree.id in self.reader.scope.private_locals

    def _call_argument(self, tree: Binding, name: str) -> Binding | None:
        """The argument of a call whose callee has the role that a template calls `name`, and becomes an operand."""
        kind = kind_of(name)
        if isinstance(tree, ast.Call) and len(tree.args) == 1 and not tree.keywords:
            role = self.reader.role(tree.func)
            if role.kind == kind:
                self.act = role if kind == "act" else self.act
                self.operands.append(Operand(name, tree.func))
                return tree.args[0]
        return self._formula(tree) if kind == "act" else None

    def _formula(self, tree: Binding) -> Binding | None:
        """The argument of an activation that is a formula; the functions in the formula become operands."""
        if not isinstance(tree, ast.BinOp | ast.Call):
            return None
        # A name may be the value, or its binding may be a part of the formula.
        for bindings in ({}, self.bindings) if self.bindings else ({},):
            formula = formula_of(tree, self.reader.scope, bindings)
            if formula is None or not self._are_same_value(formula.values):
                continue
            role = self.reader.roles.get(formula.text, Role())
            if role.kind != "formula":
                continue
            if any(self._is_used(self.bindings[number]) for number in formula.names):
                return None
            self.substituted |= formula.names
            self.operands += [Operand(f"f{i}", function) for i, function in enumerate(formula.functions)]
            self.act = role
            return self._resolved(*formula.values)
        return None

    def _are_same_value(self, values: list[ast.expr]) -> bool:
        """Whether all occurrences of a name have the same binding."""
        return len({id(self.bindings.get(id(value))) for value in values}) == 1

    def _dropout_argument(self, tree: Binding) -> ast.expr | None:
        """The argument of a dropout, module or `F.dropout`, which becomes an operand; None for other expressions."""
        if not isinstance(tree, ast.Call):
            return None
        kind = self.reader.role(tree.func).kind
        if kind == "dropout" and len(tree.args) == 1 and not tree.keywords:
            self.operands.append(Operand("drop", tree.func))
            return tree.args[0]
        args = dict(zip(("input", "p", "training"), tree.args, strict=False)) | {k.arg: k.value for k in tree.keywords}
        if kind != "F.dropout" or args.keys() != {"input", "p", "training"}:
            return None
        if not self.reader.is_plain(args["p"]) or not self.reader.is_plain(args["training"]):
            return None
        self.operands += [Operand("drop", tree.func), Operand("p", args["p"]), Operand("training", args["training"])]
        return args["input"]

    def _half_fits(self, tree: Binding, name: str, whole: ast.expr) -> bool:
        """Whether an expression can be `gate_half` or `value_half` of the tensor that `whole` describes."""
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

    def gates_views(self, pattern: Pattern) -> bool:
        """Whether the activation's input is a view of a tensor whose storage eager torch saves for the value's sake."""
        if self.act.name == "identity":
            return False
        if pattern.act_input_is_half:
            return True
        gate, value = (next((o.tree for o in self.operands if o.name == name), None) for name in ("gate", "value"))
        if "views" not in pattern.parameters or gate is None or value is None:
            return False
        if not self.reader.may_be_views(gate, value):
            return False
        self.options["views"] = True
        return True

    def description(self, pattern: Pattern) -> str:
        """What the pattern computes at this site, for people."""
        dim = self.options.get("dim", -1)
        where = f" (where dimension {dim} is the last)" if dim >= 0 else ""
        if any(self.reader.role(operand.tree).name == ADAPTED for operand in self.operands):
            where += " (once its adapters are taken out)"
        return pattern.description.format(self.act.name) + where

    def _view_fits(self, tree: Binding, name: str) -> bool:
        """Whether an expression views a local name, which becomes the operand, with the view among the options."""
        base = tree
        while isinstance(base, ast.Subscript) and all(map(keeps_dimensions, index_parts(base))):
            base = base.value
        if isinstance(tree, Half) or not isinstance(base, ast.Name) or base.id not in self.reader.scope.private_locals:
            return False
        self.operands.append(Operand(name, base))
        self.options[f"{name}_view"] = eval(f"lambda {base.id}: {ast.unparse(tree)}")
        return True


class Match(NamedTuple):
    """An expression, `root`, that a pattern computes, with the operands in evaluation order.

    `captured` are the operands that must not be evaluated again if the original expression runs: the one that is no
    plain load, which is evaluated first, and the loads before that operand.
    """

    pattern: Pattern
    root: ast.expr
    operands: list[Operand]
    captured: list[Operand]
    attempt: Attempt


def matches(reader: Reader, root: ast.expr, run: Run | None, begins: ast.expr) -> Iterator[Match]:
    """The matches of an expression, larger patterns first.

    `begins` is the expression that is evaluated first: the root, or the value of the run's first statement.
    """
    for pattern in PATTERNS:
        for attempt in attempts(reader, root, run, pattern):
            match = match_of(reader, root, begins, pattern, attempt)
            if match is not None:
                yield match


def attempts(
    reader: Reader, root: ast.expr, run: Run | None, pattern: Pattern, spellings: tuple[ast.expr, ...] | None = None
) -> Iterator[Attempt]:
    """The attempts to match an expression that succeed.

    `spellings` replace those of the pattern, to match a part of the pattern.
    """
    for spelling in pattern.spellings if spellings is None else spellings:
        attempt = Attempt(reader, run)
        if not attempt.fits(root, spelling) or attempt.substituted != attempt.bindings.keys():
            continue
        # Eager torch saves the activation's input: fusing saves memory, and user code does not write to the input.
        if pattern.makes_act_input or (attempt.act.name not in KEPT_BY_OUTPUT and not attempt.act.needs_computed_input):
            yield attempt
        elif attempt.gates_views(pattern):
            yield attempt


def match_of(reader: Reader, root: ast.expr, begins: ast.expr, pattern: Pattern, attempt: Attempt) -> Match | None:
    """The match of an attempt, None if evaluating all operands first could change what the original code does.

    `begins` is the expression that the original code evaluates first.
    """
    operands = attempt.operands
    computed = [operand for operand in operands if not reader.is_plain(operand.tree)]
    if len(computed) > 1 or len({operand.name for operand in operands}) != len(operands):
        return None
    if not computed:
        return Match(pattern, root, operands, [], attempt)
    if not is_evaluated_first(begins, computed[0].tree, reader.is_plain):
        return None
    # The original expression reads local names again, so that the computed operand must not rebind them.
    if any(isinstance(node, ast.NamedExpr) for node in ast.walk(computed[0].tree)):
        return None
    before = []
    for node in in_evaluation_order(begins):
        operand = next((operand for operand in operands if operand.tree is node), None)
        if operand is not None:
            before.append(operand)
        if operand is computed[0]:
            break
    rest = [operand for operand in operands if operand not in before]
    captured = [operand for operand in before if not isinstance(operand.tree, ast.Name) or operand is computed[0]]
    return Match(pattern, root, [*before, *rest], captured, attempt)

"""Rewriting of a method: puts guarded fused calls in the place of the expressions that they compute.

An expression becomes `results.pop() if (results := guarded_call(...)).pop() else expression`, and a run of statements

    if (results := guarded_call(...)).pop(): the last statement, with results.pop() for the computed expression
    else: the original statements

Operands are evaluated once and in the original order. Each use pops a result off the list, so that no name holds a
tensor longer than in the original method. The rest of the method stays as written.
"""

import ast
import contextlib
import copy
import itertools
import types
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F

from ...levels import level_of_blocks, runs_layers_again
from ..code.code_objects import has_type
from ..code.memoization import memoized
from ..code.scope import Scope
from ..code.source import Definition, NoSource, decorator_chain, definition_of, rebuilt, redecorated
from ..code.straight_line import OPAQUE, Block, blocks
from ..code.syntax_trees import at, replaced, with_changed_children
from ..code.wrapped_functions import check_wrapper
from ..code.written_names import written_names
from ..rules.gates import TriedGate, gate_at_site
from ..rules.in_place import following_writes
from .branch_tails import move_into_branches
from .callable_objects import replacing_call
from .closure import Closure
from .gate_runs import GateRun, gate_of_run, gate_runs
from .matching import Match, matches
from .native_sites import native_site
from .note_reasons import IN_LAYERS, is_indexed_by_list, permutes_dimensions, reasons_to_note
from .noted_trees import DEFINITIONS, Notes
from .reader import Operand, Reader
from .replacements import FUNCTION_TYPES, NORMS, exchanging, layer_norm_of_rows, replacement_for
from .result_list import condition_of, next_result
from .roles import SUPER_NORM, MethodRoles, Role, Roles, tried_act
from .run_lines import after_lines, lines_without_code, loaded_early, passed
from .run_matching import rank, run_matches
from .super_norms import exchanging_super, norm_with_forward
from .templates import guarded_call


class Rewritten(NamedTuple):
    """A recompiled function, and descriptions, for people, of what the rewrite computes.

    `fuses`: whether the rewrite computes anything, and does not only note operators; `has_norm`: whether the rewrite
    computes a functional norm of torch.
    """

    function: types.FunctionType
    descriptions: list[str]
    fuses: bool
    has_norm: bool


@memoized
def rewritten_method(method: types.FunctionType, roles: MethodRoles, recompute: str) -> Rewritten | None:
    """The method rewritten for the roles of its loads, None if nothing changes; decorators stay. Raises `NoSource`."""
    chain = decorator_chain(method)
    function = chain[-1]
    definition = definition_of(function)
    rewriter = _Rewriter(function, definition, dict(roles), recompute)
    body = rewriter.rewritten_body()
    fuses = bool(rewriter.descriptions)
    if not fuses and rewriter.notes.has_any:
        rewriter.descriptions += reasons_to_note(function, dict(roles), recompute, rewriter.notes.has_products)
    if not rewriter.descriptions:
        return None
    tree = copy.copy(definition.tree)
    tree.body = body
    made = rebuilt(function, definition._replace(tree=tree), rewriter.closure.values)
    for wrapper, wrapped in itertools.pairwise(chain):
        check_wrapper(wrapper, wrapped)
    return Rewritten(redecorated(chain, made), rewriter.descriptions, fuses, rewriter.has_norm)


class _Rewriter:
    """Rewrites the body of one function."""

    def __init__(self, function: types.FunctionType, definition: Definition, roles: Roles, recompute: str) -> None:
        self.function = function
        self.recompute = recompute
        self.scope = Scope(function, definition.tree)
        self.closure = Closure()
        self.notes = Notes(function, self.scope, roles, recompute, self.closure)
        self.tree = copy.deepcopy(definition.tree)
        move_into_branches(self.tree, roles)
        self.reader = Reader(roles, self.scope, self.tree)
        self.descriptions: list[str] = []
        self.has_norm = False
        self.written = set(written_names(self.tree, self.scope))
        # Original statements, which run where a fused call does not compute: their matches are described already.
        self._originals: list[list[ast.stmt]] = []

    def rewritten_body(self) -> list[ast.stmt]:
        """The body of the function, rewritten."""
        for block in list(blocks(self.tree)):
            self._rewrite_block(block)
        return [self._rewrite(statement) for statement in self.tree.body]

    # Runs of statements

    def _rewrite_block(self, block: Block) -> None:
        """Replace runs of statements in place, those of the largest patterns first."""
        taken: set[int] = set()
        replacements: dict[int, tuple[int, ast.stmt]] = {}
        for run in gate_runs(self.tree, block, self.scope):
            gate = gate_of_run(self.function, run, self.reader.roles)
            if gate is not None and taken.isdisjoint(indices := range(run.begin, run.end + 1)):
                taken.update(indices)
                replacements[run.begin] = run.end, self._gate_statements(gate, run, block)
        candidates = run_matches(self.reader, self.tree, block, self.written)
        for match, begin, end, norm in sorted(candidates, key=rank):
            if taken.isdisjoint(indices := range(begin, end + 1)):
                taken.update(indices)
                replacements[begin] = end, self._fused_statements(match, norm, block.statements[begin : end + 1])
        statements, index = [], 0
        while index < len(block.statements):
            end, statement = replacements.get(index, (index, block.statements[index]))
            statements.append(statement)
            index = end + 1
        block.statements[:] = statements

    def _fused_statements(self, match: Match, norm: ast.expr | None, statements: Sequence[ast.stmt]) -> ast.stmt:
        """The replacement for a run: see `run_matching.RunMatch`."""
        results = {id(match.root): next_result()} | ({} if norm is None else {id(norm): next_result()})
        computed = [replaced(statement, results) for statement in (statements[-1:] if norm is None else statements)]
        captured = {id(operand.tree): next_result() for operand in match.captured}
        original = [replaced(statement, captured) for statement in statements]
        first: Any = statements[0]
        return self._if_computed(self._has_computed(match, first.value), computed, original, statements)

    def _gate_statements(self, gate: TriedGate, run: GateRun, block: Block) -> ast.stmt:
        """The replacement for a run that is a gate."""
        original: list[Any] = block.statements[run.begin : run.end + 1]
        arguments: list[ast.expr] = [ast.Name(name, ast.Load()) for name in (self.scope.self_name, run.packed)]
        condition = condition_of(ast.Call(self.closure.variable(gate_at_site(gate)), arguments, []))
        self.descriptions.append(str(gate))
        computed = replaced(original[-1], {id(original[-1].value): next_result()})
        return self._if_computed(at(original[0], condition), [computed], original, original)

    def _if_computed(
        self, condition: ast.expr, computed: list[ast.stmt], original: list[ast.stmt], written: Sequence[ast.stmt]
    ) -> ast.stmt:
        """The `computed` statements if the fused call computes, else the original ones, which were `written`."""
        self._originals.append(original)
        passing = passed(lines_without_code(written, condition, *computed), computed[-1])
        return ast.copy_location(ast.If(condition, passing + computed, original), original[0])

    # Expressions

    def _rewrite(self, tree: Any) -> Any:
        """A copy of a tree in which fused calls, replacements and notes take the place of expressions."""
        if isinstance(tree, list):
            count = len(self.descriptions)
            rewritten_list = [self._rewrite(child) for child in tree]
            if any(tree is original for original in self._originals):
                del self.descriptions[count:]
            return rewritten_list
        if not isinstance(tree, ast.AST) or isinstance(tree, (*OPAQUE, *DEFINITIONS)):
            return tree
        if isinstance(tree, ast.BinOp | ast.Call):
            match = next(matches(self.reader, tree, None, tree), None)
            if match is not None:
                return self._fused_expression(match)
        changed: Any = with_changed_children(tree, self._rewrite)
        if isinstance(tree, ast.Call) and (role := self.reader.role(tree.func)).kind:
            changed.func = self._replaced_callee(tree, role)
            if self.notes.follows_writes and role.kind in ("act", "write") and not role.values:
                changed.func = self.closure.mapped(changed.func, following_writes)
            if runs_layers_again(self.recompute) and role.kind in IN_LAYERS:
                return self.notes.watched(tree, changed)
        if runs_layers_again(self.recompute) and is_indexed_by_list(tree):
            return self.notes.watched(tree, changed)
        return self.notes.noted(changed)

    def _fused_expression(self, match: Match) -> ast.expr:
        captured = {id(operand.tree): next_result() for operand in match.captured}
        original = self.notes.with_notes(replaced(match.root, captured))
        condition = self._has_computed(match, match.root)
        result = at(match.root, next_result())
        result = after_lines(lines_without_code([match.root], condition, result), result)
        return at(match.root, ast.IfExp(condition, result, original))

    def _has_computed(self, match: Match, begins: ast.expr) -> ast.expr:
        """The condition that makes the guarded call, after the native call if the site has one.

        `begins` is the expression that is evaluated first, in whose line the calls are made.
        """
        pattern, attempt = match.pattern, match.attempt
        options = attempt.options.copy()
        if "recompute" in pattern.parameters:
            options["recompute"] = level_of_blocks(self.recompute)
        captured = [operand.name for operand in match.captured]
        formula = attempt.act if attempt.act.kind == "formula" else None
        function = guarded_call(pattern, captured, options, formula, tried_act(attempt.act))
        keywords = [ast.keyword(operand.name, self._operand(operand, match, begins)) for operand in match.operands]
        condition = condition_of(ast.Call(self.closure.variable(function), [], keywords))
        self.descriptions.append(attempt.description(pattern))
        if (native := native_site(match, self.scope.self_name, options)) is not None:
            native_call, arguments = native
            loads = [self._plain_load(argument, begins) for argument in arguments]
            native_condition = condition_of(ast.Call(self.closure.variable(native_call), loads, []))
            condition = ast.BoolOp(ast.Or(), [native_condition, condition])
        return at(begins, condition)

    def _operand(self, operand: Operand, match: Match, begins: ast.expr) -> ast.expr:
        if not self.reader.is_plain(operand.tree):
            return self._rewrite(operand.tree)
        return operand.tree if operand in match.captured else self._plain_load(operand.tree, begins)

    def _plain_load(self, tree: ast.expr, begins: ast.expr) -> ast.expr:
        is_there = getattr(tree, "lineno", begins.lineno) == begins.lineno
        return tree if is_there else loaded_early(tree, begins, self.closure.variable(getattr))

    # Callees

    def _replaced_callee(self, call: ast.Call, role: Role) -> ast.expr:
        """The callee of a call, or an expression that evaluates to a replacement for the callee."""
        callee = call.func
        if role.kind == "object":
            return self._replaced_object(callee, *role.values)
        if role.kind == SUPER_NORM:
            (forward,) = role.values
            if len(call.args) != 1 or call.keywords or isinstance(call.args[0], ast.Starred):
                return callee
            self.descriptions.append(str(norm_with_forward(forward)))
            return self.closure.mapped(callee, exchanging_super(forward))
        if len(role.values) > 1:  # a method, which is rewritten itself
            return callee
        is_local = role.kind == "local replacement"
        (known,) = role.values or ((self.scope.local_function if is_local else self.scope.value)(callee),)
        noted = self.notes.noted_function(known) if has_type(known, FUNCTION_TYPES) else None
        if noted is not None:
            return self.closure.mapped(callee, exchanging(known, noted))
        replacement = replacement_for(known, call)
        if replacement is None:
            return callee
        function, description = replacement
        # A norm of a map as it lies pays only where the function moves the channels back. Recipes of views of the norm
        # are found, and writes over them followed, only if the block's own output is the tensor that the model views.
        if known is F.layer_norm and (self.notes.follows_writes or not permutes_dimensions(self.function)):
            function = layer_norm_of_rows
        self.has_norm = self.has_norm or (has_type(known, FUNCTION_TYPES) and known in NORMS)
        self.descriptions.append(description)
        return self.closure.mapped(callee, exchanging(known, function, is_local))

    def _replaced_object(self, callee: ast.expr, method: types.FunctionType, roles: MethodRoles) -> ast.expr:
        inner = None
        with contextlib.suppress(NoSource):
            inner = rewritten_method(method, roles, self.recompute)
        if inner is None:
            return callee
        self.descriptions += inner.descriptions
        self.has_norm = self.has_norm or inner.has_norm
        return self.closure.mapped(callee, replacing_call(method, inner.function))

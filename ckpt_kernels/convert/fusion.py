"""Patterns in a method's graph that one of our functions computes, and their replacement by a call of `calls`.

What is between the parts of a pattern must have no other reader. Larger patterns are looked for first.
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..activations import FUNCTIONS
from . import calls, expected
from .norms import BatchNorm, Norm, RowNorm
from .pointwise import KEPT_BY_OUTPUT, ActivationRule, named_activation
from .swap import rule_of

# Functions, and methods by name; those with a "_" write over their input.
_ACTIVATIONS = FUNCTIONS | {torch.relu_: "relu", F.relu_: "relu", "relu_": "relu"}
_ACTIVATIONS |= {name: name for name in ("relu", "sigmoid", "tanh")}
_ADDS = (operator.add, operator.iadd, torch.add, "add", "add_")
_MULTIPLIES = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
_WRITING = (operator.iadd, operator.imul, torch.relu_, F.relu_, "relu_", "add_", "mul_")


class Found(NamedTuple):
    """What was found in a graph, for people, and what of it the MLPs are expected to keep."""

    names: list[str]
    kept: expected.Kept


def fuse(graph: fx.Graph, module: nn.Module, left_alone: Sequence[str], recompute: str) -> Found:
    """Replaces what fuses, in place, and says what that was. `left_alone` names modules not to touch."""
    matcher = _Matcher(graph, module, left_alone, recompute)
    matcher.run()
    return Found(matcher.found, matcher.kept)


class _Matcher:
    def __init__(self, graph: fx.Graph, module: nn.Module, left_alone: Sequence[str], recompute: str) -> None:
        self.graph = graph
        self.module = module
        self.left_alone = set(left_alone)
        self.recompute = recompute
        self.found: list[str] = []
        self.kept = expected.NOTHING

    def run(self) -> None:
        self._drop_questions()
        self._drop_identities()
        patterns: Sequence[Callable[[fx.Node], str | None]] = (
            self._mlp,
            self._modulated,
            self._norm_add_act,
            self._norm_act,
            self._add_norm,
            self._glu,
            self._act_drop,
            self._act,
            self._drop,
        )
        for pattern in patterns:
            for node in reversed(self.graph.nodes):
                found = None if node._erased else pattern(node)
                if found:
                    self.found.append(found)
        if self.recompute == "all":
            self._let_go_of_products()

    # What a node is

    def _child(self, node: Any) -> nn.Module | None:
        """The module that a node calls with one argument, if it may be touched."""
        if not isinstance(node, fx.Node) or node.op != "call_module" or node.kwargs or len(node.args) != 1:
            return None
        if not isinstance(node.args[0], fx.Node):
            return None
        names = node.target.split(".")
        if any(".".join(names[: i + 1]) in self.left_alone for i in range(len(names))):
            return None
        return self.module.get_submodule(node.target)

    def _rule(self, node: Any) -> Any:
        child = self._child(node)
        return None if child is None else rule_of(child)

    def _is_linear(self, node: Any) -> bool:
        child = self._child(node)
        return child is not None and calls.is_linear(child)

    def _activation(self, node: Any) -> tuple[Any, fx.Node] | None:
        """The activation that a node computes, as `calls` takes it, and its input."""
        if not self._may_be_replaced(node):
            return None
        child = self._child(node)
        if child is not None:
            return (self._reference(node), node.args[0]) if named_activation(child) else None
        if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method") or not node.args:
            return None
        name = _ACTIVATIONS.get(node.target)
        if name is None or len(node.args) != 1 or not isinstance(node.args[0], fx.Node):
            return None
        settings = {key: value for key, value in node.kwargs.items() if key != "inplace"}
        approximate = settings.pop("approximate", "none")
        defaults = {"negative_slope": 0.01, "alpha": 1.0, "beta": 1.0, "threshold": 20.0}
        if any(defaults.get(key) != value for key, value in settings.items()):
            return None
        return "gelu_tanh" if name == "gelu" and approximate == "tanh" else name, node.args[0]

    def _dropout(self, node: Any) -> tuple[Any, fx.Node]:
        """The dropout that a node computes, or None for one that computes none, and its input or the node itself."""
        child = self._child(node)
        if child is not None and getattr(type(child), "original", type(child)) is nn.Dropout:
            return self._reference(node), node.args[0]
        if isinstance(node, fx.Node) and node.target is F.dropout and isinstance(node.args[0], fx.Node):
            values = dict(zip(("input", "p", "training"), node.args, strict=False)) | dict(node.kwargs)
            if values.get("inplace"):
                return None, node
            if isinstance(values.get("p", 0.5), float) and type(values.get("training", True)) is bool:
                return values.get("p", 0.5) if values.get("training", True) else 0.0, values["input"]
        return None, node

    def _pair(self, node: Any, targets: tuple) -> tuple[fx.Node, fx.Node] | None:
        """The two nodes that a node adds or multiplies."""
        if not isinstance(node, fx.Node) or node.target not in targets or node.kwargs or len(node.args) != 2:
            return None
        if node.op not in ("call_function", "call_method") or not self._may_be_replaced(node):
            return None
        left, right = node.args
        return (left, right) if isinstance(left, fx.Node) and isinstance(right, fx.Node) else None

    def _may_be_replaced(self, node: Any) -> bool:
        """Whether nobody sees it if a node no longer writes over its input: it writes to none, or to what has just been
        made for it alone, by a module or as a sum or product."""
        if not isinstance(node, fx.Node):
            return False
        child = self._child(node)
        writes = node.target in _WRITING or node.kwargs.get("inplace") or getattr(child, "inplace", False)
        if not writes:
            return True
        made = node.args[0]
        if not isinstance(made, fx.Node) or set(made.users) != {node}:
            return False
        # Dropouts may make nothing, and give what they were given.
        by_module = made.op == "call_module" and self._dropout(made)[0] is None
        return by_module or (made.target in (*_ADDS, *_MULTIPLIES) and self._may_be_replaced(made))

    def _reference(self, node: fx.Node) -> "_Module":
        return _Module(node.target)

    # Patterns

    def _mlp(self, node: fx.Node) -> str | None:
        if not self._is_linear(node):
            return None
        last = self._reference(node)
        drop, before = self._dropout(node.args[0])
        inner = [node.args[0], before]
        if (match := self._gate(before)) is not None:
            act, gate, value, layout, between = match
            if not self._is_linear(gate):
                return None
            rest = act, drop, last, self.recompute, gate.args[0]
            if layout is not None:
                arguments = self._reference(gate), layout, *rest
                return self._mlp_replaced(
                    node, [*inner, *between, gate], calls.packed_mlp, arguments, "packed gated MLP"
                )
            if not self._is_linear(value) or gate.args != value.args:
                return None
            arguments = self._reference(gate), self._reference(value), *rest
            return self._mlp_replaced(node, [*inner, *between, gate, value], calls.gated_mlp, arguments, "gated MLP")
        if (match := self._activation(before)) is not None and self._is_linear(match[1]):
            act, first = match
            arguments = self._reference(first), act, drop, last, self.recompute, first.args[0]
            return self._mlp_replaced(node, [*inner, first], calls.mlp, arguments, "MLP")
        return None

    def _mlp_replaced(self, node: fx.Node, *replacement: Any) -> str | None:
        last = self._child(node)
        name = self._replace(node, *replacement)
        if name:
            self.kept += expected.of_mlp(last, "gated" in name, self.recompute)
        return name

    def _gate(self, node: Any) -> tuple[Any, fx.Node, fx.Node | None, str | None, list[fx.Node]] | None:
        """act(gate) * value: act, gate, value, and the nodes between. Of the halves of one tensor: act, it, None,
        their order, and the nodes between."""
        pair = self._pair(node, _MULTIPLIES)
        if pair is None:
            return None
        for gated, value in (pair, pair[::-1]):
            match = self._activation(gated)
            if match is None or gated is value:
                continue
            act, gate = match
            halves = _half(gate), _half(value)
            if None not in halves and halves[0][0] is halves[1][0] and {halves[0][1], halves[1][1]} == {0, 1}:
                split = halves[0][0]
                if set(split.users) == {gate, value} and set(gate.users) == {gated} and set(value.users) == {node}:
                    layout = "gate_first" if halves[0][1] == 0 else "value_first"
                    return act, split.args[0], None, layout, [gated, gate, value, split]
            return act, gate, value, None, [gated]
        return None

    def _glu(self, node: fx.Node) -> str | None:
        match = self._gate(node)
        if match is None:
            return None
        act, gate, value, layout, inner = match
        if layout is None:
            return self._replace(node, inner, calls.glu, (act, gate, value), "gate")
        return self._replace(node, inner, calls.packed_glu, (act, layout, gate), "packed gate")

    def _modulated(self, node: fx.Node) -> str | None:
        outer = self._pair(node, _ADDS)
        for product, shift in _orders(outer):
            for normed, factor in _orders(self._pair(product, _MULTIPLIES)):
                rule, scale = self._rule(normed), _one_plus(factor)
                if isinstance(rule, RowNorm) and scale is not None:
                    arguments = self._reference(normed), normed.args[0], scale, shift
                    inner = [product, normed, *([factor] if len(factor.users) == 1 else [])]
                    return self._replace(node, inner, calls.modulated, arguments, f"modulated {rule}")
        return None

    def _norm_add_act(self, node: fx.Node) -> str | None:
        match = self._activation(node)
        if match is None:
            return None
        act, total = match
        pairs = list(_orders(self._pair(total, _ADDS)))
        # The norm that comes later: the other one's output is a shortcut's.
        pairs.sort(key=lambda pair: self._place(pair[0]), reverse=True)
        for normed, residual in pairs:
            if isinstance(self._rule(normed), BatchNorm) and normed is not residual:
                arguments = self._reference(normed), act, normed.args[0], residual
                return self._replace(
                    node, [total, normed], calls.norm_add_act, arguments, "batch_norm, add, activation"
                )
        return None

    def _norm_act(self, node: fx.Node) -> str | None:
        match = self._activation(node)
        rule = None if match is None else self._rule(match[1])
        if not isinstance(rule, Norm):
            return None
        act, normed = match
        arguments = self._reference(normed), act, normed.args[0]
        return self._replace(node, [normed], calls.norm_act, arguments, f"{rule}, activation")

    def _add_norm(self, node: fx.Node) -> str | None:
        rule = self._rule(node)
        if not isinstance(rule, RowNorm) or rule.channels_first or (pair := self._pair(node.args[0], _ADDS)) is None:
            return None
        total, drop, input, residual = node.args[0], None, *pair
        inner = []
        for dropped, other in _orders(pair):
            found, before = self._dropout(dropped)
            if found is not None and len(dropped.users) == 1:
                drop, input, residual, inner = found, before, other, [dropped]
        if total.target in (operator.iadd, "add_") or not self._may_move(total, node):
            return None
        with self.graph.inserting_before(total):
            both = self._call(calls.add_norm, (self._reference(node), drop, input, residual))
            normed = self.graph.call_function(operator.getitem, (both, 0))
            summed = self.graph.call_function(operator.getitem, (both, 1))
        node.replace_all_uses_with(normed)
        total.replace_all_uses_with(summed)
        for old in (node, total, *inner):
            self.graph.erase_node(old)
        return f"add, {rule}"

    def _act_drop(self, node: fx.Node) -> str | None:
        drop, before = self._dropout(node)
        match = self._activation(before) if drop is not None else None
        if match is None:
            return None
        return self._replace(node, [before], calls.act_drop, (match[0], drop, match[1]), "activation, dropout")

    def _act(self, node: fx.Node) -> str | None:
        match = self._activation(node) if node.op != "call_module" else None
        if match is None or match[0] in KEPT_BY_OUTPUT:
            return None
        return self._replace(node, [], calls.activate, match, f"bias_act ({match[0]})")

    def _drop(self, node: fx.Node) -> str | None:
        drop, before = self._dropout(node)
        if not isinstance(drop, float) or not drop:
            return None
        return self._replace(node, [], calls.act_drop, ("identity", drop, before), "bias_act (dropout)")

    def _let_go_of_products(self) -> None:
        """Products that nothing reads but activations and gates."""
        for node in list(self.graph.nodes):
            if self._is_linear(node) and node.users and all(self._is_activation(user) for user in node.users):
                self._replace(node, [], calls.product, (self._reference(node), node.args[0]), "")
                self.found.append("linear, run again")

    def _is_activation(self, node: fx.Node) -> bool:
        if node.target in (calls.activate, calls.act_drop, calls.glu, calls.packed_glu):
            return True
        return isinstance(self._rule(node), ActivationRule)

    # Changes

    def _replace(
        self, node: fx.Node, inner: Sequence[fx.Node], function: Callable, arguments: tuple, found: str
    ) -> str | None:
        """`function(*arguments)` in the place of `node`, if nobody else reads what is between, `inner`."""
        between = [n for n in dict.fromkeys(inner) if n is not node]
        if not all(user in (node, *between) for n in between for user in n.users):
            return None
        with self.graph.inserting_before(node):
            new = self._call(function, arguments)
        node.replace_all_uses_with(new)
        for old in [node, *sorted(between, key=self._place, reverse=True)]:
            self.graph.erase_node(old)
        return found

    def _call(self, function: Callable, arguments: tuple) -> fx.Node:
        made = [self.graph.get_attr(a.name) if isinstance(a, _Module) else a for a in arguments]
        return self.graph.call_function(function, tuple(made))

    def _place(self, node: fx.Node) -> int:
        return next(i for i, n in enumerate(self.graph.nodes) if n is node)

    def _may_move(self, total: fx.Node, norm: fx.Node) -> bool:
        """Whether the norm may be computed where the sum is: nothing between may write to the sum."""
        between, node = [], total.next
        while node is not norm:
            between.append(node)
            node = node.next
        return not any(total in n.all_input_nodes for n in between)

    def _drop_identities(self) -> None:
        for node in list(self.graph.nodes):
            if type(self._child(node)) is nn.Identity:
                node.replace_all_uses_with(node.args[0])
                self.graph.erase_node(node)

    def _drop_questions(self) -> None:
        """What was asked of dtypes and devices has been answered."""
        for node in reversed(self.graph.nodes):
            if node.op == "call_function" and node.target in (getattr, operator.eq, operator.ne) and not node.users:
                self.graph.erase_node(node)


class _Module(str):
    """A module in a call's arguments, by its name."""

    @property
    def name(self) -> str:
        return str(self)


def _orders(pair: tuple[fx.Node, fx.Node] | None) -> Iterator[tuple[fx.Node, fx.Node]]:
    if pair is not None:
        yield pair
        yield pair[::-1]


def _half(node: Any) -> tuple[fx.Node, int] | None:
    """Which half of which chunk(x, 2, -1) a node is."""
    if not isinstance(node, fx.Node) or node.target is not operator.getitem:
        return None
    split, index = node.args
    if not isinstance(split, fx.Node) or split.target not in (torch.chunk, "chunk") or index not in (0, 1):
        return None
    values = dict(zip(("input", "chunks", "dim"), split.args, strict=False)) | dict(split.kwargs)
    return (split, index) if values.get("chunks") == 2 and values.get("dim") == -1 else None


def _one_plus(node: Any) -> fx.Node | None:
    """x, of a node that is 1 + x, or a view of it."""
    if not isinstance(node, fx.Node) or node.target not in _ADDS or len(node.args) != 2 or node.kwargs:
        return None
    if node.target in _WRITING:
        return None
    for one, other in (node.args, node.args[::-1]):
        if one in (1, 1.0) and isinstance(other, fx.Node):
            return other
    return None

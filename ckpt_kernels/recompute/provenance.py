"""Derives from the autograd graph how a tensor was made.

The name of an autograd node tells which op the node differentiates. The node saves the tensors that the gradient of the
op needs, which often are the op's operands. So the output of a cheap op can be recomputed, bitwise equal, from tensors
that the node keeps anyway. A `Trace` finds the steps. Only ops in the tables of `rules` are recomputed.

An operand that the node did not save is looked up through the node's edge. The edge tells which op made the operand,
but not whether the operand was written to later where autograd does not see the write (under no_grad, through
`detach()`). An unchanged version counter must prove that there was no such write.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from . import nodes
from .biases import Biases
from .cells import Absent, Cell, Operand
from .entries import Block
from .nodes import Edge
from .recipes import Step
from .rules import ATTENTIONS, BY_RESULT, KEEPING_RESULT, VIEWS, Rule
from .small_operands import SmallOperand
from .stacked_weights import StackedWeights, reads_stacked_weight
from .writers import origin_of, own_block, wrote_over_operand

# Beyond this number of ops the tensor is kept, so that traces and recipes stay short.
MOST_STEPS = 12


class Source(Protocol):
    """The interface of a context to a `Trace`: packs tensors, shares cells, and tells which parameters are
    unchanged."""

    biases: Biases
    stacked: StackedWeights
    first_node: int

    def share(self, source: Cell | Block) -> Operand | None: ...

    def pack(self, tensor: Tensor) -> Cell: ...

    def replace_result(self, own: Cell, step: Step) -> None: ...

    def held_at(self, node: Any, output: int) -> Operand | None: ...


class Trace:
    """One traversal of the autograd graph behind a tensor.

    `rules` are the ops that may run again. A recipe copies at most `most_copied` bytes of biases and small operands, so
    that it keeps less than the tensor, however few rows there are. With `temporaries`, an operand that nothing keeps is
    recomputed without proof that there was no in-place write.
    """

    def __init__(self, source: Source, rules: Mapping[str, Rule], temporaries: bool, most_copied: int) -> None:
        self._source = source
        self._most_copied = most_copied
        self._temporaries = temporaries
        self._rules = rules
        self._steps = 0
        # Whether any operand is a tensor that the graph keeps. A recipe of copied biases and small operands alone saves
        # no memory.
        self.is_grounded = False
        # The cells or blocks of tensors at edges; and nodes whose output only the following node may have written to.
        self._edge_contents: dict[Edge, Cell | Block] = {}
        self._trusted: list[Any] = []

    def step_for(self, node: Any, output: int, is_unwritten: bool = False) -> Step | None:
        """The step that recomputes a node's output; None if there is none.

        `is_unwritten` says that the output, and so any base of it, has had no in-place write.
        """
        rule = self._rules.get(nodes.name_of(node))
        self._steps += 1
        # An op that ran before the context may have read a parameter that has been written to since.
        is_within = nodes.is_made_since(node, self._source.first_node)
        if not is_within or rule is None or (output and not rule.has_several_outputs) or self._steps > MOST_STEPS:
            return None
        if rule.of_experts and not reads_stacked_weight(node):
            return None
        omitted = rule.omitted(node)
        edges = node.next_functions[: len(node.next_functions) - omitted]
        packed = nodes.packed_operands(node, rule, edges)
        packed = packed[: len(packed) - omitted]
        if len(edges) != len(packed):
            return None
        if rule.private:
            self._trusted.append(edges[0][0])
        cast = rule.autocast_operand
        if cast is not None and cast < len(edges) and nodes.is_cast_by_autocast(edges[cast][0]):
            packed[cast] = self._copied(self._source.biases.cast(edges[cast][0], self._source.first_node))
        operands = self._operands(node, edges, packed, rule, is_unwritten)
        extras = None if operands is None else self._extras(node, rule)
        if operands is None or extras is None:
            return None
        operands += extras
        try:
            options = rule.options(node)
        except (AttributeError, RuntimeError):
            return None
        if rule.has_several_outputs:
            return Step(lambda *given: rule.function(*given)[output], operands, options)
        if rule.saved is None:
            return Step(lambda *given: rule.function(given[: len(edges)], *given[len(edges) :]), operands, options)
        return Step(rule.function, operands, options)

    def _operands(
        self, node: Any, edges: Sequence[Edge], packed: Sequence[Any], rule: Rule, is_unwritten: bool
    ) -> list[Any] | None:
        """The operands of a node, which holds the `packed` contents for its edges; None if one is not available."""
        operands: list[Any] = []
        note = nodes.noted(node)
        notes = note if len(note) == len(edges) else (None,) * len(edges)
        are_unwritten = bool(note) or (is_unwritten and nodes.name_of(node) in VIEWS)
        for edge, content, noted_operand in zip(edges, packed, notes, strict=True):
            if isinstance(content, Cell) and not content.is_unwritten():
                return None
            if content is not None:
                operand = self._shared(content)
            elif isinstance(noted_operand, nodes.NUMBERS):
                operand = noted_operand
            else:
                operand = self._operand_at_or_small(edge, are_unwritten, noted_operand)
                if operand is None and rule.is_gather:
                    operand = self._stacked_weight(edge)
            if operand is None:
                return None
            operands.append(operand)
        # Small operands are copied last, once all other operands are found.
        for place, operand in enumerate(operands):
            if isinstance(operand, SmallOperand):
                operands[place] = self._copied(operand.copied() if operand.owner is self._source else None)
                if operands[place] is None:
                    return None
        return operands

    def _extras(self, node: Any, rule: Rule) -> list[Any] | None:
        """The operands of a node that have no edge; None if one is not available."""
        extras: list[Any] = []
        for content in () if rule.extras is None else nodes.packed_extras(node, rule.extras):
            is_ours = isinstance(content, Cell) and content.owner is self._source and content.is_unwritten()
            if not is_ours and not isinstance(content, Absent):
                return None
            extras.append(self._source.share(content) if isinstance(content, Cell) else content)
        return extras

    def is_written_by_graph(self, node: Any, storage: int, version: int) -> bool:
        """Whether `node` and the nodes before it made all in-place writes to a tensor, which is now at `version`.

        The tensor is the node's operand, written over, or a block's output, or a watched output. There must be as many
        writes as nodes: if one of the nodes had not written in place, the output would have another storage; if
        anything else had written, there would be more writes than nodes.
        """
        if wrote_over_operand(node, version):
            return True
        origin = origin_of(node, self._source)
        if origin is None or origin.source.storage.cdata != storage or origin.source.storage.expired():
            return False
        if version - origin.version != len(origin.writers):
            return False
        self._trusted += origin.writers
        if origin.block is None:
            self._trusted.append(origin.writers[-1].next_functions[0][0])
        else:
            self._edge_contents[origin.writers[-1].next_functions[0]] = origin.block
        return True

    def learn_operands(self, node: Any) -> None:
        """Stores the cells of a node's operands, if the node saves several operands and wrote over none."""
        rule = self._rules[nodes.name_of(node)]
        if rule.saved is None or len(rule.saved) < 2 or rule.saved[1] is None:
            return
        edges = node.next_functions
        packed = nodes.packed_operands(node, rule, edges)
        cells = [(edge, content) for edge, content in zip(edges, packed, strict=False) if isinstance(content, Cell)]
        for edge, cell in cells:
            # At version 0 the tensor has had no in-place write since creation.
            if cell.version == 0 and cell.is_unwritten():
                self._edge_contents[edge] = cell
        for (maker, _), cell in cells:
            if len(cells) > 1 and maker is not None and nodes.name_of(maker) in BY_RESULT:
                self._replace_result(maker, cell)

    def _replace_result(self, node: Any, cell: Cell) -> None:
        """Replaces a result that two nodes keep. In x * sigmoid(x) both nodes keep the sigmoid, and the product's node
        keeps x, from which the sigmoid can be recomputed."""
        own = nodes.result_cell(node)
        if own is None or own.depth or own.version or cell.version or not own.is_unwritten():
            return
        step = self.step_for(node, 0)
        if step is not None:
            self._source.replace_result(own, step)

    def _shared(self, source: Cell | Block | float | None) -> Operand | float | None:
        """A cell, a block's output or a number, as an operand; None for a cell of another context."""
        if source is None or isinstance(source, nodes.NUMBERS):
            return source
        if isinstance(source, Cell) and source.owner is not self._source:
            return None
        self.is_grounded = True
        return self._source.share(source)

    def _operand_at(self, edge: Edge, is_unwritten: bool = False) -> Operand | float | None:
        """The tensor at an edge as an operand, if the tensor is available and has had no in-place write since
        creation."""
        node, output = edge
        if node is None:
            return None
        source = self._edge_contents.get(edge)
        if source is not None:
            return self._shared(source)
        boundary = self._source.held_at(node, output)
        if boundary is not None:
            self.is_grounded = True
            return boundary
        block = own_block(node, self._source)
        if block is not None:
            return self._shared(block) if output == 0 and block.is_unwritten() else None
        name = nodes.name_of(node)
        saved_result = _saved_result(node, output)
        if saved_result is not None and saved_result.is_unwritten():
            return self._shared(saved_result)
        if name == nodes.LEAF:
            return self._copied(self._source.biases.copied(node.variable))
        # The strides of a clone are unknown, and a reader may depend on them.
        is_clone = name == "CloneBackward0"
        is_unwritten = is_unwritten or (nodes.is_watched(node, output) and not is_clone)
        if is_unwritten or name in VIEWS or node in self._trusted or self._is_written_output(node):
            return self.step_for(node, output, is_unwritten)
        return self.step_for(node, output) if self._temporaries and not is_clone else None

    def _is_written_output(self, node: Any) -> bool:
        """Whether the output is a block's or a watched one that only this node and the nodes before it wrote to."""
        origin = origin_of(node, self._source)
        output = None if origin is None else origin.source.output()
        if origin is None or output is None or output.grad_fn is not node:
            return False
        return self.is_written_by_graph(node, origin.source.storage.cdata, output._version)

    def _operand_at_or_small(self, edge: Edge, is_unwritten: bool, small: SmallOperand | None) -> Any:
        """The operand at an edge; if there is none, the noted small operand."""
        state = self._steps, self.is_grounded, self._most_copied
        operand = self._operand_at(edge, is_unwritten)
        if operand is None and small is not None:
            self._steps, self.is_grounded, self._most_copied = state
            return small
        return operand

    def _copied(self, copy: Tensor | None) -> Cell | None:
        """A copy as an operand, within the limit of copied bytes."""
        if copy is None or copy.nbytes > self._most_copied:
            return None
        self._most_copied -= copy.nbytes
        return self._source.pack(copy)

    def _stacked_weight(self, edge: Edge) -> Operand | None:
        """The stacked weight at an edge, whose rows the op gathered. The weight itself is read, without a copy."""
        node, _ = edge
        weight = node.variable if node is not None and nodes.name_of(node) == nodes.LEAF else None
        if not isinstance(weight, nn.Parameter) or not self._source.stacked.is_unchanged(weight):
            return None
        self.is_grounded = True
        return self._source.pack(weight)


def _saved_result(node: Any, output: int) -> Cell | None:
    """The cell of a node that saves this output."""
    name = nodes.name_of(node)
    if name in BY_RESULT or name in KEEPING_RESULT:
        return nodes.result_cell(node)
    if name in ATTENTIONS and output == 0:
        return nodes.result_cell(node, "output")
    return nodes.results_of_function(node).get(output) if isinstance(node, BackwardCFunction) else None

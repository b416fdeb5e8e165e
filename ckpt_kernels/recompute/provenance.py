"""How a tensor was made, read from the autograd graph that was really built.

Each node of the graph says by its name which op it is the gradient of, and holds what that op's gradient needs: often
the op's own operands. So a tensor that a cheap op made can be made again, to the last bit, from tensors that its node
keeps in any case. A `Trace` finds out how, or finds nothing: what is not in the tables of `rules` is not made again.

An operand that the node did not save is looked for behind the node's edge. An edge tells which op made the operand, but
not whether somebody wrote to the operand later where autograd does not see the write (under no_grad, through
`detach()`). So there has to be evidence that nobody did: an unchanged version counter.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from . import nodes
from .biases import Biases
from .cells import Absent, Cell, Operand
from .entries import Block, block_of
from .nodes import Edge
from .recipes import Step
from .rules import ATTENTIONS, BY_RESULT, RULES, VIEWS, Rule
from .small_operands import SmallOperand
from .stacked_weights import Stacked

# Past this many ops the tensor is kept, so that looks at the graph and recipes stay short.
MOST_STEPS = 12
# The name of the node that a leaf's gradient comes to.
LEAF = "torch::autograd::AccumulateGrad"
# At most so many writes in place to a block's output.
MOST_WRITES = 4


class Source(Protocol):
    """Packs the tensors that nodes save, and shares the cells; with the parameters that recipes may read."""

    biases: Biases
    stacked: Stacked

    def share(self, known: Cell | Block) -> Operand | None: ...

    def pack(self, tensor: Tensor) -> Cell: ...

    def exchange(self, own: Cell, step: Step) -> None: ...

    def held_at(self, node: Any, output: int) -> Operand | None: ...


class Trace:
    """One look at the graph behind a tensor.

    The `rules` are those of what may run again. Of small operands it copies no more than `most_copied` bytes. Where
    `temporaries` are trusted an operand that nothing keeps is made again by its node without evidence.
    """

    def __init__(self, source: Source, rules: Mapping[str, Rule], temporaries: bool, most_copied: int) -> None:
        self._source = source
        self._most_copied = most_copied
        self._temporaries = temporaries
        self._rules = rules
        self._steps = 0
        # Whether a value is made of anything that the graph keeps: copies of biases and small operands gain nothing.
        self.is_grounded = False
        # The known contents of edges; and nodes whose output nobody wrote to but the node that follows.
        self._known: dict[Edge, Cell | Block] = {}
        self._trusted: list[Any] = []

    def value(self, node: Any, output: int, is_as_made: bool = False) -> Step | None:
        """How to make a node's output, to which, if it `is_as_made`, nobody has written: nor then to what it views."""
        rule = self._rules.get(node.name())
        self._steps += 1
        if rule is None or (output != 0 and not rule.parts) or self._steps > MOST_STEPS:
            return None
        without = rule.without(node)
        edges = node.next_functions[: len(node.next_functions) - without]
        packed = nodes.packed_operands(node, rule, edges)
        packed = packed[: len(packed) - without]
        if len(edges) != len(packed):
            return None
        if rule.private:
            self._trusted.append(edges[0][0])
        if rule.casts is not None and rule.casts < len(edges) and nodes.is_cast_by_autocast(edges[rule.casts][0]):
            self._trusted.append(edges[rule.casts][0])
        operands: list[Any] = []
        note = nodes.noted(node)
        noted = note if len(note) == len(edges) else (None,) * len(edges)
        are_as_made = bool(note) or (is_as_made and node.name() in VIEWS)
        for edge, held, known in zip(edges, packed, noted, strict=True):
            if isinstance(held, Cell) and not held.is_unwritten():
                return None
            if held is not None:
                operand = self._shared(held)
            elif isinstance(known, nodes.NUMBERS):
                operand = known
            else:
                operand = self._behind_or_small(edge, are_as_made, known)
                if operand is None and rule.gathers:
                    operand = self._stacked(edge)
            if operand is None:
                return None
            operands.append(operand)
        # Copies last, when all else is found.
        for place, operand in enumerate(operands):
            if isinstance(operand, SmallOperand):
                operands[place] = self._copied_small(operand)
                if operands[place] is None:
                    return None
        for held in () if rule.beside is None else nodes.packed_beside(node, rule.beside):
            is_ours = isinstance(held, Cell) and held.owner is self._source and held.is_unwritten()
            if not is_ours and not isinstance(held, Absent):
                return None
            operands.append(self._source.share(held) if isinstance(held, Cell) else held)
        try:
            options = rule.options(node)
        except (AttributeError, RuntimeError):
            return None
        if rule.parts:
            return Step(lambda *given: rule.function(*given)[output], operands, options)
        if rule.saved is None:
            return Step(lambda *given: rule.function(given[: len(edges)], *given[len(edges) :]), operands, options)
        return Step(rule.function, operands, options)

    def is_written_by_graph(self, node: Any, storage: int, version: int) -> bool:
        """Whether `node` and the nodes before it are the only ones that wrote to a tensor, now at this version.

        The tensor is the node's operand, written over, or a block's output.

        As many writes as nodes: had one of these not been in place, the memory would be another's; had there been
        another write, there would be more writes than nodes.
        """
        if _wrote_over_operand(node, version):
            return True
        nodes, block = self._nodes_to_block(node)
        if block is None or block.entry.storage.cdata != storage or block.entry.storage.expired():
            return False
        if version - block.entry.version != len(nodes):
            return False
        self._trusted += nodes
        self._known[nodes[-1].next_functions[0]] = block
        return True

    def _nodes_to_block(self, node: Any) -> tuple[list[Any], Block | None]:
        """The nodes on the way to a block's, each reached by the first operand of the one before."""
        nodes: list[Any] = []
        output = 0
        while node is not None and len(nodes) <= MOST_WRITES:
            block = self._block(node)
            if block is not None:
                return nodes, block if nodes and output == 0 else None
            if output != 0 or node.name() not in RULES:
                break
            nodes.append(node)
            node, output = node.next_functions[0]
        return nodes, None

    def _block(self, node: Any) -> Block | None:
        block = block_of(node)
        return block if block is not None and block.owner is self._source else None

    def learn(self, node: Any) -> None:
        """Learns the contents of a node's edges, where the node saves several operands and wrote over none."""
        rule = self._rules[node.name()]
        if rule.saved is None or len(rule.saved) < 2 or rule.saved[1] is None:
            return
        edges = node.next_functions
        packed = nodes.packed_operands(node, rule, edges)
        cells = [(edge, held) for edge, held in zip(edges, packed, strict=False) if isinstance(held, Cell)]
        for edge, cell in cells:
            # At version 0 nobody has written to the tensor since its node made it.
            if cell.version == 0 and cell.is_unwritten():
                self._known[edge] = cell
        for (maker, _), cell in cells:
            if len(cells) > 1 and maker is not None and maker.name() in BY_RESULT:
                self._exchange_result(maker, cell)

    def _exchange_result(self, node: Any, cell: Cell) -> None:
        """In x * sigmoid(x) both nodes keep the sigmoid, and the product's node keeps x, which gives the sigmoid."""
        own = nodes.result_cell(node)
        if own is None or own.depth or own.version or cell.version or not own.is_unwritten():
            return
        step = self.value(node, 0)
        if step is not None:
            self._source.exchange(own, step)

    def _shared(self, held: Cell | Block | float | None) -> Operand | float | None:
        if held is None or isinstance(held, nodes.NUMBERS):
            return held
        if isinstance(held, Cell) and held.owner is not self._source:
            return None
        self.is_grounded = True
        return self._source.share(held)

    def _behind(self, edge: Edge, is_as_made: bool = False) -> Operand | float | None:
        """The tensor at an edge, if there is a way to get the tensor, and nobody wrote to it since its node made it."""
        node, output = edge
        if node is None:
            return None
        known = self._known.get(edge)
        if known is not None:
            return self._shared(known)
        held = self._source.held_at(node, output)
        if held is not None:
            self.is_grounded = True
            return held
        block = self._block(node)
        if block is not None:
            return self._shared(block) if output == 0 and block.is_unwritten() else None
        name = node.name()
        own = _result_kept(node, output)
        if own is not None and own.is_unwritten():
            return self._shared(own)
        if name == LEAF:
            return self._copied(node.variable)
        # The strides of a clone are not known, and a reader may depend on them.
        is_clone = name == "CloneBackward0"
        is_as_made = is_as_made or (nodes.is_watched(node, output) and not is_clone)
        if is_as_made or name in VIEWS or node in self._trusted or self._is_written_output(node):
            return self.value(node, output, is_as_made)
        return self.value(node, output) if self._temporaries and not is_clone else None

    def _is_written_output(self, node: Any) -> bool:
        """Whether the node's output is a block's output that only this node and those before it wrote to."""
        block = self._nodes_to_block(node)[1]
        output = None if block is None else block.entry.output()
        if block is None or output is None or output.grad_fn is not node:
            return False
        return self.is_written_by_graph(node, block.entry.storage.cdata, output._version)

    def _behind_or_small(self, edge: Edge, is_as_made: bool, small: SmallOperand | None) -> Any:
        """What `_behind` finds, and else the small operand."""
        before = self._steps, self.is_grounded
        found = self._behind(edge, is_as_made)
        if found is None and small is not None:
            self._steps, self.is_grounded = before
            return small
        return found

    def _copied_small(self, known: SmallOperand) -> Operand | None:
        copy = known.copied() if known.owner is self._source else None
        if copy is None or copy.nbytes > self._most_copied:
            return None
        self._most_copied -= copy.nbytes
        return self._source.pack(copy)

    def _copied(self, leaf: Tensor) -> Operand | None:
        """A copy of a bias, which is small beside the rows, and which no optimizer and no sharding changes."""
        if not isinstance(leaf, nn.Parameter) or leaf.dim() > 1 or type(leaf.data) is not Tensor:
            return None
        if not self._source.biases.is_as_used(leaf):
            return None
        return self._source.pack(leaf.detach().clone())

    def _stacked(self, edge: Edge) -> Operand | None:
        """A weight of which some are gathered, such as those of experts: read itself, and not copied."""
        node, _ = edge
        weight = node.variable if node is not None and node.name() == LEAF else None
        if not isinstance(weight, nn.Parameter) or not self._source.stacked.is_as_used(weight):
            return None
        self.is_grounded = True
        return self._source.pack(weight)


def _result_kept(node: Any, output: int) -> Cell | None:
    """The cell of a node that saves this output of its own."""
    name = node.name()
    if name in BY_RESULT:
        return nodes.result_cell(node)
    if name in ATTENTIONS and output == 0:
        own = nodes.packed(node, "output")
        return own if isinstance(own, Cell) else None
    return nodes.results_of_function(node).get(output) if isinstance(node, BackwardCFunction) else None


def _wrote_over_operand(node: Any, version: int) -> bool:
    """Whether a node wrote its output, now at this version, over its operand, and nobody else wrote to that.

    Where a node writes over what its gradient needs torch saves a clone of that, to which the node has no edge.
    """
    rule = RULES.get(node.name())
    if version != 1 or rule is None or rule.saved != ("self",):
        return False
    held = nodes.packed(node, "self")
    return isinstance(held, Cell) and held.is_clone and node.next_functions[0][0].name() != "CloneBackward0"

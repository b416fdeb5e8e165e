"""The options and tables of one context, from which a `Discarder` decides what is kept."""

import contextlib
from collections.abc import Iterator

from torch import nn

from ..levels import discards_outputs, runs_layers_again
from .announcements import Announced, may_be_sharded
from .biases import Biases
from .entries import Entries
from .hooks import top_hooks
from .layer_boundaries import LayerBoundaries
from .nodes import next_number
from .rules import RULES, RULES_AND_PRODUCTS, RULES_IN_LAYERS
from .small_operands import SmallOperands
from .stacked_weights import StackedWeights, stacked_weights_of

# The ops that may run again, at the levels where products may; at other levels they are `RULES`.
_RULES_AT = {"all": RULES_AND_PRODUCTS, "layer": RULES_IN_LAYERS}
# The same for every context without a module; and for every closed context.
_ANY_BIAS, _NO_STACKED_WEIGHTS = Biases(None), StackedWeights(None)
_NO_BIAS = Biases(nn.Module())


class State:
    """The state of one active context."""

    # csrc/thin (cells.cpp, records.cpp) reads the public slots.
    __slots__ = (
        "__weakref__",
        "all_entries",
        "announced",
        "biases",
        "boundaries",
        "first_node",
        "is_apart",
        "is_closed",
        "is_in_layer",
        "is_paused",
        "level",
        "may_be_sharded",
        "outer",
        "rules",
        "small_operands",
        "stacked",
        "temporaries",
    )

    def __init__(self, module: nn.Module | None, products: bool, temporaries: bool) -> None:
        self.temporaries = temporaries
        self.all_entries = Entries()
        self.biases = _ANY_BIAS if module is None else Biases(module)
        self.stacked = _NO_STACKED_WEIGHTS if module is None else stacked_weights_of(module)
        self.may_be_sharded = may_be_sharded()
        self.outer = top_hooks()
        # The number of the first autograd node that the context may have made.
        self.first_node = next_number()
        self.is_closed = False
        # The op whose forward pass has run, and whose output `record` has not been given yet.
        self.announced: Announced | None = None
        # Whether a tensor is being packed for a recipe, and so does not count as saved by the announced op.
        self.is_apart = False
        self.boundaries = LayerBoundaries()
        self.small_operands = SmallOperands()
        self._set_level("all" if products else "output")

    @contextlib.contextmanager
    def at(self, level: str) -> Iterator[None]:
        """Discards outputs at another level of `convert` within the context, whatever the level around.

        At "block", outputs made within are kept.
        """
        before = self.level
        self._set_level(level)
        try:
            yield
        finally:
            self._set_level(before)

    def _set_level(self, level: str) -> None:
        self.level = level
        # Whether only outputs recorded earlier are discarded.
        self.is_paused = not discards_outputs(level)
        # Within a layer matrix products run again, whatever reads them.
        self.is_in_layer = runs_layers_again(level)
        self.rules = _RULES_AT.get(level, RULES)

    def close(self) -> None:
        """Closes the context: recipes live only through their claims, and tensors saved from now on are kept."""
        self.is_closed = True
        # Nodes refer to this context longer than they keep tensors, and the outer hooks may hold tensors.
        self.outer = None
        self.biases, self.stacked = _NO_BIAS, _NO_STACKED_WEIGHTS
        self.all_entries.clear()
        self.boundaries.clear()
        if self.small_operands:
            self.small_operands.clear()
        self.announced = None

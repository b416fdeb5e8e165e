"""What `convert` and `plan` take: a module that is not compiled yet."""

import sys
from typing import Any

from torch import nn


def check_model(model: Any, first: str) -> None:
    """Raises TypeError for what is no module, and for what torch.compile has made, which is to come after `first`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; expected a torch.nn.Module")
    # Where torch.compile is not imported, which takes seconds, nothing can be compiled.
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and isinstance(model, dynamo.OptimizedModule):
        raise TypeError(f"model is compiled already; expected one that is not: {first} first, then torch.compile")

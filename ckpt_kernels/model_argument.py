"""Checks the `model` argument of `convert` and `plan`."""

import sys
from typing import Any

import torch
from torch import nn


def check_model(model: Any, first: str) -> None:
    """Raises TypeError if `model` is no module, or is already compiled or scripted: both must come after `first`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; expected a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"model is scripted already; expected one that is not: {first} first")
    # If torch.compile is not imported, which takes seconds, no model can be compiled.
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and isinstance(model, dynamo.OptimizedModule):
        raise TypeError(f"model is compiled already; expected one that is not: {first} first, then torch.compile")

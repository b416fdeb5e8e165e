"""Parameters that a layer's own forward writes to, such as normalized weights, while the layer runs again.

No copy of a parameter is kept, so the repeated call starts from what the first call left. The write must leave such a
value as it is, but for rounding. This is checked, and the value is put back.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..call_state import as_autograd_reads

# The largest difference, in units of the dtype's rounding, beside the largest element.
_ROUNDINGS = 16


class OtherValue(RuntimeError):
    """The error for a parameter that has another value when the layer runs again."""


class WrittenParameter:
    """A parameter that the first call has written to.

    Args:
        parameter: the parameter.
        first: the version before the first call.
        now: the version after that call, which is the present one.
    """

    def __init__(self, parameter: nn.Parameter, first: int, now: int) -> None:
        self.tensor = parameter
        self._first, self._now = first, now

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """A context that runs the call again. Afterwards the value and the version are as before.

        Raises `OtherValue` if the call leaves another value.
        """
        before = self.tensor.detach().clone()
        try:
            with torch.autograd._unsafe_preserve_version_counter(self.tensor):
                yield
        finally:
            after = self.tensor.detach().clone()
            self.tensor.data.copy_(before)
            if not _is_close(before, after):
                raise OtherValue(
                    f"a parameter of a checkpointed layer, {before.dtype} {tuple(before.shape)}, is written to by the "
                    "layer, and has another value when the layer runs again; expected a write that changes nothing the "
                    "second time, or a layer that is not checkpointed"
                )

    def saved(self, value: Tensor) -> tuple[Tensor, int | None]:
        """See `as_autograd_reads`."""
        return as_autograd_reads(value, self._first, self._now)


def _is_close(before: Tensor, after: Tensor) -> bool:
    largest = before.abs().max() if before.numel() else 0.0
    tolerance = _ROUNDINGS * torch.finfo(before.dtype).eps * float(largest)
    return torch.allclose(before, after, rtol=0.0, atol=tolerance)

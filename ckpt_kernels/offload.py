"""What layers keep waits in host memory, and comes back one layer ahead of the backward pass.

    ckpt_kernels.convert(model, recompute="output")
    ckpt_kernels.offload.offload(model, "model.layers.*")

In forward, each tensor that a layer keeps is copied to pinned memory on a stream of its own, while the next layers
compute; its memory on the device is free once the copy is through. In backward, when a layer asks for the first of its
tensors, those of the layer after it go, and those of the layer before it start to come back on that stream. So at most
two layers' tensors are there, and none after the pass; the copies hide behind the computation as far as the bus is fast
enough.

It works by torch's saved-tensor hooks around a layer's forward. What a converted layer lets go of is not kept, and so
is not copied either.
"""

import fnmatch
import functools
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .convert.loads import named_modules, tensors_of
from .convert.rules.rule import Forward
from .convert.swap import may_be_swapped, surround
from .host_memory import from_host, to_host
from .recompute import discarding, run_at
from .recompute.active import top_hooks
from .recompute.cells import Unwritten, version_watch
from .runs.arguments import version_checked

# Smaller ones stay: their copies cost more than their memory is worth.
LEAST = 2**20
# The memory that a tensor is a view of is copied whole, for all views of it, but where it is more than so many times as
# large: such a one belongs to somebody else.
MOST_BESIDE = 4


def offload(model: nn.Module, layers: str, *, least: int = LEAST) -> list[str]:
    """Has layers keep their tensors in host memory from the forward to the backward pass. `revert(model)` undoes it.

    Results and gradients are the same to the last bit. Parameters and buffers stay where they are, and so do tensors
    that are no plain dense ones. On a CPU it is simulated, for tests: tensors are copied to memory that torch's
    allocator does not count, so that what is measured of a step is what a device would have of it.

    A tensor that is written to in place between the passes is an error in backward, as it is in torch; of those that
    were copied too, because the copy may not be through when they are written to.

    Args:
        model: a module, converted first if it is to be converted at all.
        layers: the name of the layers, with * and ?, such as "model.layers.*"; of those within each
            other the outermost.
        least: tensors of fewer bytes stay on the device.

    Returns:
        The names of the layers.

    Kept for backward:
        On the device what is smaller; in host memory the rest.

    Raises:
        ValueError: no module has such a name, or one's forward cannot be surrounded.
        TypeError: `model` is no module, `layers` no name, or `least` no number of bytes.

    Example:
        >>> model = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU()) for _ in "ab"))
        >>> x = torch.randn(256, 64, requires_grad=True)
        >>> import warnings; warnings.simplefilter("ignore")
        >>> offload(model, "*", least=1024)
        ['0', '1']
        >>> saved_bytes(model, x)
        0
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; expected a torch.nn.Module")
    if not isinstance(layers, str):
        raise TypeError(f"layers is {type(layers).__name__}; expected a name of modules, with * and ?")
    if not isinstance(least, int) or least < 0:
        raise TypeError(f"least is {least!r}; expected a number of bytes")
    names = dict(named_modules(model))
    chosen = [name for name in fnmatch.filter(names, layers) if name]
    chosen = [name for name in chosen if not any(name.startswith(f"{above}.") for above in chosen)]
    if not chosen:
        raise ValueError(f"layers is {layers!r}; expected a name, with * and ?, that fits a module")
    if unfit := [name for name in chosen if not may_be_swapped(names[name])]:
        raise ValueError(
            f"layers is {layers!r}; expected layers whose forward is a plain method, which {unfit[0]}'s is not"
        )
    warn_if_simulated(model)
    around = Offloading(least)
    for name in chosen:
        surround(names[name], around)
    return chosen


def warn_if_simulated(model: nn.Module) -> None:
    """Says so where the model is on the CPU."""
    if all(tensor.device.type == "cpu" for tensor in tensors_of(model)):
        warnings.warn("the model is on the CPU, where offload is simulated and saves no memory", stacklevel=3)


class Offloading:
    """What the forward of the layers of one model runs in.

    Args:
        least: tensors of fewer bytes stay.
    """

    def __init__(self, least: int) -> None:
        self._least = least
        self._last: weakref.ref[Visit] | None = None
        self._turns = Turns()

    def __deepcopy__(self, memo: dict) -> "Offloading":
        return Offloading(self._least)

    def __reduce__(self) -> tuple:
        return Offloading, (self._least,)

    def __call__(self, forward: Forward, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        hooks: Any = torch._C._autograd
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not hooks._saved_tensors_hooks_is_enabled():
            return forward(module, *args, **kwargs)
        before = _there(self._last)
        visit = Visit(
            self._turns, self._least, {tensor.untyped_storage()._cdata for tensor in tensors_of(module, buffers=True)}
        )
        if before is not None:
            visit.before = weakref.ref(before)
        self._last = weakref.ref(visit)
        around = discarding()
        with torch.autograd.graph.saved_tensors_hooks(visit.pack, _unpack):
            if around is None:
                return forward(module, *args, **kwargs)
            # It does not see what is saved here: another one lets go of outputs, at its level.
            return run_at(around.level, functools.partial(forward, module), module, args, kwargs)


def _there(visit: "weakref.ref[Visit] | None") -> "Visit | None":
    return None if visit is None else visit()


class Turns:
    """Whose tensors are back: in a backward pass those of the layer whose turn it is, and of the next one.

    A pass that raised leaves these two where they are, until the next pass or until the graph goes.
    """

    def __init__(self) -> None:
        self._back: list[weakref.ref[Visit]] = []
        self._pass: int | None = None

    def begin(self, visit: "Visit") -> None:
        """When a layer first asks for a tensor in this pass: what was back for others goes, then its own come, if they
        have not yet, and those of the layer before it."""
        now = torch._C._current_graph_task_id()
        # Outside of a backward pass somebody looks at the graph: there are no turns.
        if now in (-1, visit.turn):
            return
        visit.turn = now
        wanted = [one for one in (visit, _there(visit.before)) if one is not None]
        self._leave(wanted)
        for one in wanted:
            one.fetch()
        if self._pass != now:
            self._pass = now
            torch.autograd.Variable._execution_engine.queue_callback(self._end)

    def _end(self) -> None:
        self._leave([])

    def _leave(self, wanted: "list[Visit]") -> None:
        """Drops all that is back but what is wanted."""
        for one in filter(None, map(_there, self._back)):
            if one not in wanted:
                one.drop()
        self._back = [weakref.ref(one) for one in wanted]


class Visit:
    """One call of one layer: what it keeps, and the call of the layer before it.

    The autograd graph holds the packets, and these hold the visit: all is gone when the graph is.

    Attributes:
        before: the call before it, while its graph is there.
        turn: the number of the last backward pass in which it had its turn.
    """

    def __init__(self, turns: Turns, least: int, stay: set[int]) -> None:
        self.turns = turns
        self._least = least
        self._stay = stay
        # Only the innermost hooks run in torch: what stays is handed on to those around.
        self._outer = top_hooks()
        self._packets: list[weakref.ref[Packet]] = []
        self._known: dict[tuple, tuple[StorageWeakRef, weakref.ref[Packet]]] = {}
        self.before: weakref.ref[Visit] | None = None
        self.turn: int | None = None

    def pack(self, tensor: Tensor) -> Callable[[], Tensor]:
        """How the graph gets the tensor back. torch itself looks for no writes to tensors that go through hooks."""
        storage = tensor.untyped_storage() if _is_plain(tensor) else None
        if storage is None or tensor.nbytes < self._least or storage._cdata in self._stay:
            if self._outer is None:
                return version_checked(tensor, "a tensor that a layer keeps")
            return functools.partial(self._outer[1], self._outer[0](tensor))
        watch = version_watch(tensor)
        assert watch is not None, "a plain tensor has a version counter"
        version = tensor._version
        tensor = tensor.detach()
        if storage.nbytes() > MOST_BESIDE * tensor.nbytes:
            tensor = tensor.clone()
            storage = tensor.untyped_storage()
        offset = int(tensor.storage_offset())
        view = View(self._packet(storage, version), tensor.dtype, offset, tensor.shape, tensor.stride())
        return Unwritten(view, watch, version).get

    def _packet(self, storage: torch.UntypedStorage, version: int) -> "Packet":
        """The one of this memory, of which several tensors may be views."""
        held, known = self._known.get((storage._cdata, version), (None, None))
        packet = known() if held is not None and known is not None and not held.expired() else None
        if packet is None:
            packet = Packet(self, to_host(_bytes_of(storage)), storage.device)
            self._known[storage._cdata, version] = StorageWeakRef(storage), weakref.ref(packet)
            self._packets.append(weakref.ref(packet))
        return packet

    def fetch(self) -> None:
        """Starts to bring back what is not there."""
        for packet in filter(None, (ref() for ref in self._packets)):
            if packet.back is None:
                packet.back = from_host(packet.host, packet.device)

    def drop(self) -> None:
        """Lets go of what is back; it is still in host memory, for another backward pass."""
        for packet in filter(None, (ref() for ref in self._packets)):
            packet.back = None


@dataclass(eq=False)
class Packet:
    """A memory that is kept.

    Attributes:
        visit: the call that keeps it.
        host: its bytes, in host memory.
        device: where it was.
        back: the bytes that came back, and the event after which it is whole, while it is wanted.
    """

    visit: Visit
    host: Tensor
    device: torch.device
    back: "tuple[Tensor, torch.cuda.Event | None] | None" = field(default=None)

    def get(self) -> Tensor:
        self.visit.turns.begin(self.visit)
        # Of a layer whose turn is over, which is asked out of order, it is not.
        found, event = self.back or from_host(self.host, self.device)
        if event is not None:
            now = torch.cuda.current_stream(self.device)
            now.wait_event(event)
            found.record_stream(now)
        return found


@dataclass(frozen=True)
class View:
    """A tensor, as a view of a memory that is kept."""

    packet: Packet
    dtype: torch.dtype
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    depth: int = 0

    def get(self) -> Tensor:
        found = self.packet.get()
        empty = torch.empty(0, dtype=self.dtype, device=found.device)
        return empty.set_(found.untyped_storage(), self.offset, self.shape, self.stride)


def _unpack(get: Callable[[], Tensor]) -> Tensor:
    return get()


def _is_plain(tensor: Tensor) -> bool:
    is_dense = type(tensor) is Tensor and tensor.layout == torch.strided and tensor.device.type in ("cpu", "cuda")
    return is_dense and not tensor.is_conj() and not tensor.is_neg()


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)

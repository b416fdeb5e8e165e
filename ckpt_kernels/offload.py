"""Offloads the tensors that layers keep to host memory, and prefetches them one layer ahead of the backward pass.

    ckpt_kernels.convert(model, recompute="output")
    ckpt_kernels.offload.offload(model, "model.layers.*")

In the forward pass, each tensor that a layer keeps is copied to pinned memory on a separate stream while the next
layers compute. The tensor's memory on the device is free once the copy is done. In the backward pass, when a layer
first asks for a tensor, the tensors of the layer after it are dropped, and those of the layer before it are prefetched
on that stream. So at most two layers' tensors are on the device, and none after the pass. The copies overlap with the
computation as far as the bus is fast enough.

The mechanism is saved-tensor hooks around a layer's forward pass. Tensors that a converted layer discards are not kept,
and so are not copied either.
"""

import functools
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parameter import is_lazy

from .arguments import size
from .convert.code.memoization import shared_results
from .convert.module_tree import named_modules, names_fitting, tensors_of
from .convert.rules.rule import Forward
from .convert.selection import inspected_modules
from .convert.swap import add_forward_context, may_be_swapped
from .host_memory import from_host, to_host
from .recompute import discarding, run_at
from .recompute.cells import Unwritten, version_watch
from .recompute.hooks import top_hooks
from .recompute.transforms import allow_transforms
from .runs.arguments import version_checked
from .saved_tensor_hooks import steps_aside

# Smaller tensors stay on the device: their copies cost more than their memory is worth.
LEAST = 2**20
# The storage of a tensor is copied whole, for all views of the storage. If the storage is larger than the tensor by
# more than this ratio, only the tensor is copied: the rest belongs to something else.
MOST_STORAGE_RATIO = 4
SIMULATED = "the model is on the CPU, where offload is simulated and saves no memory"


def offload(model: nn.Module, layers: str, *, least: int = LEAST) -> list[str]:
    """Keeps the tensors of layers in host memory from the forward to the backward pass. `revert(model)` undoes this.

    Results and gradients are bitwise the same. Parameters and buffers stay on the device, and so do tensors that are
    not plain and dense. On a CPU offloading is simulated, for tests: tensors are copied to memory that torch's
    allocator does not count, so that a measured step shows the memory of a device.

    An in-place write to a kept tensor between the passes is an error in the backward pass, as in torch. This includes
    tensors that were copied, because the copy may not be done at the time of the write.

    Args:
        model: a module. Convert the model before this call, if at all.
        layers: a name pattern with * and ?, such as "model.layers.*". Of nested matches the outermost is taken.
        least: tensors of fewer bytes stay on the device.

    Returns:
        The names of the layers.

    Kept for backward:
        Tensors of fewer than `least` bytes on the device; the rest in host memory.

    Raises:
        ValueError: no module has such a name, the forward of a layer is no plain method, code of the model compares the
            classes of layers, or `least` is negative.
        TypeError: `model` is no module, `layers` no name, or `least` no whole number.

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
    least = size(least, "least")
    names = dict(named_modules(model))
    chosen = [name for name in names_fitting(names, layers) if name]
    chosen = [name for name in chosen if not any(name.startswith(f"{above}.") for above in chosen)]
    if not chosen:
        raise ValueError(f"layers is {layers!r}; expected a name, with * and ?, that fits a module")
    with shared_results():
        inspected = inspected_modules(model)
        unfit = [name for name in chosen if names[name] in inspected or not may_be_swapped(names[name])]
    if unfit:
        raise ValueError(
            f"layers is {layers!r}; expected layers whose forward is a plain method and whose class no code of the "
            f"model compares, unlike {unfit[0]}"
        )
    warn_if_simulated(model)
    around = Offloading(least)
    for name in chosen:
        add_forward_context(names[name], around)
    return chosen


def warn_if_simulated(model: nn.Module) -> None:
    """Warns that offloading saves no memory, if the model is on the CPU."""
    if all(tensor.device.type == "cpu" for tensor in tensors_of(model)):
        warnings.warn(SIMULATED, stacklevel=3)


class Offloading:
    """Wraps the forward passes of the layers of one model. Tensors of fewer than `least` bytes stay on the device."""

    def __init__(self, least: int) -> None:
        self._least = least
        self._last: weakref.ref[LayerCall] | None = None
        self._schedule = PrefetchSchedule()

    def __deepcopy__(self, memo: dict) -> "Offloading":
        return Offloading(self._least)

    def __reduce__(self) -> tuple:
        return Offloading, (self._least,)

    def __call__(self, forward: Forward, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        hooks: Any = torch._C._autograd
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not hooks._saved_tensors_hooks_is_enabled():
            return forward(module, *args, **kwargs)
        before = _alive(self._last)
        tensors = tensors_of(module, buffers=True)
        own_storages = {tensor.untyped_storage()._cdata for tensor in tensors if not is_lazy(tensor)}
        call = LayerCall(self._schedule, self._least, own_storages)
        if before is not None:
            call.before = weakref.ref(before)
        self._last = weakref.ref(call)
        around = discarding()
        allow_transforms()
        with torch.autograd.graph.saved_tensors_hooks(call.pack, _unpack):
            if around is None:
                return forward(module, *args, **kwargs)
            # The outer context does not see tensors saved here: an inner one discards outputs, at the same level.
            return run_at(around.level, functools.partial(forward, module), module, args, kwargs)


def _alive(call: "weakref.ref[LayerCall] | None") -> "LayerCall | None":
    return None if call is None else call()


class PrefetchSchedule:
    """Decides which layers' tensors are on the device in a backward pass: the current and the next layer's.

    After a backward pass that raised, these tensors stay until the next pass or until the graph is freed.
    """

    def __init__(self) -> None:
        self._prefetched: list[weakref.ref[LayerCall]] = []
        self._current_pass: int | None = None

    def begin(self, call: "LayerCall") -> None:
        """Starts a layer's turn, when the layer first asks for a tensor in this backward pass.

        Only the tensors of this layer and of the layer before stay on the device, and are fetched if missing.
        """
        graph_task = torch._C._current_graph_task_id()
        # Outside of a backward pass a caller inspects the graph, and nothing is prefetched.
        if graph_task in (-1, call.last_pass):
            return
        call.last_pass = graph_task
        wanted = [layer_call for layer_call in (call, _alive(call.before)) if layer_call is not None]
        self._keep_only(wanted)
        for layer_call in wanted:
            layer_call.fetch()
        if self._current_pass != graph_task:
            self._current_pass = graph_task
            torch.autograd.Variable._execution_engine.queue_callback(self._end)

    def _end(self) -> None:
        self._keep_only([])

    def _keep_only(self, wanted: "list[LayerCall]") -> None:
        """Drops the prefetched tensors of all other layers."""
        for layer_call in filter(None, map(_alive, self._prefetched)):
            if layer_call not in wanted:
                layer_call.drop()
        self._prefetched = [weakref.ref(layer_call) for layer_call in wanted]


class LayerCall:
    """One call of one layer: the tensors that it keeps, and the call of the layer before it.

    The autograd graph holds the offloaded storages, and they hold the call. So all are freed with the graph.

    Attributes:
        before: the call of the layer before, while the graph of that call exists.
        last_pass: the number of the last backward pass in which this layer had a turn.
    """

    def __init__(self, schedule: PrefetchSchedule, least: int, stay: set[int]) -> None:
        self.schedule = schedule
        self._least = least
        self._stay = stay
        # torch runs only the innermost hooks, so tensors that stay are passed on to the outer ones.
        self._outer = top_hooks()
        self._storages: list[weakref.ref[OffloadedStorage]] = []
        self._by_storage: dict[tuple, tuple[StorageWeakRef, weakref.ref[OffloadedStorage]]] = {}
        self.before: weakref.ref[LayerCall] | None = None
        self.last_pass: int | None = None

    @steps_aside
    def pack(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Packs a tensor as a function that returns the tensor. torch does not check for in-place writes under
        hooks."""
        storage = tensor.untyped_storage() if _is_plain(tensor) else None
        if storage is None or tensor.nbytes < self._least or storage._cdata in self._stay:
            return self._kept(tensor)
        watch = version_watch(tensor)
        assert watch is not None, "a plain tensor has a version counter"
        moved = tensor.detach()
        if storage.nbytes() > MOST_STORAGE_RATIO * moved.nbytes:
            moved = moved.clone()
            storage = moved.untyped_storage()
            # The copy of a view with gaps has other strides, by which a backward pass may read the tensor.
            if moved.stride() != tensor.stride():
                return self._kept(tensor)
        version = tensor._version
        offset = int(moved.storage_offset())
        view = OffloadedView(self._stored(storage, version), moved.dtype, offset, moved.shape, moved.stride())
        return Unwritten(view, watch, version).get

    def _kept(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Packs a tensor that stays on the device."""
        if self._outer is None:
            # Detached, because a parameter may be given other data before the backward pass.
            return version_checked(tensor.detach(), "a tensor that a layer keeps")
        return functools.partial(self._outer[1], self._outer[0](tensor))

    def _stored(self, storage: torch.UntypedStorage, version: int) -> "OffloadedStorage":
        """The offloaded storage; several tensors may be views of one."""
        key = storage._cdata, version
        references = self._by_storage.get(key)
        # The weak reference to the storage keeps its address from being given to another storage.
        stored = None if references is None else references[1]()
        if stored is None:
            stored = OffloadedStorage(self, to_host(_bytes_of(storage)), storage.device)
            self._by_storage[key] = StorageWeakRef(storage), weakref.ref(stored)
            self._storages.append(weakref.ref(stored))
        return stored

    def fetch(self) -> None:
        """Starts the copies to the device of all storages that are not there."""
        for stored in filter(None, (ref() for ref in self._storages)):
            if stored.on_device is None:
                stored.on_device = from_host(stored.host, stored.device)

    def drop(self) -> None:
        """Frees the copies on the device. The copies in host memory stay, for another backward pass."""
        for stored in filter(None, (ref() for ref in self._storages)):
            stored.on_device = None


@dataclass(eq=False)
class OffloadedStorage:
    """A storage that is kept in host memory.

    Attributes:
        call: the layer call that keeps the storage.
        host: the bytes, in host memory.
        device: the original device.
        on_device: the prefetched bytes and the event after which they are complete, while they are needed.
    """

    call: LayerCall
    host: Tensor
    device: torch.device
    on_device: "tuple[Tensor, torch.cuda.Event | None] | None" = field(default=None)

    def get(self) -> Tensor:
        self.call.schedule.begin(self.call)
        # A layer that asks out of order, after its turn, has no prefetched bytes.
        data, event = self.on_device or from_host(self.host, self.device)
        if event is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(event)
            data.record_stream(stream)
        return data


@dataclass(frozen=True)
class OffloadedView:
    """A tensor, as a view of an offloaded storage."""

    stored: OffloadedStorage
    dtype: torch.dtype
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    depth: int = 0

    def get(self) -> Tensor:
        data = self.stored.get()
        empty = torch.empty(0, dtype=self.dtype, device=data.device)
        return empty.set_(data.untyped_storage(), self.offset, self.shape, self.stride)


def _unpack(get: Callable[[], Tensor]) -> Tensor:
    return get()


def _is_plain(tensor: Tensor) -> bool:
    is_dense = type(tensor) is Tensor and tensor.layout == torch.strided and tensor.device.type in ("cpu", "cuda")
    # Tangents may be zero tensors, which have no memory. Scales of quantized tensors are beside their memory.
    is_other = tensor.is_conj() or tensor.is_neg() or tensor._is_zerotensor() or tensor.is_quantized
    return is_dense and not is_other


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)

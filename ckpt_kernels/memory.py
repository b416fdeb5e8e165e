"""What a call keeps for its backward pass: in all, by module, and with blocks' outputs let go of."""

import contextlib
import itertools
import json
import pathlib
import random
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import memory_table
from .copies import copied, copy_of
from .freed_memory import keep_freed_memory as keep_freed_memory
from .recompute import discard_outputs
from .target import arguments_of, tensors_in


def saved_bytes(fn: Callable[..., Any], *args: Any, parameters_of: nn.Module | None = None, **kwargs: Any) -> int:
    """Bytes of the distinct storages that `fn(*args, **kwargs)` keeps for backward.

    Each storage counts once and whole, however many views of it are kept. Not counted: the storages of parameters (any
    `nn.Parameter` that is kept, or a view of one), and of all parameters and buffers of the module `parameters_of`.
    Inputs that are kept do count. The call is made once, with gradients as they are set; what the graph of its result
    holds counts, and the result is dropped. A `discard_outputs` around this call has no say in it; one within `fn` has.

    Args:
        fn: a function or a module.
        args, kwargs: what `fn` is called with.
        parameters_of: the module whose parameters and buffers do not count; by default `fn`, if that is a module.

    Returns:
        The number of bytes, as an int.

    Example:
        >>> x = torch.randn(8, 64, requires_grad=True)
        >>> saved_bytes(torch.relu, x) == x.nbytes  # relu keeps its output
        True
    """
    return sum(tensor.counted for tensor in saved_tensors(fn, *args, parameters_of=parameters_of, **kwargs))


def saved_bytes_beside_output(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """`saved_bytes` but for the first tensor of the result, which whatever reads that keeps anyway.

    So an activation that saves its output (relu, tanh) is not charged with what the next layer saves too.

    Args:
        fn: a function or a module.
        args, kwargs: what `fn` is called with.

    Returns:
        The number of bytes, as an int.

    Example:
        >>> x = torch.randn(8, 64, requires_grad=True)
        >>> ckpt_kernels.memory.saved_bytes_beside_output(torch.relu, x)
        0
    """
    return sum(tensor.counted for tensor in _saved(fn, args, kwargs, _module(fn), but_for_output=True))


def kept_bytes(model: nn.Module, inputs: Any, change: Callable[[nn.Module], object] | None = None) -> int:
    """Bytes that a forward pass of a copy of the model keeps, after a `change` of the copy; `inputs` is a tensor, a
    tuple, or a dict by name.

    The model itself, the inputs, and torch's, Python's and numpy's random numbers, stay as they are.
    """
    with random_numbers_kept(), torch.inference_mode(False), torch.enable_grad():
        twin, (args, kwargs) = copy_of(model), arguments_of(inputs)
        memo: dict[int, Any] = {}
        args = tuple(copied(value, memo) for value in args)
        kwargs = {name: copied(value, memo) for name, value in kwargs.items()}
        if change is not None:
            change(twin)
        return saved_bytes(twin, *args, **kwargs)


@contextlib.contextmanager
def random_numbers_kept() -> Iterator[None]:
    """Afterwards torch's, Python's and numpy's random numbers go on as if nothing had been drawn within."""
    numpy = sys.modules.get("numpy")
    drawn = random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(drawn[0])
        if numpy is not None:
            numpy.random.set_state(drawn[1])


@dataclass(frozen=True)
class SavedTensor:
    """A tensor that is kept.

    Attributes:
        module: the name of the module that keeps the tensor; "" is the whole.
        shape: of the tensor.
        dtype: of the tensor, without "torch.".
        counted: bytes of the storage for the first who keeps it, 0 for those who share it with the `owner`.
        owner: the name of the module whose storage it is.
    """

    module: str
    shape: tuple[int, ...]
    dtype: str
    counted: int
    owner: str


def saved_tensors(
    fn: Callable[..., Any], *args: Any, parameters_of: nn.Module | None = None, **kwargs: Any
) -> list[SavedTensor]:
    """What `fn(*args, **kwargs)` keeps for backward, in the order in which it is kept; see `saved_bytes`.

    Args:
        fn: a function or a module.
        args, kwargs: what `fn` is called with.
        parameters_of: the module whose parameters and buffers do not count; by default `fn`, if that is a module.

    Returns:
        A list of `SavedTensor`.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU())
        >>> for kept in ckpt_kernels.memory.saved_tensors(model, torch.randn(8, 64)):
        ...     print(kept.module, kept.shape, kept.counted)
        0 (8, 64) 2048
        1 (8, 64) 2048
    """
    owner = _module(fn) if parameters_of is None else parameters_of
    return _saved(fn, args, kwargs, owner, but_for_output=False)


def _module(fn: Callable[..., Any]) -> nn.Module | None:
    return fn if isinstance(fn, nn.Module) else None


def _saved(
    fn: Callable[..., Any], args: tuple, kwargs: dict[str, Any], parameters_of: nn.Module | None, but_for_output: bool
) -> list[SavedTensor]:
    modules: list[str] = [""]
    owned = set()
    if parameters_of is not None:
        owned = {_storage(t) for t in (*parameters_of.parameters(), *parameters_of.buffers())}
    packed: list[tuple[str, weakref.ref[_Held]]] = []

    def pack(tensor: Tensor) -> _Held:
        if isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter):
            owned.add(_storage(tensor))
        held = _Held(tensor)
        packed.append((modules[-1], weakref.ref(held)))
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor), _naming(fn, modules):
        result = fn(*args, **kwargs)
    if but_for_output:
        owned.update(map(_storage, itertools.islice(tensors_in(result), 1)))
    # What the graph holds in the end: some of it may have been let go of since.
    kept = [(module, reference()) for module, reference in packed]
    found: list[SavedTensor] = []
    owners: dict[int, str] = {}
    for module, held in kept:
        if held is None:
            continue
        tensor = held.tensor
        storage = _storage(tensor)
        if storage in owned or tensor.numel() == 0:
            continue
        counted = 0 if storage in owners else tensor.untyped_storage().nbytes()
        owner = owners.setdefault(storage, module)
        dtype = str(tensor.dtype).removeprefix("torch.")
        found.append(SavedTensor(module, tuple(tensor.shape), dtype, counted, owner))
    del result
    return found


class _Held:
    """A tensor, as long as a graph holds it. Without its own graph: a node that keeps its output would otherwise keep
    itself alive."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()


@contextlib.contextmanager
def _naming(fn: Callable[..., Any], modules: list[str]) -> Iterator[None]:
    """While active, the last of `modules` is the one whose forward pass runs.

    By the call of all modules and not by hooks: a converted module that has hooks, or anybody's for all modules,
    computes in another way than it does without.
    """
    if not isinstance(fn, nn.Module):
        yield
        return
    names = {module: name for name, module in fn.named_modules()}
    call = nn.Module.__call__

    def named(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # A compiler traces this, and its graph must not depend on who measures.
        if torch.compiler.is_compiling() or module not in names:
            return call(module, *args, **kwargs)
        modules.append(names[module])
        try:
            return call(module, *args, **kwargs)
        finally:
            modules.pop()

    # For converted modules, which else take it for a call of somebody's own.
    vars(named)["only_names_modules"] = True
    modules_of_torch: Any = nn.Module
    modules_of_torch.__call__ = named
    try:
        yield
    finally:
        modules_of_torch.__call__ = call


def peak_bytes(fn: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """The most bytes that tensors made by `fn()` take at one time.

    Args:
        fn: a function of no arguments.
        device: the device whose memory is counted. Of the CPU, the allocations that torch's profiler sees.

    Returns:
        The number of bytes, as an int.

    Example:
        >>> ckpt_kernels.memory.peak_bytes(lambda: torch.ones(1024).sum()) >= 4096
        True
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        start = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        fn()
        return torch.cuda.max_memory_allocated(device) - start
    return max(itertools.accumulate(allocations(fn), initial=0))


def allocations(fn: Callable[[], Any]) -> list[int]:
    """Bytes of every block of CPU memory that tensors take while `fn()` runs, and, negative, that they give back."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        fn()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


@dataclass(frozen=True)
class ModuleMemory:
    """Bytes that a module itself keeps.

    Attributes:
        name: of the module.
        kind: the name of its class.
        saved: bytes as the model is.
        discarding: bytes within `discard_outputs`, or converted.
    """

    name: str
    kind: str
    saved: int
    discarding: int


@dataclass(frozen=True)
class Report:
    """What a model's forward pass keeps, and the peak of a forward and backward pass; as data, as text, as a picture.

    Peaks are of what the passes make: activations, gradients, and what is in between.

    Attributes:
        saved: bytes that are kept.
        discarding: the same within `recompute.discard_outputs`, or of whatever was measured beside it.
        peak: the most bytes at one time.
        discarding_peak: the same within `recompute.discard_outputs`, or of whatever was measured beside it.
        modules: a `ModuleMemory` for each module that keeps something.
        tensors: a `SavedTensor` for each tensor that is kept.
        titles: what the two measurements are called.
    """

    saved: int
    discarding: int
    peak: int
    discarding_peak: int
    modules: list[ModuleMemory]
    tensors: list[SavedTensor]
    titles: tuple[str, str] = ("kept", "within discard_outputs")

    @property
    def is_alike(self) -> bool:
        """Whether every module keeps the same both times."""
        return all(module.saved == module.discarding for module in self.modules)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self, path: str | pathlib.Path) -> None:
        pathlib.Path(path).write_text(json.dumps(self.as_dict(), indent=1))

    def __str__(self) -> str:
        return self.table()

    def table(self, depth: int | None = None) -> str:
        """As text, with equal layers in one row; with a `depth`, by the modules of so many parts of a name."""
        return memory_table.text(self, depth)

    def draw(self, path: str | pathlib.Path, depth: int | None = None, most: int = 15) -> None:
        """A PNG: bars for the rows of the table that keep most. Needs matplotlib."""
        memory_table.draw(self, path, depth, most)


class _Measured(NamedTuple):
    tensors: list[SavedTensor]
    peak: int

    @property
    def saved(self) -> int:
        return sum(tensor.counted for tensor in self.tensors)

    def by(self, module: str) -> int:
        return sum(tensor.counted for tensor in self.tensors if tensor.module == module)


def report(model: nn.Module, *inputs: Any, **kwargs: Any) -> Report:
    """What `model(*inputs, **kwargs)` keeps for backward, by module and by tensor, as it is and discarding outputs.

    A tensor is booked on the innermost module within whose forward pass it is kept first. Runs four forward passes and
    two backward passes, from the sum of all outputs; gradients that the parameters have are left as they are, but
    batch statistics and random numbers move on.

    Args:
        model: a module.
        inputs, kwargs: what the model is called with.

    Returns:
        A `Report`, which prints as a table.

    Example:
        >>> model = torch.nn.Sequential(ckpt_kernels.nn.LayerNorm(64, activation="gelu"), torch.nn.Linear(64, 64))
        >>> report = ckpt_kernels.memory.report(model, torch.randn(8, 64))
        >>> report.saved - report.discarding == 8 * 64 * 4  # the block's output
        True
        >>> [(module.name, module.saved, module.discarding) for module in report.modules]
        [('0', 2112, 2112), ('1', 2048, 0)]
    """
    plain = _measured(model, inputs, kwargs)
    with _replaced_forward(model, discard_outputs()(model.forward)):
        discarding = _measured(model, inputs, kwargs)
    return _reported(model, plain, discarding)


def report_beside(
    model: nn.Module, other: nn.Module, titles: tuple[str, str], inputs: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Report:
    """The same of two models with the same names of modules, such as one that `convert` made of the other.

    Args:
        model: a module.
        other: another, whose modules have the same names.
        titles: what the two are called in the report.
        inputs: a tuple, what both are called with.
        kwargs: a mapping, by name.

    Returns:
        A `Report`, where `saved` and `peak` are of `model`, `discarding` and `discarding_peak` of `other`.

    Example:
        >>> import copy
        >>> model = torch.nn.Sequential(torch.nn.LayerNorm(64), torch.nn.GELU(), torch.nn.Linear(64, 64))
        >>> converted = copy.deepcopy(model)
        >>> _ = ckpt_kernels.convert(converted)
        >>> x = torch.randn(8, 64)
        >>> report = ckpt_kernels.memory.report_beside(model, converted, ("as it is", "converted"), (x,), {})
        >>> report.discarding < report.saved
        True
    """
    measured = [_measured(each, inputs, kwargs) for each in (model, other)]
    return _reported(model, *measured, titles=titles)


def _reported(model: nn.Module, first: _Measured, second: _Measured, **titles: Any) -> Report:
    modules = [
        ModuleMemory(name, type(module).__name__, first.by(name), second.by(name))
        for name, module in model.named_modules()
    ]
    kept = [module for module in modules if module.saved or module.discarding]
    return Report(first.saved, second.saved, first.peak, second.peak, kept, first.tensors, **titles)


def _measured(model: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Measured:
    wanted: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    wanted += [t for t in tensors_in((inputs, kwargs)) if t.requires_grad]
    device = next((t.device for t in (*model.parameters(), *tensors_in((inputs, kwargs)))), torch.device("cpu"))

    def step() -> None:
        outputs = [t for t in tensors_in(model(*inputs, **kwargs)) if t.requires_grad]
        if outputs and wanted:
            total: Any = sum(t.float().sum() for t in outputs)
            torch.autograd.grad(total, wanted, allow_unused=True)

    return _Measured(saved_tensors(model, *inputs, **kwargs), peak_bytes(step, device))


@contextlib.contextmanager
def _replaced_forward(model: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = model.__dict__.get("forward")
    model.forward = forward
    try:
        yield
    finally:
        if before is None:
            del model.forward
        else:
            model.forward = before


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()

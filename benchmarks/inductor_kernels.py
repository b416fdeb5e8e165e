"""Compiles the Triton kernels that torch.compile writes for a block on an H200, without a GPU.

The graphs of both passes are captured on torch's meta device. Inductor writes code for them as for a GPU: everything
that it asks the GPU is answered here (`_ANSWERS`). The code then runs on the meta device with kernels that record their
arguments. Inductor times the configurations of a kernel and keeps the fastest; here that is the best estimate. The
names in `_ANSWERS` and `_RUN` are torch's own and may change with each release; these are of torch 2.13.
"""

import contextlib
import pathlib
import runpy
import tempfile
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor
from torch._functorch.aot_autograd import aot_function
from torch._guards import TracingContext, tracing
from torch._inductor import compile_fx, graph
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.runtime import triton_helpers, triton_heuristics
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from ckpt_kernels.backends.triton.launch import Launch, Tile, processors
from ckpt_kernels.catalogue.blocks import BY_NAME
from ckpt_kernels.inspect import MACHINES, Usage, estimate
from ckpt_kernels.inspect.kernels import active_target, target_of, usage
from ckpt_kernels.inspect.roofline import ARCH
from ckpt_kernels.inspect.variants import Variant

H200 = MACHINES["H200"]
_PROPERTIES = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=H200.multiprocessors,
    warp_size=32,
    total_memory=140 << 30,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
)
_ANSWERS = {
    "torch.cuda.is_available": True,
    "torch.cuda.device": contextlib.nullcontext(),
    "torch.cuda.device_count": 1,
    "torch.cuda.current_device": 0,
    "torch.cuda.get_device_properties": _PROPERTIES,
    "torch.cuda.get_device_capability": (9, 0),
    "torch.cuda.get_rng_state": torch.zeros(1),
    "torch.cuda.set_rng_state": None,
    "torch.cuda.synchronize": None,
    "torch._dynamo.device_interface.CudaInterface.get_device_properties": _PROPERTIES,
    "torch._dynamo.device_interface.CudaInterface.current_device": 0,
    "torch._inductor.scheduler.has_triton": True,
}
_RUN = {
    "torch._C._cuda_getCurrentRawStream": 0,
    "torch.cuda._DeviceGuard": contextlib.nullcontext(),
    "torch.cuda.set_device": None,
}


class Call(NamedTuple):
    """A call of one kernel: inductor's source, and the arguments."""

    source: str
    arguments: tuple[Any, ...]


class _Written(Exception):
    """Ends a compilation as soon as inductor's code is written."""


def inductor_kernels(name: str, rows: int, columns: int, arch: str) -> dict[str, list[Usage]]:
    """The kernels of torch.compile for a block in bfloat16, compiled, by pass.

    Without kernels that have no operand of the block's shape, such as sums of partial weight gradients.
    """
    if arch != ARCH["H200"]:
        raise ValueError(f"arch is {arch!r}; expected {ARCH['H200']!r}, for which inductor writes code here")
    found: dict[str, list[Usage]] = {}
    for direction, (module, inputs) in zip(("forward", "backward"), graphs(name, rows, columns), strict=True):
        calls = [one for one in recorded(written(module, inputs), inputs) if _large(one, rows * columns)]
        found[direction] = [_fastest(f"{name} {direction}", one, rows * columns, arch) for one in calls]
    return found


def graphs(name: str, rows: int, columns: int) -> list[tuple[torch.fx.GraphModule, list[Tensor]]]:
    """The graphs of the forward and the backward pass of a block in eager torch, with inputs on the meta device."""
    found: list[tuple[torch.fx.GraphModule, list[Tensor]]] = []

    def capture(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        found.append((module, inputs))
        return make_boxed_func(module)

    block = BY_NAME[name]
    operands = block.empty_operands((1, rows), columns, torch.bfloat16, "meta")
    function = aot_function(
        lambda *given: block.eager(**dict(zip(operands, given, strict=True))),
        fw_compiler=capture,
        bw_compiler=capture,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    outputs = function(*operands.values())
    torch.autograd.grad(outputs, list(operands.values()), [torch.empty_like(one) for one in outputs])
    return [(module, [_like(one, "meta") for one in inputs]) for module, inputs in found]


def _like(one: Tensor, device: str) -> Tensor:
    return torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device=device)


@contextlib.contextmanager
def _answering(answers: Mapping[str, Any]) -> Iterator[None]:
    """Let functions of torch return constants."""
    with contextlib.ExitStack() as stack:
        for path, answer in answers.items():
            stack.enter_context(mock.patch(path, lambda *given, answer=answer: answer, create=True))
        yield


def written(module: torch.fx.GraphModule, inputs: list[Tensor]) -> str:
    """Inductor's code for a graph on a GPU."""

    def stop(lowering: graph.GraphLowering) -> None:
        raise _Written(lowering.codegen()[0].value)

    stopping = mock.patch.object(graph.GraphLowering, "compile_to_module", stop)
    no_random_state = mock.patch("torch._dynamo.utils.preserve_rng_state", contextlib.nullcontext)
    with _answering(_ANSWERS), stopping, no_random_state, active_target(target_of(ARCH["H200"])):
        with FakeTensorMode() as mode, torch.no_grad(), tracing(TracingContext(mode)):
            on_gpu = [_like(one, "cuda:0") for one in inputs]
            try:
                compile_fx.compile_fx_inner(make_fx(module)(*on_gpu), on_gpu)
            except Exception as error:
                cause: BaseException | None = error
                while cause is not None and not isinstance(cause, _Written):
                    cause = cause.__cause__ or cause.__context__
                if cause is None:
                    raise
                return str(cause)
    raise RuntimeError("inductor ended without code; expected one call of compile_to_module")


def recorded(code: str, inputs: list[Tensor]) -> list[Call]:
    """The calls of Triton kernels when inductor's code runs on inputs on the meta device."""
    calls: list[Call] = []

    def record(_: Any, name: str, source: str, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(run=lambda *given, stream: calls.append(Call(source, given)))

    no_wait = mock.patch.object(AsyncCompile, "wait", lambda *given: None)
    with _answering(_RUN), mock.patch.object(AsyncCompile, "triton", record), no_wait:
        names: dict[str, Any] = {}
        exec(code, names)
        names["empty_strided_cuda"] = lambda size, stride, dtype: torch.empty_strided(
            size, stride, dtype=dtype, device="meta"
        )
        names["call"](list(inputs))
    return calls


def _large(call: Call, elements: int) -> bool:
    return any(one.numel() >= elements for one in call.arguments if isinstance(one, Tensor))


def _fastest(name: str, call: Call, elements: int, arch: str) -> Usage:
    """The compiled kernel in the configuration with the best estimate."""
    kernel, configurations = _loaded(call.source)
    variants = [Variant(name, *_launch(kernel, one, call.arguments, elements)) for one in configurations]
    return min((usage(one, "bf16", one.columns, arch, work=True) for one in variants), key=_clocks)


def _clocks(used: Usage) -> float:
    assert used.work is not None
    return used.work.memory / estimate(used.work, H200).share


def _loaded(source: str) -> tuple[Any, list[Any]]:
    """The kernel in inductor's source, and the configurations that inductor would time."""
    found: list[Any] = []

    def keep(size_hints: Any, configs: list[Any], **options: Any) -> Any:
        return lambda kernel: found.append((kernel, configs))

    no_driver = mock.patch.object(triton_helpers, "set_driver_to_gpu", lambda: None)
    with tempfile.TemporaryDirectory() as folder, no_driver:
        # Triton reads a kernel's source from the file.
        path = pathlib.Path(folder) / "kernel.py"
        path.write_text(source)
        with mock.patch.object(triton_heuristics, "cached_autotune", keep):
            runpy.run_path(str(path))
    return found[0]


def _launch(kernel: Any, configuration: Any, given: tuple[Any, ...], elements: int) -> tuple[Launch, int, int]:
    """A launch in the terms of `ckpt_kernels.inspect`, with the number of elements and the columns of a row."""
    constants, rest = configuration.kwargs, iter(given)
    arguments = tuple(constants[name] if name in constants else next(rest) for name in kernel.arg_names)
    by_name = dict(zip(kernel.arg_names, arguments, strict=True))
    step, columns = constants["XBLOCK"], by_name.get("r0_numel", constants["XBLOCK"])
    if "r0_numel" in by_name:
        block = constants.get("R0_BLOCK", 1 << (columns - 1).bit_length())
        tile = Tile(step, block, configuration.num_warps, block >= columns, None, constants.get("NUM_STAGES", 1))
    else:
        tile = Tile(1, step, configuration.num_warps, True)
    programs = -(-by_name["xnumel"] // constants.get("RSPLIT_SIZE", step))
    scaled = programs * processors(torch.device("meta")) // H200.multiprocessors
    return Launch(kernel, tile, arguments, scaled), elements, columns

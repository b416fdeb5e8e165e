"""The memory report: kept tensors by module, savings of `discard_outputs`, and peaks."""

import json
import pathlib
import threading

import pytest
import torch

from ckpt_kernels import cli, functional, memory, nn, recompute

from .conftest import DEVICE, serving
from .test_backends import run


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(64)
        self.q, self.k = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
        self.mlp = nn.GatedMLP(64, 256)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.norm(x)
        return {"output": self.mlp(self.q(y) * self.k(y).detach())}


def example() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """A target for the command line."""
    torch.manual_seed(0)
    return Model().to(DEVICE), (torch.randn(512, 64, device=DEVICE, requires_grad=True),)


def by_name() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    model, (x,) = example()
    return model, {"x": x}


UNIT = 512 * 64 * 4


def test_report_counts_every_tensor_once() -> None:
    model, (x,) = example()
    report = memory.report(model, x)
    saved = {m.name: m.saved for m in report.modules}
    # The norm keeps the input and a number a row; q keeps the norm's output; gate and value share their input.
    assert saved == {"norm": UNIT + 512 * 4, "q": UNIT, "": UNIT, "mlp": 9 * UNIT}
    assert report.saved == sum(saved.values()) == memory.saved_bytes(model, x)
    assert sum(t.counted for t in report.tensors) == report.saved
    shared = [t for t in report.tensors if t.counted == 0]
    # No graph holds k's saved tensors, because k's output is detached.
    assert [(t.module, t.owner) for t in shared] == [("mlp", "mlp")]
    discarding = {m.name: m.discarding for m in report.modules}
    assert discarding == saved | {"q": 0}
    assert report.discarding == report.saved - UNIT == memory.saved_bytes(recompute.DiscardOutputs(model), x)


def test_report_does_not_change_the_model() -> None:
    model, (x,) = example()
    model.q.weight.grad = torch.ones_like(model.q.weight)
    memory.report(model, x=x)
    assert "forward" not in vars(model) and not model._forward_hooks and not model.norm._forward_pre_hooks
    assert (model.q.weight.grad == 1).all() and model.k.weight.grad is None and x.grad is None


def test_report_as_text_data_and_picture(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("matplotlib")
    model, (x,) = example()
    report = memory.report(model, x)
    text = str(report)
    assert "mlp" in text and "GatedMLP" in text and f"{report.saved / 2**20:.2f} MiB" in text
    report.to_json(tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["saved"] == report.saved and data["tensors"][0]["module"] == "norm"
    report.draw(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("target", ["tests.test_memory:example", "tests.test_memory:by_name"])
def test_the_command_saves_a_report(target: str, capsys: pytest.CaptureFixture, tmp_path: pathlib.Path) -> None:
    assert cli.main(["memory", target, "--json", str(tmp_path / "report.json")]) == 0
    assert "kept for backward" in capsys.readouterr().out
    assert json.loads((tmp_path / "report.json").read_text())["discarding"] > 0
    for bad in ("tests.test_memory", "tests.test_memory:nothing", "no.such.module:x", "tests.test_memory:UNIT"):
        assert cli.main(["memory", bad]) == 2
        assert bad in capsys.readouterr().err


@pytest.mark.parametrize("level", ["block", "output", "all"])
def test_recomputation_lowers_the_peak(level: str) -> None:
    """Compared with eager torch's layers, in a chain long enough for saved tensors to matter."""
    torch.manual_seed(0)

    class Eager(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up = torch.nn.LayerNorm(64), torch.nn.Linear(64, 256)
            self.down = torch.nn.Linear(256, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))

    class Ours(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.mlp = nn.LayerNorm(64), nn.MLP(64, 256, recompute=level)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.mlp(self.norm(x))

    x = torch.randn(1024, 64, device=DEVICE, requires_grad=True)
    eager = torch.nn.Sequential(*(Eager() for _ in range(8))).to(DEVICE)
    ours = torch.nn.Sequential(*(Ours() for _ in range(8))).to(DEVICE)
    if level != "block":
        ours = recompute.DiscardOutputs(ours)
    peaks = [memory.peak_bytes(lambda m=m: m(x).sum().backward(), DEVICE) for m in (eager, ours)]
    saved = [memory.saved_bytes(m, x) for m in (eager, ours)]
    assert peaks[1] <= peaks[0] * 1.01
    if level != "block":
        # Discarded tensors are not alive at the peak, except those that are recomputed at that time.
        assert peaks[0] - peaks[1] >= (saved[0] - saved[1]) / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scratch_memory_is_no_more_than_eagers(dtype: torch.dtype) -> None:
    """For very wide rows, with sums of the weights' gradients for each thread: torch's sums have the input's dtype,
    ours are in float32."""
    columns = 65536
    x = torch.randn(192, columns, dtype=dtype, requires_grad=True)
    vectors = [torch.ones(columns, requires_grad=True) for _ in range(2)]
    if dtype == torch.float32:
        eager = torch.nn.functional.layer_norm(x, (columns,), *vectors)
        allowed = memory.peak_bytes(lambda: torch.autograd.grad(eager, (x, *vectors), x.detach()))
    else:
        allowed = x.nbytes + 2 * (1 + torch.get_num_threads()) * columns * 4
    with serving("native"):
        ours = functional.layer_norm(x, columns, *vectors)
        taken = memory.peak_bytes(lambda: torch.autograd.grad(ours, (x, *vectors), x.detach()))
    # The measurement includes the sums, besides the three gradients.
    assert x.nbytes + 2 * columns * 4 < taken <= allowed


OUT_OF_MEMORY = """
import resource
import torch
from ckpt_kernels.backends import native
from ckpt_kernels.backends.blocks import RowNorm, RowNormGradients, RowNormOptions

torch.set_num_threads(1)

def backward(columns):
    x, grad, grad_input = torch.ones(1, columns), torch.ones(1, columns), torch.empty(1, columns)
    options = RowNormOptions(columns, 1e-5, True, activation="gelu")
    block = RowNorm(x, None, None, None, None, None, torch.zeros(1), torch.ones(1), options)
    return lambda: native.row_norm_backward(block, grad, None, RowNormGradients(grad_input, None, None, None, None))

backward(64)()
large = backward(1 << 24)
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**26, resource.RLIM_INFINITY))
large()
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/statm").exists(), reason="the size of a process is read from /proc")
def test_out_of_memory_is_an_error() -> None:
    done = run("-c", OUT_OF_MEMORY)
    assert done.returncode == 1
    assert "RuntimeError" in done.stderr and "out of memory" in done.stderr


def test_saved_bytes_beside_output_exclude_the_output() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    assert memory.saved_bytes(torch.relu, x) == x.nbytes
    assert memory.saved_bytes_beside_output(torch.relu, x) == 0
    assert memory.saved_bytes_beside_output(torch.nn.functional.gelu, x) == x.nbytes


class Scaled(torch.nn.Module):
    """A module that saves a buffer, and the input for the weight's gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(8))
        self.register_buffer("scale", torch.full((8,), 2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight * self.scale


def test_parameters_and_buffers_of_the_module_do_not_count() -> None:
    model, x = Scaled(), torch.randn(4, 8, requires_grad=True)
    assert memory.saved_bytes(lambda x: model(x), x) == x.nbytes + model.scale.nbytes
    assert memory.saved_bytes(lambda x: model(x), x, parameters_of=model) == memory.saved_bytes(model, x) == x.nbytes
    # With another module, the model's own buffer counts.
    assert memory.saved_bytes(model, x, parameters_of=Scaled()) == x.nbytes + model.scale.nbytes
    kept = memory.saved_tensors(lambda x: model(x), x, parameters_of=model)
    assert [(tensor.shape, tensor.counted) for tensor in kept] == [((4, 8), x.nbytes)]


def test_a_compiled_model_is_measured() -> None:
    model, x = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 8)), torch.randn(4, 8)
    assert memory.saved_bytes(torch.compile(model, backend="eager"), x) == memory.saved_bytes(model, x)


def test_memory_is_not_measured_within_another_profiler() -> None:
    def measured() -> None:
        memory.peak_bytes(lambda: torch.ones(1000))

    with pytest.raises(RuntimeError, match="a profiler of torch runs; expected none"):
        memory.peak_bytes(measured)
    with torch.profiler.profile() as profile:
        with pytest.raises(RuntimeError, match="a profiler of torch runs"):
            measured()
        torch.ones(3)
    assert any(event.name == "aten::ones" for event in profile.events())


def test_threads_measure_in_turn() -> None:
    """Torch has one profiler: two at once end the process or mix their records."""
    peaks: list[int] = []

    def measured() -> None:
        peaks.extend(memory.peak_bytes(lambda: torch.ones(1000)) for _ in range(10))

    threads = [threading.Thread(target=measured) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert peaks == [4000] * 20


def test_a_measurement_begins_after_the_end_of_that_of_another_thread() -> None:
    began = threading.Event()
    peaks: list[int] = []

    def measured() -> None:
        def fn() -> None:
            began.set()
            torch.ones(1000)

        peaks.append(memory.peak_bytes(fn))

    other = threading.Thread(target=measured)

    def fn() -> None:
        other.start()
        assert not began.wait(0.1)
        torch.ones(500)

    peaks.append(memory.peak_bytes(fn))
    other.join()
    assert peaks == [2000, 4000]


def test_a_bad_device_is_an_error() -> None:
    with pytest.raises(TypeError, match="device is a Tensor; expected"):
        memory.peak_bytes(lambda: None, torch.ones(3))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="device is 'nowhere'; expected"):
        memory.peak_bytes(lambda: None, "nowhere")

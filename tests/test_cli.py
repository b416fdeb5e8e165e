"""The command line: users' functions, messages before a run, errors, and output."""

import argparse
import dataclasses
import importlib
import importlib.util
import io
import math
import pathlib
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from ckpt_kernels import check, cli, convert
from ckpt_kernels import cli_arguments as kinds

from .test_backends import ROOT, run


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(nn.functional.silu(self.norm(x)))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(12)))


def one_tensor() -> tuple:
    return model(), torch.randn(64, 16)


def one_tuple() -> tuple:
    return model(), (torch.randn(64, 16),)


def of_converted() -> tuple:
    return convert(made := model()) and made, torch.randn(64, 16)


def only_a_model() -> nn.Module:
    """A model of two modules, which could be unpacked like (model, inputs)."""
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))


def three() -> tuple:
    return model(), torch.randn(4, 16), 3


def a_number_for_inputs() -> tuple:
    return model(), 3


def fails() -> None:
    def helper() -> None:
        raise TypeError("mine alone")

    helper()


def leaves() -> None:
    sys.exit(0)


class Leaves(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sys.exit(0)


def gives_a_model_that_leaves() -> tuple:
    return Leaves(2, 2), torch.randn(2, 2)


def takes_an_argument(size: int) -> tuple:
    return nn.Linear(size, size), torch.randn(size)


a_model = nn.Linear(2, 2)


def answer(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str, str]:
    status = cli.main(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("only_a_model", "gives only a model, Sequential; expected (model, inputs)"),
        ("three", "gives a tuple of 3; expected (model, inputs)"),
        ("a_number_for_inputs", "gives a int for its inputs; expected (model, inputs)"),
        ("nobody", "tests.test_cli has no 'nobody'"),
        ("ROOT", "'ROOT', not a function"),
        ("a_model", "is a model, Linear, not a function that gives one; expected (model, inputs)"),
        ("takes_an_argument", "takes arguments, (size: int) -> tuple; expected a function without any"),
    ],
)
def test_wrong_targets_are_named_errors(name: str, said: str, capsys: pytest.CaptureFixture) -> None:
    status, _, err = answer(capsys, "memory", f"tests.test_cli:{name}")
    assert status == 2 and said in err and "Traceback" not in err


def test_a_users_exception_is_shown_with_its_traceback(
    capsys: pytest.CaptureFixture, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, _, err = answer(capsys, "memory", "tests.test_cli:fails")
    assert status == 2
    assert "Traceback" in err and "in helper" in err and "target.py" not in err
    assert "tests.test_cli:fails() failed, in its own code: TypeError: mine alone" in err
    # A user's function or model that calls sys.exit(0) does not end the command with success.
    for name, said in (("leaves", "failed, in its own code"), ("gives_a_model_that_leaves", "cannot be run so")):
        status, _, err = answer(capsys, "memory", f"tests.test_cli:{name}")
        assert status == 2 and f"{said}: SystemExit: 0" in err and "Traceback" in err
    # A module that fails on import has a traceback; a missing module has none.
    (tmp_path / "broken_module_of_a_user.py").write_text("import no_such_module_of_a_user\n")
    monkeypatch.chdir(tmp_path)
    status, _, err = answer(capsys, "memory", "broken_module_of_a_user:f")
    assert status == 2 and "Traceback" in err and "the import of broken_module_of_a_user failed, in its own code" in err
    status, _, err = answer(capsys, "memory", "no_such_module_of_a_user.x:f")
    assert status == 2 and "Traceback" not in err and "there is no module 'no_such_module_of_a_user'" in err
    status, _, err = answer(capsys, "memory", "../broken_module_of_a_user:f")
    assert status == 2 and "Traceback" not in err and "expected names with dots between them" in err


def test_a_single_tensor_is_one_input(capsys: pytest.CaptureFixture) -> None:
    found = [answer(capsys, "memory", f"tests.test_cli:{name}") for name in ("one_tensor", "one_tuple")]
    assert found[0] == found[1] and found[0][0] == 0


@pytest.mark.parametrize(
    ("name", "title"), [("one_tensor", "converted, output"), ("of_converted", "converted, as given")]
)
def test_memory_compares_eager_and_converted(name: str, title: str, capsys: pytest.CaptureFixture) -> None:
    level = [] if name == "of_converted" else ["--convert", "output"]
    status, out, _ = answer(capsys, "memory", f"tests.test_cli:{name}", *level)
    assert status == 0 and out.splitlines()[0].split(maxsplit=2) == ["module", "eager", title]
    # Each block keeps the norm's input and two numbers a row; eager also silu's input and output.
    (total,) = [line.split() for line in out.splitlines() if line.startswith("kept for backward")]
    assert total[3:] == [f"{12 * (3 * 4 + 0.5):.2f}", "KiB", f"{12 * (4 + 0.5):.2f}", "KiB"]


def test_equal_layers_are_one_row(capsys: pytest.CaptureFixture) -> None:
    _, out, _ = answer(capsys, "memory", "tests.test_cli:one_tensor")
    assert [line.split()[:4] for line in out.splitlines()[2:4]] == [
        ["0-11", "Block", "x", "12"],
        ["0-11.norm", "LayerNorm", "x", "12"],
    ]
    _, out, _ = answer(capsys, "memory", "tests.test_cli:one_tensor", "--depth", "0")
    assert out.splitlines()[2].split()[0] == "(whole)" and out.splitlines()[3].startswith("---")


@pytest.mark.parametrize("command", ["memory", "convert-check"])
def test_a_missing_matplotlib_is_an_error_before_the_run(
    command: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a))
    status, out, err = answer(capsys, command, "tests.test_cli:fails", "--png", "x.png")
    assert (status, out) == (2, "") and "pip install 'ckpt-kernels[bench]'" in err and "mine alone" not in err


def test_the_profiler_prints_nothing() -> None:
    done = run("-m", "ckpt_kernels", "memory", "tests.test_cli:one_tensor")
    assert done.returncode == 0 and "rofiler" not in done.stdout + done.stderr and done.stderr == ""


def options(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> argparse.Namespace:
    """The parsed arguments of the benchmarks."""
    pytest.importorskip("rich", reason="rich is not installed")
    from benchmarks import __main__ as benchmarks

    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    return benchmarks.arguments()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--case", "nothing"), r"--case is 'nothing'; the blocks are layer_norm.*rms_norm\+silu"),
        (("--dtype", "int8"), r"'int8' \(choose from .*float32.*bfloat16.*float16"),
        (("--rounds", "0"), "'0' given; expected a whole number from 1"),
        (("--seconds", "nan"), "'nan' given; expected a number above 0"),
        (("--out", __file__), "expected a folder, and .*test_cli.py' is none to write to"),
        (("--shape", "4096*4"), r"'4096\*4' is no shape; expected numbers with x between them, as in 4096x1024"),
        (("--case", "batch_norm", "--shape", "4096"), r"--shape is 4096; these blocks take 2 dimensions or more"),
    ],
)
def test_benchmarks_list_what_exists(
    arguments: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit, match="2"):
        options(monkeypatch, *arguments)
    assert re.search(said, capsys.readouterr().err)


@pytest.mark.parametrize("name", ["layers", "models", "convert"])
def test_benchmarks_of_models_list_what_exists(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("rich", reason="rich is not installed")
    module = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", ["benchmarks", *(["--case"] if name != "convert" else []), "nothing"])
    with pytest.raises(SystemExit, match="2"):
        module.main()
    assert re.search("nothing.* (one of|there are) .*, ", capsys.readouterr().err)


def test_benchmarks_take_any_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    found = options(monkeypatch, "--shape", "33x400", "--dtype", "float16")
    from benchmarks import __main__ as benchmarks

    planned = list(benchmarks.plan("cpu", found))
    assert {(setting.label, dtype) for _, setting, dtype in planned} == {("33x400", torch.float16)}
    assert all(case.block.call(**case.operands(setting, dtype, "cpu")) for case, setting, dtype in planned)
    images = benchmarks.plan("cpu", options(monkeypatch, "--shape", "2x6x5x7", "--case", "batch_norm"))
    assert {setting.label for _, setting, _ in images} == {"2x6x5x7", "2x6x5x7 channels last"}
    for shape in ("40", "2x6", "8x16x20", "2x6x3x4x5"):
        planned = list(benchmarks.plan("cpu", options(monkeypatch, "--shape", shape)))
        assert {setting.label for _, setting, _ in planned} - {f"{shape} channels last"} == {shape}
        assert {case.block.channels for case, _, _ in planned} == ({True, False} if "x" in shape else {False})
        for case, setting, dtype in planned:
            operands = case.operands(setting, dtype, "cpu")
            assert case.block.call(**operands)[0].shape == case.block.eager(**operands)[0].shape


def test_benchmarks_warn_of_a_noisy_run() -> None:
    pytest.importorskip("rich", reason="rich is not installed")
    from benchmarks import report

    calm, wide = [0.02] * 4, [0.5] * 4
    assert report.noise(calm) == [] and report.noise([]) == []
    (said,) = report.noise(calm + wide)
    assert said.startswith("TOO NOISY TO MEAN ANYTHING: of 8 figures 4 spread")


def test_benchmarks_name_missing_packages_before_the_run() -> None:
    for missing in ("rich", "matplotlib"):
        program = (
            "import importlib.util, runpy, sys\n"
            "find = importlib.util.find_spec\n"
            f"importlib.util.find_spec = lambda name, *a: None if name == {missing!r} else find(name, *a)\n"
            "sys.argv = ['-m']\n"
            "runpy.run_module('benchmarks', run_name='__main__', alter_sys=True)\n"
        )
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 1
        assert done.stderr.strip() == f"the benchmarks need {missing}: pip install 'ckpt-kernels[bench]'"


def test_convert_check_warns_of_noisy_times() -> None:
    report = convert(model())
    found = check.Check(report, "training", [], [], (2, 1), (2, 1), (1.0, 0.5), 0.4)
    assert "too noisy for the times to mean anything: steps spread by 40%" in str(found)
    assert "too noisy" not in str(dataclasses.replace(found, noise=0.05))
    single = check.check(model(), (torch.randn(8, 16),), turns=1)
    assert single.noise is None and "a single step of each" in str(single)


def with_uncopyable_attributes() -> tuple[nn.Module, torch.Tensor]:
    made, inputs = one_tensor()
    made.lock, made.graph, made.items = threading.Lock(), torch.ones(2, requires_grad=True) * 2, iter_of_two()
    return made, inputs


def iter_of_two() -> Iterator[int]:
    yield from range(2)


@pytest.mark.parametrize(
    "arguments", [("memory", "--convert", "output"), ("convert-check", "--recompute", "all", "--turns", "1")]
)
def test_models_with_uncopyable_attributes(arguments: tuple[str, ...], capsys: pytest.CaptureFixture) -> None:
    command, *given = arguments
    status, out, err = answer(capsys, command, "tests.test_cli:with_uncopyable_attributes", *given)
    assert (status, err) == (0, "") and "kept for backward" in out


class ReadsItsClass(nn.Module):
    """A model that computes another function when converted, which the check must detect."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kind = getattr(self.norm, "".join(("__cla", "ss__")))  # no analysis of the source finds that
        return self.linear(self.norm(x) * (2 if kind is nn.LayerNorm else 1))


@pytest.mark.parametrize(
    ("kind", "factor", "said"),
    [
        (ReadsItsClass, 1.0, ["gradients", "outputs"]),
        (model, 1.0, []),
        (model, math.nan, ["outputs"]),
        (model, 1e38, ["outputs"]),
    ],
)
def test_convert_check_reports_changed_results(kind: Callable[[], nn.Module], factor: float, said: list[str]) -> None:
    found = check.check(kind(), (factor * torch.randn(3, 16),), turns=1)
    assert sorted(change.split()[0] for change in found.changed) == said


def fails_when_called() -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(5)), torch.randn(2, 4)


def lazy() -> tuple[nn.Module, torch.Tensor]:
    return nn.LazyLinear(4), torch.randn(2, 4)


def turns_gradients_off() -> tuple[nn.Module, torch.Tensor]:
    torch.set_grad_enabled(False)
    return one_tensor()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("memory", "--json", "no/such/folder/x.json"), "is in no folder that is there"),
        (("memory", "--json", "."), "is a folder; expected a file"),
        (("convert-check", "--png", "x.notanimage"), "expected a name that ends in .png, .svg, .pdf"),
        (("convert-check", "--turns", "0"), "expected a whole number from 1"),
        (("memory", "--depth", "-1"), "expected a whole number from 0"),
    ],
)
def test_invalid_options_are_errors_before_the_run(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main((arguments[0], "tests.test_cli:fails", *arguments[1:]))
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(("inspect", "--columns", "-5"))


def test_missing_devices_and_files_are_argument_errors() -> None:
    for kind, text in ((kinds.device, "nowhere"), (kinds.device, "cuda:99"), (kinds.existing, "nothing.json")):
        with pytest.raises(argparse.ArgumentTypeError, match=text):
            kind(text)
    assert kinds.device("cpu") == torch.device("cpu") and kinds.existing(__file__).samefile(__file__)


@pytest.mark.parametrize("command", ["memory", "convert-check"])
def test_a_model_that_cannot_run_is_an_error(command: str, capsys: pytest.CaptureFixture) -> None:
    status, _, err = answer(capsys, command, "tests.test_cli:fails_when_called")
    assert status == 2 and "Traceback" in err and "the model cannot be run so" in err
    status, _, err = answer(capsys, command, "tests.test_cli:lazy")
    assert status == 2 and "Traceback" not in err and "call the model once on its inputs before" in err


def test_memory_measures_with_gradients_on(capsys: pytest.CaptureFixture) -> None:
    try:
        assert answer(capsys, "memory", "tests.test_cli:turns_gradients_off") == answer(
            capsys, "memory", "tests.test_cli:one_tensor"
        )
    finally:
        torch.set_grad_enabled(True)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("memory", "--json", "/dev/full"), "/dev/full cannot be written"),
        (
            ("plan", "--budget", "device"),
            'budget is "device" and the model is on cpu; expected a CUDA device, or a size',
        ),
    ],
)
def test_errors_of_options_do_not_blame_the_model(
    command: tuple[str, ...], said: str, capsys: pytest.CaptureFixture
) -> None:
    name, *options = command
    if "/dev/full" in options and not pathlib.Path("/dev/full").exists():
        pytest.skip("there is no full device")
    status, _, err = answer(capsys, name, "tests.test_cli:one_tensor", *options)
    assert status == 2 and said in err and "cannot be run" not in err


@pytest.mark.parametrize("given", [True, False])
def test_plans_with_offload(given: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    found: list[Any] = []

    def planned(*args: Any, offload: bool, **kwargs: Any) -> str:
        found.append(offload)
        return "the plan"

    monkeypatch.setattr(cli, "plan", planned)
    status, out, _ = answer(capsys, "plan", "tests.test_cli:one_tensor", *["--offload"] * given)
    assert (status, out.strip(), found) == (0, "the plan", [given])


@pytest.mark.parametrize(("error", "said"), ((BrokenPipeError(), ""), (OSError("no space"), "cannot be written to")))
def test_a_closed_output_does_not_blame_the_model(
    error: OSError, said: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise error

    monkeypatch.setattr(sys, "stdout", Closed())
    assert cli.main(["memory", "tests.test_cli:one_tensor"]) == 2
    printed = capsys.readouterr().err
    assert said in printed if said else printed == ""

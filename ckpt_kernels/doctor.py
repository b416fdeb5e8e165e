"""Reports which backend serves calls on this machine, and why the others do not."""

import importlib.metadata
import platform
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from . import backends
from .memory.freed_memory import fresh_memory
from .thin.direct import why_not
from .version import __version__


@dataclass(frozen=True)
class Finding:
    """One line of the report. `problem` says that the line reports a fault of this installation."""

    subject: str
    text: str
    problem: bool = False


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> Iterator[str]:
    yield "cpu"
    if torch.cuda.is_available():
        yield "cuda"


def _backend_findings(device: str) -> Iterator[Finding]:
    try:
        chosen = backends.selected_name(device)
    except (RuntimeError, ValueError) as error:
        yield Finding(f"{device} calls", str(error), problem=True)
        chosen = None
    reasons = {name: backends.why_not(name, device, torch.float32) for name in backends.NAMES}
    if chosen:
        slow = chosen == "reference"
        detail = " (plain torch: right, and keeps as little memory, but no faster than torch)" if slow else ""
        yield Finding(f"{device} calls", f"served by {chosen}{detail}", problem=slow)
    for name, reason in reasons.items():
        if name != chosen:
            yield Finding(f"  {name}", reason or "available", problem=False)


def findings() -> list[Finding]:
    """The lines of the report, in order."""
    lines = [
        Finding("ckpt_kernels", __version__),
        Finding("python", f"{platform.python_version()} on {platform.platform()}"),
        Finding("torch", torch.__version__),
        Finding("triton", _installed("triton")),
    ]
    for index in range(torch.cuda.device_count()):
        lines.append(Finding(f"cuda:{index}", torch.cuda.get_device_name(index)))
    if torch.cuda.device_count() == 0:
        lines.append(Finding("cuda", "no device"))
    native = backends.backend_module("native")
    for stem, device in (("_C", "cpu"), ("_C_cuda", "cuda")):
        failure = native.why_not(device, torch.float32)
        # A library that does not load does not match this torch. A library that was not built is a choice.
        mismatch = failure is not None and "does not load" in failure
        lines.append(Finding(stem, failure or f"loaded, matches torch {torch.__version__}", mismatch))
    if native.why_not("cpu", torch.float32) is None:
        lines.append(
            Finding("  small calls", f"the full path serves them: {why_not}" if why_not else "past torch's dispatcher")
        )
        try:
            lines.append(Finding("  instruction set", native.cpu_isa()))
        except RuntimeError as error:
            lines.append(Finding("  instruction set", str(error).splitlines()[0], problem=True))
    for device in _devices():
        lines += _backend_findings(device)
    lines.append(_page_faults())
    return lines


def _page_faults() -> Finding:
    """Whether fresh memory for a CPU tensor costs more than writing to it."""
    measured = fresh_memory()
    text = f"32 MiB take {measured.fresh:.1f} ms to fill in a fresh tensor, {measured.warm:.1f} in one that is there"
    advice = ": training on the CPU, call ckpt_kernels.memory.keep_freed_memory() once" if measured.is_slow else ""
    return Finding("page faults", text + advice)


def report() -> tuple[str, bool]:
    """The report as text, and whether there is no problem."""
    all_findings = findings()
    width = max(len(finding.subject) for finding in all_findings)
    lines = [
        f"{'!' if finding.problem else ' '} {finding.subject:<{width}}  {finding.text}".rstrip()
        for finding in all_findings
    ]
    well = not any(finding.problem for finding in all_findings)
    lines.append("all is well" if well else "not all is well: see the lines marked !")
    return "\n".join(lines), well

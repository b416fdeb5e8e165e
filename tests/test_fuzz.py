"""Random calls of every public function: right results or the right type of error, and unchanged operands.

`python -m tests.fuzz --seconds 600` draws calls for 600 seconds.
"""

from dataclasses import replace

import hypothesis
import torch
from torch import Tensor

from .calls import CHANNELS, Call, calls
from .conftest import serving

# The automatic choice, because not every backend can serve tensors of the device "meta".
SERVING = "auto"
EXAMPLES = 400
RUNNING = ("running_mean", "running_var")
# Activations whose slope jumps. If a rounding decides on which side an element is, its gradient is off by the jump.
JUMPS = frozenset(("relu", "leaky_relu", "relu6", "hardtanh", "hardswish"))
# Further names of arguments in errors: `rotary_qk` calls `rotary`, whose errors have the names of its own arguments.
ALIASES = {"rotary_qk": ("input", "weight", "bias")}


def outcome(call: Call, backend: str) -> tuple[dict[str, Tensor], Exception | None]:
    """Outputs, gradients and running statistics, or the error. Errors of other types are not caught."""
    running = {name: call.arguments[name] for name in RUNNING if isinstance(call.arguments.get(name), Tensor)}
    own = {name: value.clone() for name, value in running.items()}
    call = replace(call, arguments=call.arguments | own)
    torch.manual_seed(0)
    with serving(backend):
        try:
            outputs = call()
        except (RuntimeError, ValueError, TypeError) as error:
            for name, value in own.items():
                assert same(value, running[name]), f"{name} has changed in a call that failed"
            return {}, error
        found = {f"output {i}": y.detach() for i, y in enumerate(outputs)} | {n: t.detach() for n, t in own.items()}
        graph = [y for y in outputs if y.requires_grad]
        sources = {name: t for name, t in call.tensors().items() if t.requires_grad}
        if graph and sources:
            generator = torch.Generator().manual_seed(1)
            incoming = [torch.randn(y.shape, generator=generator).to(y.dtype).to(y.device) for y in graph]
            if call.columns % 2:
                incoming = [torch.ones((), device=y.device, dtype=y.dtype).expand(y.shape) for y in graph]
            gradients = torch.autograd.grad(graph, list(sources.values()), incoming, allow_unused=True)
            found |= {f"grad {name}": g for name, g in zip(sources, gradients, strict=True) if g is not None}
    return found, None


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, where NaN equals NaN; for tensors without values, whether their shapes are."""
    if a.shape != b.shape or a.device.type == "meta" or a.layout != torch.strided:
        return a.shape == b.shape
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def in_float64(call: Call) -> Call:
    return call.with_tensors(lambda t: t.detach().double().requires_grad_(t.requires_grad))


def check(call: Call) -> None:
    """Asserts that the serving backend and the reference give the same results or the same error."""
    before = {name: (t.detach().clone(), t._version) for name, t in call.tensors().items()}
    found, failed = outcome(call, SERVING)
    for name, t in call.tensors().items():
        assert t._version == before[name][1] and same(t.detach(), before[name][0]), f"{name} has changed"
    expected, refused = outcome(call, "reference")
    if failed or refused:
        assert type(failed) is type(refused) and str(failed) == str(refused), (failed, refused)
        names = (*call.arguments, *ALIASES.get(call.function, ()))
        assert any(name in str(failed) for name in names), f"names no argument: {failed}"
        return
    assert {n: (t.shape, t.dtype) for n, t in found.items()} == {n: (t.shape, t.dtype) for n, t in expected.items()}
    # Statistics of rows with few columns, and of channels with few values, amplify a rounding beyond any bound.
    amplified = call.columns < 5 or call.function in CHANNELS
    if call.nonsense or call.special or amplified:
        return
    truth, _ = outcome(in_float64(call), "reference")
    for name, value in found.items():
        if not value.numel():
            continue
        true, theirs, ours = (t[name].double() for t in (truth, expected, found))
        inside = true.abs() < torch.finfo(value.dtype).max / 16
        # Results are as exact as the coarsest dtype among the result and the operands.
        coarsest = max(torch.finfo(t.dtype).eps for t in (value, *call.tensors().values()))
        ulp = coarsest * (1 + true[inside].abs().amax() if inside.any() else 1)
        if value.dtype == torch.float64:
            # The truth is the reference itself in the same precision, so more roundings are allowed.
            ulp *= 64
        errors = torch.where(inside, ours - true, 0).abs().flatten()
        if name.startswith("grad") and not JUMPS.isdisjoint(map(call.arguments.get, ("activation", "pre_activation"))):
            errors = errors.sort().values[: -(1 + len(errors) // 200)]
        allowed = 4 * torch.where(inside, theirs - true, 0).abs().amax() + 4 * ulp
        worst = max(errors.tolist(), default=0.0)
        assert worst <= allowed, f"{name} errs by {worst:.2e}, the reference by {(theirs - true).abs().max():.2e}"


@hypothesis.settings(max_examples=EXAMPLES, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(calls())
def test_random_calls(call: Call) -> None:
    check(call)

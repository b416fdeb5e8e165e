"""python -m tools.polynomials: finds the polynomials of csrc/cpu/polynomials.h, and measures those in use.

For each polynomial it prints

- the coefficients that Remez's exchange algorithm finds in float64, rounded to float32, beside those in use;
- the greatest relative error over the range: of the polynomial found, of the same with its coefficients rounded to
  float32, and of the one in use, all three evaluated in float64;
- the greatest error of the function that uses the polynomial, in units in the last place of the true result, where
  every operation rounds to float32: once with fused multiply-adds, as AVX2 and AVX-512 compute, once without.
"""

import itertools
import math
import pathlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

ROOT = pathlib.Path(__file__).parent.parent
HEADER = ROOT / "csrc" / "cpu" / "polynomials.h"
TRITON = ROOT / "ckpt_kernels" / "backends" / "triton" / "elementary.py"

Function = Callable[[Tensor], Tensor]
MultiplyAdd = Callable[[Tensor | float, Tensor | float, Tensor | float], Tensor]


@dataclass(frozen=True)
class Polynomial:
    """A polynomial p of `degree` that approximates `target` over [low, high], and the function that uses p.

    Of all such polynomials with the `fixed` coefficients (by power), p is the one whose greatest |p - target| * weight
    is least. `float32(x, coefficients, multiply_add)` computes the function in float32 for `arguments`; `truth` is the
    function in float64. The coefficients in use are those `written` under `name`: an array of csrc/cpu/polynomials.h
    without the `fixed` ones, or those of the Triton function.
    """

    name: str
    target: Function
    weight: Function
    low: float
    high: float
    degree: int
    float32: Callable[[Tensor, Sequence[float], MultiplyAdd], Tensor]
    truth: Function
    arguments: tuple[float, float]
    fixed: dict[int, float] = field(default_factory=dict)
    written: Callable[[str], list[float]] = lambda name: coefficients(name)

    def in_use(self) -> list[float]:
        """The coefficients by rising powers, as the compiler rounds them to float32."""
        return [*self.fixed.values(), *rounded(self.written(self.name))]


def coefficients(name: str) -> list[float]:
    """The literals of an array of csrc/cpu/polynomials.h."""
    listed = re.search(rf"float {name}\[\] = \{{(.*?)\}};", HEADER.read_text(), re.DOTALL)
    if listed is None:
        raise ValueError(f"{HEADER} has no array {name}")
    return [float(literal) for literal in re.findall(r"(-?[\d.]+)f", listed.group(1))]


def rounded(values: Sequence[float]) -> list[float]:
    return torch.tensor(values, dtype=torch.float64).float().tolist()


def remez(p: Polynomial, points: int = 20_001, rounds: int = 50) -> list[float]:
    """The coefficients of the best polynomial on a grid of `points` Chebyshev points, by Remez's exchange algorithm.

    Each round finds the polynomial whose weighted error has one size and alternating signs at as many points as there
    are unknowns, then moves each point to the greatest error within the stretch of one sign.
    """
    grid = p.low + (p.high - p.low) * 0.5 * (1 - torch.linspace(0, math.pi, points, dtype=torch.float64).cos())
    powers = [k for k in range(p.degree + 1) if k not in p.fixed]
    weight = p.weight(grid)
    goal = p.target(grid) - sum((c * grid**k for k, c in p.fixed.items()), torch.zeros_like(grid))
    basis = torch.stack([grid**k for k in powers], 1)
    chosen = torch.linspace(0, points - 1, len(powers) + 1).round().long()
    signs = torch.tensor([(-1.0) ** i for i in range(len(powers) + 1)], dtype=torch.float64)
    found, least = None, math.inf
    for _ in range(rounds):
        system = torch.cat([basis[chosen], (signs / weight[chosen])[:, None]], 1)
        solution = torch.linalg.solve(system, goal[chosen])[:-1]
        error = weight * (basis @ solution - goal)
        greatest = float(error.abs().max())
        if greatest < least:
            found, least = solution.tolist(), greatest
        extremes = extremes_by_sign(error)
        while len(extremes) > len(signs):
            extremes.pop(0 if error[extremes[0]].abs() < error[extremes[-1]].abs() else -1)
        if len(extremes) < len(signs) or extremes == chosen.tolist():
            break
        chosen = torch.tensor(extremes)
    by_power = p.fixed | dict(zip(powers, found, strict=True))
    return [by_power[k] for k in range(p.degree + 1)]


def extremes_by_sign(error: Tensor) -> list[int]:
    """The places of the greatest |error| in each stretch in which the error has one sign."""
    negative = error < 0
    changes = (negative[1:] != negative[:-1]).nonzero().flatten() + 1
    edges = [0, *changes.tolist(), len(error)]
    return [begin + int(error[begin:end].abs().argmax()) for begin, end in itertools.pairwise(edges)]


def greatest_error(p: Polynomial, values: Sequence[float], points: int = 100_001) -> float:
    """The greatest weighted error of a polynomial that is evaluated in float64."""
    x = torch.linspace(p.low, p.high, points, dtype=torch.float64)
    return float((p.weight(x) * (horner(values, x, in_float64) - p.target(x))).abs().max())


def greatest_ulp(p: Polynomial, multiply_add: MultiplyAdd, points: int = 2_000_001) -> float:
    """The greatest error of the function in float32, in units in the last place of the true result."""
    x = torch.linspace(*p.arguments, points, dtype=torch.float64).float()
    truth = p.truth(x.double())
    ulp = torch.exp2(truth.abs().log2().floor() - 23)
    found = p.float32(x, p.written(p.name), multiply_add).double()
    inside = truth.abs() >= torch.finfo(torch.float32).tiny
    return float(((found - truth).abs() / ulp)[inside].max())


def in_float64(a: Tensor | float, b: Tensor | float, c: Tensor | float) -> Tensor:
    return a * b + c


def fused(a: Tensor | float, b: Tensor | float, c: Tensor | float) -> Tensor:
    """a * b + c in float32, rounded once (twice if float64 cannot hold the sum, which hardly changes the result)."""
    a, b, c = (torch.as_tensor(x, dtype=torch.float32).double() for x in (a, b, c))
    return (a * b + c).float()


def separate(a: Tensor | float, b: Tensor | float, c: Tensor | float) -> Tensor:
    """a * b + c in float32, rounded after the product and after the sum."""
    a, b, c = (torch.as_tensor(x, dtype=torch.float32) for x in (a, b, c))
    return a * b + c


def horner(values: Sequence[float], x: Tensor, multiply_add: MultiplyAdd) -> Tensor:
    result = torch.full_like(x, values[-1])
    for value in reversed(values[:-1]):
        result = multiply_add(result, x, value)
    return result


# The functions of csrc/cpu/vec_math.h on the polynomials, one float32 operation at a time.


def _expm1_of_rest(x: Tensor, values: Sequence[float], multiply_add: MultiplyAdd) -> tuple[Tensor, Tensor]:
    n = (x * 1.44269504088896341).round()
    r = multiply_add(n, 2.12194440e-4, multiply_add(n, -0.693359375, x))
    q = horner(values, r, multiply_add)
    return n, multiply_add(q * r, r, r)


def _exp(x: Tensor, values: Sequence[float], multiply_add: MultiplyAdd) -> Tensor:
    n, f = _expm1_of_rest(x, values, multiply_add)
    return torch.ldexp((1 + f).double(), n.double()).float()


def _expm1(x: Tensor, values: Sequence[float], multiply_add: MultiplyAdd) -> Tensor:
    n, f = _expm1_of_rest(x, values, multiply_add)
    power = torch.exp2(n)
    return multiply_add(power, f, power - 1)


def _exp2(x: Tensor, values: Sequence[float], multiply_add: MultiplyAdd) -> Tensor:
    fraction = x - x.floor()
    m = multiply_add(horner(values, fraction, multiply_add), fraction, 1.0)
    return torch.ldexp(m.double(), x.floor().double()).float()


def _rough_exp2(x: Tensor, values: Sequence[float], multiply_add: MultiplyAdd) -> Tensor:
    m = horner(values, x - x.floor(), multiply_add)
    return torch.ldexp(m.double(), x.floor().double()).float()


def _log1p(x: Tensor, values: Sequence[float], multiply_add: MultiplyAdd) -> Tensor:
    s = x / (2 + x)
    z = s * s
    return multiply_add((s + s) * z, horner(values, z, multiply_add), s + s)


def _normal_tail(a: Tensor, values: Sequence[float], multiply_add: MultiplyAdd) -> Tensor:
    ka = 0.33 * a
    return horner(values, ka / (1 + ka), multiply_add)


def _rough_normal_tail(a: Tensor, values: Sequence[float], multiply_add: MultiplyAdd) -> Tensor:
    return horner(values, 1 / multiply_add(0.33, a, 1.0), multiply_add)


# Targets in float64. Near 0, where a difference would cancel, the target is a series.


def _expm1_target(r: Tensor) -> Tensor:
    series = sum(r**k / math.factorial(k + 2) for k in range(12))
    return torch.where(r.abs() < 1e-2, series, (torch.expm1(r) - r) / (r * r))


def _exp2_target(r: Tensor) -> Tensor:
    return torch.exp2(r)


def _log1p_target(z: Tensor) -> Tensor:
    return sum(z**k / (2 * k + 3) for k in range(30))


def _tail_over_bell(a: Tensor) -> Tensor:
    return 0.5 * torch.special.erfcx(a / math.sqrt(2))


def _tail_by_s(s: Tensor) -> Tensor:
    return _tail_over_bell(s / (0.33 * (1 - s)))


def _tail_by_t(t: Tensor) -> Tensor:
    return _tail_over_bell((1 / t - 1) / 0.33)


def _tail(a: Tensor) -> Tensor:
    return 0.5 * torch.special.erfc(a / math.sqrt(2))


def _log2_tail(a: Tensor) -> Tensor:
    return torch.log2(torch.special.erfcx(a / math.sqrt(2))) - 1 - a * a / (2 * math.log(2))


def _relative(target: Function) -> Function:
    return lambda x: 1 / target(x).abs()


_HALF = math.log(2) / 2
_EXPM1 = (_expm1_target, _relative(_expm1_target), -_HALF, _HALF, 4)

# exp and expm1 share a polynomial.
POLYNOMIALS = {
    "exp": Polynomial("expm1_coefficients", *_EXPM1, _exp, torch.exp, (-87.0, 88.0)),
    "expm1": Polynomial("expm1_coefficients", *_EXPM1, _expm1, torch.expm1, (-2.0, -1e-6)),
    "exp2": Polynomial(
        "exp2_coefficients",
        _exp2_target,
        _relative(_exp2_target),
        0,
        1,
        6,
        _exp2,
        torch.exp2,
        (-126.0, 127.9),
        {0: 1.0},
    ),
    "rough exp2": Polynomial(
        "rough_exp2_coefficients",
        _exp2_target,
        _relative(_exp2_target),
        0,
        1,
        4,
        _rough_exp2,
        torch.exp2,
        (-126.0, 127.9),
    ),
    "log1p": Polynomial(
        "log1p_coefficients", _log1p_target, _relative(_log1p_target), 0, 1 / 9, 4, _log1p, torch.log1p, (1e-6, 1.0)
    ),
    "normal tail": Polynomial(
        "normal_tail_coefficients",
        _tail_by_s,
        _relative(_tail_by_s),
        0,
        0.33 * 14.5 / (1 + 0.33 * 14.5),
        9,
        _normal_tail,
        _tail_over_bell,
        (0.0, 14.5),
    ),
    "rough normal tail": Polynomial(
        "rough_normal_tail_coefficients",
        _tail_by_t,
        _relative(_tail_by_t),
        1 / (1 + 0.33 * 14),
        1,
        5,
        _rough_normal_tail,
        _tail_over_bell,
        (0.0, 14.0),
    ),
}


def tritons(function: str) -> list[float]:
    """The coefficients of Horner's rule in a Triton function, by rising powers, without the constant one."""
    body = TRITON.read_text().partition(f"def {function}(")[2].partition("\n@triton.jit")[0]
    first, *rest = re.findall(r"^    p = (.*)$", body, re.MULTILINE)
    signed = [first.partition(" *")[0], *(line.replace(" ", "") for line in (first, *rest))]
    falling = [float(re.search(r"[+-]?[\d.]+(?:e-\d+)?$", text)[0]) for text in signed]
    return falling[-2::-1]


# Triton's polynomials for the value and the slope of gelu: the error is relative where the result is the tail itself,
# and absolute where the tail is added.
LOG2_NORMAL_TAIL = Polynomial(
    "normal_cdf",
    _log2_tail,
    lambda a: _tail(a) + 0.004,
    0,
    6,
    10,
    lambda a, values, multiply_add: torch.exp2(horner([-1.0, *values], a, multiply_add)),
    _tail,
    (0.0, 6.0),
    {0: -1.0},
    tritons,
)
# The same for results of 16 bits, relative to the tail everywhere.
ROUGH_LOG2_NORMAL_TAIL = replace(LOG2_NORMAL_TAIL, name="rough_normal_cdf", weight=torch.ones_like, degree=7)
# The far tail, of probabilities below 1e-9, is less accurate than the rest.
POLYNOMIALS["normal tail up to 6"] = replace(POLYNOMIALS["normal tail"], arguments=(0.0, 6.0))

_TRITONS = {"Triton's normal tail": LOG2_NORMAL_TAIL, "Triton's rough normal tail": ROUGH_LOG2_NORMAL_TAIL}


def main() -> None:
    for function, p in (POLYNOMIALS | _TRITONS).items():
        found, used = remez(p), p.in_use()
        print(f"{function}: {p.name}, degree {p.degree}, over [{p.low:.4g}, {p.high:.4g}]")
        for power, (ours, theirs) in enumerate(zip(rounded(found), used, strict=True)):
            print(f"  {power}  found {ours:+.9e}  in use {theirs:+.9e}  apart {abs(ours - theirs) / abs(theirs):.0e}")
        errors = [math.log2(greatest_error(p, values)) for values in (found, rounded(found), used)]
        print("  greatest relative error: found 2^{:.2f}, rounded 2^{:.2f}, in use 2^{:.2f}".format(*errors))
        ulps = greatest_ulp(p, fused), greatest_ulp(p, separate)
        print(f"  over {list(p.arguments)} in float32: {ulps[0]:.2f} ulp fused, {ulps[1]:.2f} ulp separate")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

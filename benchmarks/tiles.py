"""`python -m benchmarks.tiles`: the peak and the time of a step of a gated MLP at "all", by the number of tiles."""

import argparse
import statistics
import time

import torch

from ckpt_kernels.cli_arguments import device, positive
from ckpt_kernels.memory import peak_bytes
from ckpt_kernels.nn import GatedMLP


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tiles", description=__doc__)
    parser.add_argument("--tokens", type=positive, default=8192)
    parser.add_argument("--width", type=positive, default=256)
    parser.add_argument("--inner", type=positive, default=768)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--turns", type=positive, default=5)
    given = parser.parse_args()
    dtype = getattr(torch, given.dtype)
    tiles = (1, 2, 4, 8, 16)
    mlps = {n: GatedMLP(given.width, given.inner, recompute="all", tiles=n).to(given.device, dtype) for n in tiles}
    x = torch.randn(given.tokens, given.width, device=given.device, dtype=dtype, requires_grad=True)
    above = torch.randn_like(x)

    def step(mlp: GatedMLP) -> float:
        mlp.zero_grad()
        x.grad = None
        begin = time.perf_counter()
        mlp(x).backward(above)
        if x.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    times: dict[int, list[float]] = {n: [] for n in tiles}
    for turn in range(given.turns + 1):
        for n, mlp in mlps.items():
            seconds = step(mlp)
            if turn:
                times[n].append(seconds)
    inner = given.tokens * given.inner * x.element_size()
    print(f"{'tiles':>5} {'peak, MiB':>10} {'in inner tensors':>17} {'step, ms':>9}")
    for n, mlp in mlps.items():
        peak = peak_bytes(lambda mlp=mlp: step(mlp), given.device)
        print(f"{n:5} {peak / 2**20:10.1f} {peak / inner:17.2f} {1e3 * statistics.median(times[n]):9.1f}")


if __name__ == "__main__":
    main()

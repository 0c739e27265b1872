"""The two products of the fast path that change with the layout: gᵀ h and g B, each as written and turned round.

.venv/bin/python benchmarks/narrow_products.py
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

ROUNDS = 40


def main(
    tokens: Annotated[int, typer.Option(help="N.")] = 2048,
    width: Annotated[int, typer.Option(help="Outputs of the layer.")] = 384,
) -> None:
    """Print how long each takes, by rank."""
    table = Table("rank", "gᵀ h, µs", "(hᵀ g)ᵀ, µs", "g B, µs", "g B, B by columns, µs")
    for r in (1, 2, 4, 8, 15, 16, 32, 64):
        table.add_row(str(r), *(f"{seconds * 1e6:.0f}" for seconds in timed(products(tokens, width, r))))
    Console().print(table)


def products(tokens: int, width: int, r: int) -> list[Callable[[], Tensor]]:
    g, h, B = torch.randn(tokens, width), torch.randn(tokens, r), torch.randn(width, r)
    return [lambda: g.t() @ h, lambda: (h.t() @ g).t(), lambda: g @ B, lambda: g @ B.t().contiguous().t()]


def timed(calls: list[Callable[[], Tensor]]) -> list[float]:
    """Median seconds of each; in turn, with the caches cold, as they are in a model."""
    others = torch.randn(2_000_000)
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for call, seconds in zip(calls, found, strict=True):
            others.mul_(1.0)
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    return [median(seconds) for seconds in found]


if __name__ == "__main__":
    typer.run(main)

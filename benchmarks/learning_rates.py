"""Every method at its best learning rate: the demo's task and length, one small grid for all.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/learning_rates.py

Trains each method with each rate (runs/rates/TASK-rR-METHOD-RATE-SEED, finished runs are kept) and prints a table: the
task's metric, then ranks and parameters of the best run. One seed: what is closer than the standard error of the metric
is not told apart. The number of threads changes the last digits of sums, and so the runs."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from planted import finished

from increlora.registry import METHODS
from increlora.workbench.cli.settings import TrainSettings


def main(
    r: Annotated[int, typer.Option(help="As in `increlora train`.")] = 2,
    rates: Annotated[str, typer.Option(help="Peak learning rates.")] = "5e-4,1e-3,2e-3",
    methods: Annotated[str, typer.Option(help="Names with commas between.")] = ",".join(METHODS),
    task: Annotated[str, typer.Option(help="As in `increlora train`.")] = "stdlib-docs",
    seed: Annotated[int, typer.Option(help="The same for all.")] = 0,
    out: Annotated[Path, typer.Option(help="Where the runs go.")] = Path("runs/rates"),
) -> None:
    """Train what is missing, and print the table."""
    print("| method | learning rate: result | ranks | parameters peak / average / end |")
    print("| --- | --- | --- | --- |")
    grid = rates.split(",")
    for method in methods.split(","):
        settings = [TrainSettings(method=method, task=task, r=r, lr=float(rate), seed=seed) for rate in grid]
        runs = [finished(out, f"{task} r{r} {method} {rate}", s) for rate, s in zip(grid, settings, strict=True)]
        print(row(method, grid, [json.loads((run / "run.json").read_text()) for run in runs]), flush=True)


def row(method: str, grid: list[str], states: list[dict[str, Any]]) -> str:
    """Metric of each run, the best in bold; ranks and parameters of that one. A run without a number has diverged."""
    values = [state["metric"]["after"] for state in states]
    sign = 1 if states[0]["metric"]["higher_is_better"] else -1
    best = max((i for i, v in enumerate(values) if v is not None), key=lambda i: sign * values[i], default=0)
    shown = ["diverged" if v is None else f"**{v:.3f}**" if i == best else f"{v:.3f}" for i, v in enumerate(values)]
    cell = " · ".join(f"{rate}: {value}" for rate, value in zip(grid, shown, strict=True))
    budget = states[best]["budget"]
    target = "" if budget["ranks_target"] is None else f" of {budget['ranks_target']}"
    parameters = " / ".join(f"{budget[f'parameters_{when}']:,.0f}" for when in ("peak", "average", "used"))
    return f"| {method} | {cell} | {budget['ranks_used']}{target} | {parameters} |"


if __name__ == "__main__":
    typer.run(main)

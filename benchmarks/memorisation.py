"""What rank buys: the share of 100 random pairs (task `uuid`) that each method has by heart, as its run goes on.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/memorisation.py --methods lora --ranks 2,8,32
    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/memorisation.py --methods lora,melora --ranks 8 --seeds 3

Trains each method at each rank with each rate and seed (runs/uuid/TASK-N-METHOD-rR-RATE-SEED, finished runs are kept)
and prints a row per rate: accuracy in percent after 30, 50, 70 and 90 % of the steps, mean and range over the seeds.
Bold is the rate whose mean over these four points is highest: methods differ in how fast they rise. If it stands at an
end of its grid, the grid is too narrow. Equal r is equal trained parameters where a method promises that; a column
says. A run takes about a minute on one free core.

Protocol: MoRA, section 3.2 (100 epochs of ten steps, warm-up, linear decay, no weight decay, loss on all tokens;
`--task uuid/value` for the value alone), with rates for this small net. This file is not called uuid.py: scripts of
this folder would import it instead of Python's own module."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from planted import finished, read_state, spread

from increlora.workbench.cli.settings import TrainSettings
from increlora.workbench.runs import RunFolder

POINTS = (30, 50, 70, 90)  # percent of the run
RATES = "2.5e-3,5e-3,1e-2"
EPOCHS, STEPS_PER_EPOCH = 100, 10


def main(
    methods: Annotated[str, typer.Option(help="Names with commas between.")] = "lora",
    ranks: Annotated[str, typer.Option(help="Values of r.")] = "8",
    rates: Annotated[str, typer.Option(help="Peak learning rates.")] = RATES,
    seeds: Annotated[int, typer.Option(help="Seeds 0, 1, … of pairs, adapter and order.")] = 1,
    pairs: Annotated[int, typer.Option(help="To learn by heart.")] = 100,
    task: Annotated[str, typer.Option(help="uuid, or uuid/value.")] = "uuid",
    out: Annotated[Path, typer.Option(help="Where the runs go.")] = Path("runs/uuid"),
) -> None:
    """Train what is missing, and print the table."""
    print(f"| method | r | parameters | rate | {' | '.join(f'{point} %' for point in POINTS)} |\n{'| --- ' * 8}|")
    floors: set[float] = set()
    for method in methods.split(","):
        for r in map(int, ranks.split(",")):
            grid = rates.split(",")
            cases = [[settings(method, task, pairs, r=r, lr=float(lr), seed=s) for s in range(seeds)] for lr in grid]
            runs = [
                [finished(out, f"{task} {pairs} {method} r{r} {lr}", case) for case in row]
                for lr, row in zip(grid, cases, strict=True)
            ]
            floors |= {read_state(run)["metric"]["baseline"] for row in runs for run in row}
            for line in lines(grid, runs):
                print(f"| {method} | {r} | {line}", flush=True)
    guess = shown([100 * floor for floor in floors])
    print(f"\nBest constant guess: {guess} %. What is not above it, counts for nothing.")


def settings(method: str, task: str, pairs: int, **own: Any) -> TrainSettings:
    """A run of the protocol: ten steps an epoch, measured every tenth of it."""
    return TrainSettings(
        method=method, task=task, max_train_samples=pairs, batch_size=-(-pairs // STEPS_PER_EPOCH), epochs=EPOCHS,
        lr_warmup=0.1, weight_decay=0.0, evaluations=10, **own,
    )  # fmt: skip


def lines(grid: list[str], runs: list[list[Path]]) -> list[str]:
    """Parameters, rate and accuracies of every rate, the best one in bold."""
    curves = [[curve(run) for run in row] for row in runs]
    height = [statistics.mean(value for one in row for value in one) for row in curves]
    found = []
    for rate, row, case, mine in zip(grid, curves, runs, height, strict=True):
        cells = [shown(values) for values in zip(*row, strict=True)]
        cells = [f"**{cell}**" for cell in cells] if mine == max(height) else cells
        parameters = statistics.mean(read_state(run)["budget"]["parameters_used"] for run in case)
        found.append(f"{parameters:,.0f} | {rate} | {' | '.join(cells)} |")
    return found


def shown(values: Sequence[float]) -> str:
    return spread(values, "{:.1f}") if len(values) > 1 else f"{values[0]:.1f}"


def curve(run: Path) -> list[float]:
    """Accuracy in percent at each of POINTS."""
    rows = [row for row in RunFolder(run).rows("metrics.jsonl") if "accuracy" in row]
    last = rows[-1]["step"]
    return [100 * next(row["accuracy"] for row in rows if row["step"] * 100 >= point * last) for point in POINTS]


if __name__ == "__main__":
    typer.run(main)

"""What rank buys: how much of 100 random pairs (task `uuid`) is learnt by heart after 30, 50, 70 and 90 % of a run.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/memorisation.py --methods lora --ranks 2,8,32
    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/memorisation.py --methods lora,mora --ranks 8 --seeds 3

Trains each method at each rank with each rate and seed (runs/uuid/TASK-N-METHOD-rR-RATE-SEED, finished runs are kept)
and prints a row per rate: mean and range of the accuracy over the seeds, in percent; bold is the rate whose accuracy is
highest on average over the four points, since what separates methods is how fast it rises. Equal r is equal trained
parameters where the method promises that; the column tells. A run takes one to two minutes on one core. Best at an end
of its grid: the grid is too narrow. Protocol: MoRA, section 3.2 (100 epochs of ten steps, warm-up of a tenth, linear
decay, no weight decay, loss on all tokens; `--task uuid/value` for the value alone). The file is not called uuid.py,
which would stand before Python's own module of that name for every script of this folder."""

import statistics
from pathlib import Path
from typing import Annotated, Any

import typer
from planted import finished, read_state, spread

from increlora.cli.settings import TrainSettings
from increlora.runs import RunFolder

POINTS = (30, 50, 70, 90)  # percent of the run
RATES = "5e-3,1e-2,2e-2"
OWN_RATES = {"mora": "2.5e-3,5e-3,1e-2"}  # the paper sweeps {1, 2, 3} for LoRA and {0.5, 1, 2} for MoRA
EPOCHS, STEPS_PER_EPOCH = 100, 10


def main(
    methods: Annotated[str, typer.Option(help="Names with commas between.")] = "lora",
    ranks: Annotated[str, typer.Option(help="Values of r.")] = "8",
    rates: Annotated[str | None, typer.Option(help="Peak learning rates of all methods.")] = None,
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
            grid = (rates or OWN_RATES.get(method, RATES)).split(",")
            cases = [[settings(method, task, pairs, r=r, lr=float(lr), seed=s) for s in range(seeds)] for lr in grid]
            runs = [
                [finished(out, f"{task} {pairs} {method} r{r} {lr}", case) for case in row]
                for lr, row in zip(grid, cases, strict=True)
            ]
            floors |= {read_state(run)["metric"]["baseline"] for row in runs for run in row}
            for line in lines(grid, runs):
                print(f"| {method} | {r} | {line}", flush=True)
    guess = spread([100 * floor for floor in sorted(floors)], "{:.1f}")
    print(f"\nBest constant guess: {guess} %. Below it nothing counts.")


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
        cells = [spread(values, "{:.1f}") for values in zip(*row, strict=True)]
        shown = [f"**{cell}**" for cell in cells] if mine == max(height) else cells
        parameters = statistics.mean(read_state(run)["budget"]["parameters_used"] for run in case)
        found.append(f"{parameters:,.0f} | {rate} | {' | '.join(shown)} |")
    return found


def curve(run: Path) -> list[float]:
    """Accuracy in percent at each of POINTS; 0 where the run had diverged."""
    rows = [row for row in RunFolder(run).rows("metrics.jsonl") if "accuracy" in row]
    last = rows[-1]["step"]
    return [100 * next(row["accuracy"] for row in rows if row["step"] * 100 >= point * last) for point in POINTS]


if __name__ == "__main__":
    typer.run(main)

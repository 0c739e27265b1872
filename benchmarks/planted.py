"""Who finds the plant? Every method on task `planted`, beside uniform ranks and the planted ranks themselves.

    .venv/bin/python benchmarks/planted.py --seeds 4

Trains each row of ROWS with each seed (runs/planted/ROW-SEED, finished runs are kept) and prints a table: mean and
range over the seeds. All rows have the same budget, data, learning rate and number of steps."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from increlora.workbench.cli.run import train
from increlora.workbench.cli.settings import TrainSettings, parse_options
from increlora.workbench.runs import RunFolder
from increlora.workbench.tasks.planted import planted_ranks

R, ALPHA = 2, 8
PAPER_ADALORA = {"warmup_steps": 100, "interval_steps": 10, "settle_steps": 410, "lora_alpha": ALPHA}  # short run
REACHED = 0.1  # "learnt": a tenth of the untrained distance to the teacher


def fixed(method: str, **settings: Any) -> Callable[[int], dict[str, Any]]:
    return lambda seed: {"method": method, **settings}


def oracle(seed: int) -> dict[str, Any]:
    """LoRA with the planted ranks from the start, at the scale of the others."""
    ranks = {name: rank for name, rank in planted_ranks(seed).items() if rank}
    alphas = {name: ALPHA / R * rank for name, rank in ranks.items()}
    options = {"rank_pattern": ranks, "alpha_pattern": alphas}
    return {"method": "lora", "target_modules": ",".join(ranks), "options": options}


ROWS: Mapping[str, Callable[[int], dict[str, Any]]] = {
    "uniform (LoRA)": fixed("lora"),
    "IncreLoRA": fixed("increlora"),
    "IncreLoRA, paper preset": fixed("increlora", preset="paper"),
    "AdaLoRA": fixed("adalora"),
    "AdaLoRA, paper preset": fixed("adalora", preset="paper", options=PAPER_ADALORA),
    "SoRA": fixed("sora"),
    "PRILoRA": fixed("prilora"),
    "planted ranks (oracle)": oracle,
}


def main(
    seeds: Annotated[int, typer.Option(help="Seeds 0, 1, … of net, plant and data.")] = 4,
    epochs: Annotated[float, typer.Option(help="Of 128 steps each.")] = 8.0,
    lr: Annotated[float, typer.Option(help="Peak learning rate, the same for all.")] = 5e-3,
    out: Annotated[Path, typer.Option(help="Where the runs go.")] = Path("runs/planted"),
    only: Annotated[str, typer.Option(help="Rows whose name contains this.")] = "",
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value: an option of these rows' method.")] = None,
) -> None:
    """Train what is missing, and print the table."""
    print("| ranks by | excess loss | recovery | steps to excess 0.1 | parameters average / end |")
    print("| --- | --- | --- | --- | --- |")
    for row, settings in ROWS.items():
        if only in row:
            label = " ".join([row, *(set_ or [])])
            shared = {"task": "planted", "r": R, "epochs": epochs, "lr": lr, "batch_size": 64, "evaluations": 64}
            runs = [finished(out, label, chosen(shared | settings(s) | {"seed": s}, set_ or [])) for s in range(seeds)]
            print(table_row(label, runs), flush=True)


def chosen(settings: dict[str, Any], pairs: Sequence[str]) -> TrainSettings:
    options = {**settings.pop("options", {}), **parse_options(settings["method"], pairs, settings.get("preset"))}
    return TrainSettings(**settings, options=options)


def finished(out: Path, row: str, settings: TrainSettings) -> Path:
    """The folder of a finished run with these settings; trained now if it is not there."""
    name = "".join(c if c.isalnum() else "-" for c in row)
    folder = RunFolder(out / f"{name}-{settings.seed}")
    state = folder.state()
    same = state is not None and state["run_info"]["train_config"] == json.loads(json.dumps(asdict(settings)))
    if state is None or state["status"] != "finished" or not same:
        train(settings, folder, Console(quiet=True), resume=False, overwrite=True)
    return folder.path


def table_row(name: str, runs: Sequence[Path]) -> str:
    states = [read_state(run) for run in runs]
    budgets = [state["budget"] for state in states]
    cells = [
        spread([state["metrics"]["after"]["excess_loss"] for state in states], "{:.4f}"),
        spread([state["metrics"]["after"]["recovery"] for state in states], "{:.2f}"),
        spread([reached(run) for run in runs], "{:.0f}"),
        f"{statistics.mean(b['parameters_average'] for b in budgets):,.0f} / "
        f"{statistics.mean(b['parameters_used'] for b in budgets):,.0f}",
    ]
    return f"| {name} | {' | '.join(cells)} |"


def read_state(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


def reached(run: Path) -> float:
    """First measured step with an excess loss of at most REACHED; infinite if none."""
    rows = RunFolder(run).rows("metrics.jsonl")
    return next((row["step"] for row in rows if row.get("excess_loss", 1.0) <= REACHED), float("inf"))


def spread(values: Sequence[float], form: str) -> str:
    """Mean and range."""
    mean, low, high = (form.format(f(values)) for f in (statistics.mean, min, max))
    return f"{mean} ({low} – {high})"


if __name__ == "__main__":
    typer.run(main)

"""The commands; see the package."""

import cProfile
import json
import platform
import pstats
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .curves import CURVES, counts, curve
from .measure import Setting, calls, in_turn, saved_bytes, started, summary
from .subjects import SUBJECTS
from .targets import COMPARISONS, TARGETS, Results
from .workloads import WORKLOADS

app = typer.Typer(add_completion=False, help=__doc__)
console = Console()


def machine() -> dict[str, Any]:
    """Where it was measured, and with what."""
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    chip = next((line.split(":")[1].strip() for line in _cpu_info() if line.startswith("model name")), "unknown")
    return {"cpu": chip, "threads": torch.get_num_threads(), "python": platform.python_version(), **versions}


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


@app.callback(invoke_without_command=True)
def targets(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="File for the numbers.")] = Path("docs/reference/performance.json"),
    only: Annotated[str, typer.Option(help="Comparisons to measure, by commas; others stay in the file.")] = "",
) -> None:
    """Measure every promise of docs/performance.md, print the table and write its numbers."""
    if context.invoked_subcommand is not None:
        return
    chosen = only.split(",") if only else list(COMPARISONS)
    here = machine()  # before the threads are chosen for a comparison
    results: Results = {name: measured(name) for name in chosen}
    before = json.loads(out.read_text()) if only and out.exists() else {"targets": [], "steps": {}}
    rows = {row["what"]: row for row in before["targets"]}
    for target in TARGETS:
        try:
            found = target.find(results)
        except KeyError:  # of a comparison that was not asked for
            continue
        row = {"what": target.what, "bound": target.bound, "at least": target.at_least, "met": target.met(found)}
        rows[target.what] = row | found
        show(rows[target.what])
    steps = before["steps"] | {name: summary(times) for name, times in results.items()}
    order = [rows[target.what] for target in TARGETS if target.what in rows]
    out.write_text(json.dumps({"machine": here, "targets": order, "steps": steps}, indent=1) + "\n")


def measured(name: str) -> Any:
    comparison = COMPARISONS[name]
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(name, total=comparison.setting.steps)
        advance = partial(bar.advance, task)
        return in_turn(comparison.subjects, comparison.setting, advance, every=comparison.every)


def show(row: dict[str, Any]) -> None:
    spread = f" ({row['low']:.3f} – {row['high']:.3f})" if "low" in row else ""
    verdict = "" if row["met"] else "   MISSED"
    sign = "≥" if row["at least"] else "≤"
    console.print(f"{row['what']:<62} {row['ratio']:.3f}{spread}   {sign} {row['bound']}{verdict}", highlight=False)


@app.command()
def curves(
    out: Annotated[Path, typer.Option(help="File for the numbers.")] = Path("docs/reference/performance_curves.json"),
) -> None:
    """Measure how cost grows with model, batch, rank and number of modules; count operations and bytes."""
    found: dict[str, Any] = {"machine": machine(), "counts": counts()}
    for name in CURVES:
        found[name] = []
        for row in curve(name):
            console.print(row)
            found[name].append(row)
            out.write_text(json.dumps(found, indent=1) + "\n")  # a long job keeps what it has


@app.command()
def profile(
    subject: Annotated[str, typer.Option(help="Whom to look at.")] = "IncreLoRA",
    workload: Annotated[str, typer.Option(help="On what; one token, one thread.")] = "chain-1000",
    lines: Annotated[int, typer.Option(help="Functions to print.")] = 30,
) -> None:
    """Where the host's time goes, in five steps at the end of a run; the profiler's own time is in it."""
    torch.set_num_threads(1)
    session = started(subject, Setting(workload, 1, 1, steps=30))
    for _ in range(25):
        session.step()
    with cProfile.Profile() as profiler:
        for _ in range(5):
            session.step()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(lines)


@app.command()
def run(
    workload: Annotated[str, typer.Option(help=f"One of {', '.join(WORKLOADS)}.")] = "minilm",
    subjects: Annotated[str, typer.Option(help=f"By semicolons: {'; '.join(SUBJECTS)}.")] = "floor;peft LoRA;LoRA",
    batch: int = 32, length: int = 64, steps: int = 24, device: str = "cpu", threads: int = 0,
    counts: Annotated[bool, typer.Option(help="Also operations of a step and bytes it keeps.")] = False,
    out: Annotated[Path | None, typer.Option(help="File for the numbers.")] = None,
) -> None:  # fmt: skip
    """Compare any subjects, one step of each in turn."""
    names, setting = subjects.split(";"), Setting(workload, batch, length, steps, device, threads)
    found = summary(in_turn(names, setting))
    table = Table("subject", "phase", "steps", "ms", "quartiles", f"÷ {names[0]}")
    base = found[names[0]]["all"]["median"]
    for name, phases in found.items():
        for phase, row in phases.items():
            quartiles = f"{row['low'] * 1e3:.1f} – {row['high'] * 1e3:.1f}"
            table.add_row(name, phase, str(row["steps"]), f"{row['median'] * 1e3:.1f}", quartiles,
                          f"{row['median'] / base:.3f}")  # fmt: skip
    console.print(table)
    counted = (
        {name: {"calls": calls(name, setting), "saved bytes": saved_bytes(name, setting)} for name in names}
        if counts
        else {}
    )
    for name, row in counted.items():
        console.print(f"{name}: {row['calls']:,} operations a step, {row['saved bytes'] / 2**20:.1f} MiB kept")
    if out is not None:
        out.write_text(json.dumps({"machine": machine(), "steps": found, "counts": counted}, indent=1) + "\n")


if __name__ == "__main__":
    app()

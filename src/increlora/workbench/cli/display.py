"""What a run shows: a live bar in a terminal, a line now and then elsewhere, and the result at the end."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ...naming import rank_rows, span

LINES = 10  # of progress, where there is no terminal
SHADES = ("grey11", "grey19", "grey30", "grey42", "grey54", "grey66", "grey78")  # the more rank, the lighter


class Progression(Progress):
    """Shows steps, loss and the live budget while used as a context."""

    def __init__(self, console: Console, *, total: int, done: int, budget: int | None) -> None:
        columns = TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[news]}")
        super().__init__(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
        self.total, self.budget, self.metric = total, f"/{budget}" if budget else "", ""
        self.task = self.add_task("training", total=total, completed=done, news="")

    def step(self, row: Mapping[str, Any], metric: str) -> None:
        """Show a row of metrics.jsonl."""
        if metric in row:
            self.metric = f"  {metric} {row[metric]:.3f}"
        news = f"loss {row['loss']:.3f}  ranks {row['ranks']}{self.budget}{self.metric}"
        if self.console.is_terminal:
            self.update(self.task, completed=row["step"], news=news)
        elif row["step"] * LINES // self.total > (row["step"] - 1) * LINES // self.total:
            self.console.print(f"step {row['step']}/{self.total}  {news}", highlight=False, soft_wrap=True)


def show_result(console: Console, state: Mapping[str, Any], path: Path) -> None:
    """Metric, time, memory and parameters of a finished run, where the rank went, and where the files are."""
    metric, budget = state["metric"], state["budget"]
    rows = []
    for name, after in sorted(state["metrics"]["after"].items(), key=lambda item: item[0] != metric["name"]):
        best = f" (best {number(metric['best'])})" if name == metric["name"] else ""
        known = state["metrics"]["baseline"].get(name)
        baseline = "" if known is None else f", baseline {number(known)}"
        rows.append((name, f"{number(state['metrics']['before'][name])} → {number(after)}{best}{baseline}"))
    at_end = f"{budget['parameters_used']:,}{of(budget['parameters_target'])} at the end"
    meanwhile = f"{budget['parameters_average']:,.0f} on average, {budget['parameters_peak']:,} at peak"
    rows += [
        ("time", f"{state['seconds']['train']:.0f} s training, {state['seconds']['total']:.0f} s in all"),
        ("memory", f"{state['peak_memory_bytes'] / 2**20:,.0f} MiB at peak"),
        ("ranks", f"{budget['ranks_used']}" + of(budget["ranks_target"])),
        ("parameters", f"{at_end}, {meanwhile}"),
    ]
    console.print(grid(rows))
    console.print(rank_map(state["ranks"]))
    plain = "lora/ (plain LoRA), " if (path / "lora").is_dir() else ""
    console.print(f"written to {path}: adapter/ (native), {plain}run.json", soft_wrap=True)
    if not plain and metric["after"] is None:
        console.print("the run diverged: its ΔW is not finite, and nothing for engines")
    elif not plain:
        console.print(f"its ΔW has no low rank; for engines: increlora export {path} OUT --merge", soft_wrap=True)


def grid(rows: Iterable[tuple[str, ...]]) -> Table:
    """A table without borders; long names are wrapped, never cut."""
    table = Table.grid(padding=(0, 2))
    for row in rows:
        table.add_row(*row)
    for column in table.columns:
        column.overflow = "fold"
    return table


def number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"


def of(target: int | None) -> str:
    return "" if target is None else f" of {target:,}"


def rank_map(ranks: Mapping[str, int]) -> Table:
    """Final ranks as a table layer × module type, shaded by rank; `·` where there is no such module."""
    types, rows = rank_rows(ranks)
    most = max(ranks.values(), default=0)
    table = Table(title="rank per layer and module", title_justify="left")
    for label in ("layer", *types):
        table.add_column(label.replace(".", "\n."), justify="right")
    for layer, cells in rows.items():
        table.add_row(layer, *(shaded(cell, most) for cell in cells))
    return table


def shaded(ranks: list[int], most: int) -> Text:
    if not ranks:
        return Text("·")
    shade = max(ranks) * (len(SHADES) - 1) // max(1, most)
    ink = "white" if shade < len(SHADES) / 2 else "black"
    return Text(f" {span(ranks)} ", style=f"{ink} on {SHADES[shade]}")

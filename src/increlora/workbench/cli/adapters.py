"""Commands on the folder of an adapter: `increlora export`, `increlora check`, `increlora inspect`."""

import warnings
from pathlib import Path
from typing import Literal

import typer
from rich.console import Console
from rich.table import Column, Table
from transformers.utils import logging

from ...errors import ConfigError, ExportError
from ...export.adapters import Adapter, adapter_folder, check_elsewhere, read_adapter
from ...export.engines import ALIASES, ENGINES, EngineReport, check_export
from ...export.lora import export_lora
from ...export.merged import export_merged
from ...hosts.peft.checkpoint import SAFETENSORS_WEIGHTS_NAME, read_contents
from ...hosts.peft.config import CONFIGS
from .. import tasks
from .display import grid, of, rank_map

HEADS = ("classifier", "score")  # names of trained heads; their outputs are the labels


def export(
    source: Path = typer.Argument(metavar="RUN|ADAPTER", help="A run, or the folder of an adapter."),
    out: Path = typer.Argument(metavar="OUT", help="Folder to write."),
    layout: Literal["uniform", "pattern"] | None = typer.Option(
        None, help="One rank for all modules, or a rank for each.", show_default="uniform"
    ),
    max_rank: int | None = typer.Option(None, help="Truncate each module to this rank.", show_default="no"),
    tolerance: float | None = typer.Option(
        None,
        help="Largest error of a truncated module, relative to its ΔW.",
        show_default="0.01 where ΔW has no low rank",
    ),
    merge: bool = typer.Option(False, "--merge", help="Write the whole model with the adapter in it."),
    base: str | None = typer.Option(
        None, metavar="MODEL", help="Base model to merge into.", show_default="the adapter's own"
    ),
) -> None:
    """Write an adapter (ours, LoRA, or peft's AdaLoRA) as a plain LoRA adapter, and say which engines serve it."""
    if merge and any(option is not None for option in (layout, max_rank, tolerance)):
        raise ConfigError("--merge writes a whole model: leave out --layout, --max-rank and --tolerance")
    if base is not None and not merge:
        raise ConfigError("--base is the model to merge into: add --merge, or leave out --base")
    console = Console(highlight=False, markup=False)
    if merge:
        merged(source, out, base)
        console.print(f"written to {out}: the merged model, for any engine", soft_wrap=True)
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* will refuse .*, which holds more", UserWarning)  # the verdicts say it
        done = export_lora(source, out, layout or "uniform", max_rank=max_rank, tolerance=tolerance)
    ranks = list(done.ranks.values())
    console.print(
        f"written to {done.path} ({done.layout}): {sum(ranks)} ranks over {len(ranks)} modules, at most {max(ranks)}; "
        f"{done.size:,} bytes, {done.parameters:,} parameters, {done.padding / max(1, done.parameters):.0%} padding",
        soft_wrap=True,
    )
    if done.errors:
        columns = Column("module", overflow="fold"), Column("‖ΔW' − ΔW‖ / ‖ΔW‖", justify="right")
        table = Table(*columns, title="truncated modules", title_justify="left")
        for name, error in sorted(done.errors.items(), key=lambda item: -item[1]):
            table.add_row(name, f"{error:.2e}")
        console.print(table)
    console.print(verdicts(check_export(done)))


def merged(source: Path, out: Path, name: str | None) -> None:
    check_elsewhere(out)  # before the base is loaded
    logging.disable_progress_bar()
    folder = adapter_folder(source)
    adapter = read_adapter(folder)
    name = name or adapter.config.base_model_name_or_path
    if not name:
        raise ExportError(f"{folder} does not say which model it belongs to: give --base")
    kind = adapter.config.task_type
    heads = [t for key, t in adapter.others.items() if key.split(".")[0] in HEADS and t.dim() == 2]
    if kind == "SEQ_CLS" and heads:
        model, tokenizer = tasks.load_classifier(name, heads[-1].shape[0], seed=0)
    elif kind == "CAUSAL_LM":
        model, tokenizer = tasks.load_causal(name)
    else:
        why = "holds no trained head" if kind == "SEQ_CLS" else f"has task_type {kind}"
        raise ExportError(f"{folder} {why}: merge it in Python, with export_merged(…, base=model)")
    export_merged(folder, out, base=model, tokenizer=tokenizer)


def check(
    path: Path = typer.Argument(metavar="PATH", help="An adapter folder, or a run (its lora/ is checked)."),
    engine: str | None = typer.Option(None, help=f"{', '.join([*ENGINES, *ALIASES])}.", show_default="all of them"),
    max_lora_rank: int | None = typer.Option(
        None, help="The rank limit that the server runs with.", show_default="one that fits"
    ),
) -> None:
    """Report what an engine would refuse or compute wrongly, with the remedy. Exit code 1 if it would."""
    report = check_export(adapter_folder(path, "lora"), engine, max_lora_rank=max_lora_rank)
    Console(highlight=False, markup=False).print(verdicts(report))
    if not report.ok:
        raise typer.Exit(1)


def verdicts(report: EngineReport) -> Table:
    """What each engine does with the folder, one line per finding."""
    words = {"error": "refuses it, or is wrong", "warning": "serves it on a condition"}
    rows: list[tuple[str, ...]] = []
    for engine in report.engines:
        found = [(engine, words[f.level], f"{f.where}: {f.problem}; {f.remedy}") for f in report.of(engine)]
        rows += found or [(engine, "serves it")]
    return grid(rows)


def inspect(
    path: Path = typer.Argument(metavar="PATH", help="An adapter folder (ours, LoRA, AdaLoRA), or a run."),
) -> None:
    """Print the rank of every module of an adapter, and the totals; no model is loaded."""
    folder = adapter_folder(path)
    adapter = read_adapter(folder)
    console = Console(highlight=False, markup=False)
    console.print(rank_map(adapter.ranks))
    ranks = list(adapter.ranks.values())
    spread = f"mean {sum(ranks) / len(ranks):.2f}, from {min(ranks)} to {max(ranks)}"
    others = sum(t.numel() for t in adapter.others.values())
    console.print(grid([
        ("type", f"{adapter.kind}, {layout(adapter, folder)}"),
        ("base", str(adapter.config.base_model_name_or_path or "not named")),
        ("ranks", f"{sum(ranks):,}{of(adapter.budget.ranks)} over {len(ranks)} modules: {spread}"),
        ("parameters", f"{adapter.parameters:,}{of(adapter.budget.parameters)}"),
        *([("beside it", f"{others:,} parameters trained in full")] if others else []),
        ("file", f"{(folder / SAFETENSORS_WEIGHTS_NAME).stat().st_size:,} bytes"),
    ]))  # fmt: skip


def layout(adapter: Adapter, folder: Path) -> str:
    native = "native: increlora loads it"
    if adapter.limits:
        return f"{native}; it has no low rank: `increlora export --merge`, or LoRA within a --tolerance"
    if adapter.kind in CONFIGS:
        return f"{native}, `increlora export` makes plain LoRA of it"
    if adapter.kind == "ADALORA":
        return "peft's triplets: `increlora export` makes plain LoRA of them"
    contents, _ = read_contents(folder)
    rows = {A.shape[0] for key, A in contents.items() if key.endswith(".lora_A.weight")}
    return f"rank {rows.pop()} for all" if len(rows) == 1 else f"a rank for each, {min(rows)} to {max(rows)}"

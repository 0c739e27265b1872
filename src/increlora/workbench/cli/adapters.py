"""Commands on the folder of an adapter: `increlora export`, `increlora check`, `increlora inspect`."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from ...errors import ConfigError, ExportError
from ...export.adapters import Adapter, adapter_folder, check_elsewhere, read_adapter
from ...export.engines import ALIASES, ENGINES, EngineReport, check_export
from ...export.lora import Exported, write_lora
from ...export.lora_format import SAFETENSORS_WEIGHTS_NAME, read_shapes
from ...export.merged import export_merged
from ...hosts.peft.config import CONFIGS
from .display import grid, of, rank_map

HEADS = ("classifier", "score")  # names of trained heads; their outputs are the labels


def export(
    source: Annotated[Path, typer.Argument(metavar="RUN|ADAPTER", help="A run, or the folder of an adapter.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    layout: Annotated[
        Literal["uniform", "pattern"] | None,
        typer.Option(help="One rank for all modules, or a rank for each.", show_default="uniform"),
    ] = None,
    max_rank: Annotated[int | None, typer.Option(help="Truncate each module to this rank.", show_default="no")] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Largest error of a truncated module, relative to its ΔW.",
            show_default="0.01 where ΔW has no low rank",
        ),
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Write the whole model with the adapter in it.")] = False,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Base model to merge into.", show_default="the adapter's own")
    ] = None,
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
    done = write_lora(source, out, layout or "uniform", max_rank=max_rank, tolerance=tolerance)
    show(console, done)
    console.print(verdicts(check_export(done)))


def show(console: Console, done: Exported) -> None:
    """Ranks, size, padding, and the error of each truncated module."""
    ranks = list(done.ranks.values())
    console.print(
        f"written to {done.path} ({done.layout}): {sum(ranks)} ranks over {len(ranks)} modules, at most {max(ranks)}; "
        f"{done.size:,} bytes, {done.parameters:,} parameters, {done.padding / max(1, done.parameters):.0%} padding",
        soft_wrap=True,
    )
    if not done.errors:
        return
    table = Table(title="truncated modules", title_justify="left")
    table.add_column("module", overflow="fold")
    table.add_column("‖ΔW' − ΔW‖ / ‖ΔW‖", justify="right")
    for name, error in sorted(done.errors.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{error:.2e}")
    console.print(table)


def merged(source: Path, out: Path, name: str | None) -> None:
    """Load the base model and merge the adapter into it."""
    from transformers.utils import logging

    from ..tasks import load_causal, load_classifier

    check_elsewhere(out)  # before the base is loaded
    logging.disable_progress_bar()
    folder = adapter_folder(source)
    adapter = read_adapter(folder)
    name = name or adapter.config.base_model_name_or_path
    if not name:
        raise ExportError(f"{folder} does not say which model it belongs to: give --base")
    kind = str(getattr(adapter.config.task_type, "value", adapter.config.task_type))
    if kind == "SEQ_CLS":
        heads = [t for key, t in adapter.others.items() if key.split(".")[0] in HEADS and t.dim() == 2]
        if not heads:
            raise ExportError(f"{folder} holds no trained head: merge it in Python, with export_merged(…, base=model)")
        model, tokenizer = load_classifier(name, heads[-1].shape[0], seed=0)
    elif kind == "CAUSAL_LM":
        model, tokenizer = load_causal(name)
    else:
        raise ExportError(f"{folder} has task_type {kind}: merge it in Python, with export_merged(…, base=model)")
    export_merged(folder, out, base=model, tokenizer=tokenizer)


def check(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="An adapter folder, or a run (its lora/ is checked).")],
    engine: Annotated[
        str | None, typer.Option(help=f"{', '.join([*ENGINES, *ALIASES])}.", show_default="all of them")
    ] = None,
    max_lora_rank: Annotated[
        int | None, typer.Option(help="The rank limit that the server runs with.", show_default="one that fits")
    ] = None,
) -> None:
    """Report what an engine would refuse or compute wrongly, with the remedy. Exit code 1 if there is anything."""
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
    path: Annotated[Path, typer.Argument(metavar="PATH", help="An adapter folder (ours, LoRA, AdaLoRA), or a run.")],
) -> None:
    """Print the rank of every module of an adapter, and the totals; no model is loaded."""
    folder = adapter_folder(path)
    adapter = read_adapter(folder)
    console = Console(highlight=False, markup=False)
    console.print(rank_map(adapter.ranks))
    console.print(totals(adapter, folder))


def totals(adapter: Adapter, folder: Path) -> Table:
    """Ranks, parameters, layout and size."""
    ranks = list(adapter.ranks.values())
    spread = f"mean {sum(ranks) / len(ranks):.2f}, from {min(ranks)} to {max(ranks)}"
    others = sum(t.numel() for t in adapter.others.values())
    return grid([
        ("type", f"{adapter.kind}, {layout(adapter, folder)}"),
        ("base", str(adapter.config.base_model_name_or_path or "not named")),
        ("ranks", f"{sum(ranks):,}{of(adapter.budget.ranks)} over {len(ranks)} modules: {spread}"),
        ("parameters", f"{adapter.parameters:,}{of(adapter.budget.parameters)}"),
        *([("beside it", f"{others:,} parameters trained in full")] if others else []),
        ("file", f"{(folder / SAFETENSORS_WEIGHTS_NAME).stat().st_size:,} bytes"),
    ])  # fmt: skip


def layout(adapter: Adapter, folder: Path) -> str:
    """How the ranks are laid out in the file."""
    if adapter.limits:
        return (
            "native: increlora loads it; it has no low rank: `increlora export --merge`, or LoRA within a --tolerance"
        )
    if adapter.kind in CONFIGS:
        return "native: increlora loads it, `increlora export` makes plain LoRA of it"
    if adapter.kind == "ADALORA":
        return "peft's triplets: `increlora export` makes plain LoRA of them"
    shapes, _ = read_shapes(folder)
    rows = {shape[0] for key, shape in shapes.items() if key.endswith(".lora_A.weight")}
    return f"rank {rows.pop()} for all" if len(rows) == 1 else f"a rank for each, {min(rows)} to {max(rows)}"

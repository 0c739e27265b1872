"""`increlora inspect`: where the rank of an adapter folder is."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ...export.adapters import Adapter, adapter_folder, read_adapter
from ...export.lora_format import SAFETENSORS_WEIGHTS_NAME, read_shapes
from ...hosts.peft.config import CONFIGS
from .display import of, rank_map


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
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("type", f"{adapter.kind}, {layout(adapter, folder)}")
    table.add_row("base", str(adapter.config.base_model_name_or_path or "not named"))
    spread = f"mean {sum(ranks) / len(ranks):.2f}, from {min(ranks)} to {max(ranks)}"
    table.add_row("ranks", f"{sum(ranks):,}{of(adapter.budget.ranks)} over {len(ranks)} modules: {spread}")
    table.add_row("parameters", f"{adapter.parameters:,}{of(adapter.budget.parameters)}")
    if adapter.others:
        table.add_row("beside it", f"{sum(t.numel() for t in adapter.others.values()):,} parameters trained in full")
    table.add_row("file", f"{(folder / SAFETENSORS_WEIGHTS_NAME).stat().st_size:,} bytes")
    return table


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

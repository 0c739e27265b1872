"""Draw the rank map of a run: `.venv/bin/python scripts/rank_map.py runs/demo docs/images/rank_map.svg`"""

import json
import re
import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

matplotlib.rcParams["svg.hashsalt"] = "increlora"  # the same run draws the same file

NAMES = {"attention.output.dense": "attention output", "intermediate.dense": "FFN up", "output.dense": "FFN down"}


def table(ranks: dict[str, int]) -> tuple[list[str], list[int], dict[tuple[str, int], int]]:
    """Module types, layers, and the rank at each."""
    cells: dict[tuple[str, int], int] = {}
    for module, rank in ranks.items():
        layer = re.search(r"\.(\d+)\.", module)
        kind = re.split(r"\.\d+\.", module)[-1].removeprefix("attention.self.")
        cells[NAMES.get(kind, kind), int(layer[1]) if layer else 0] = rank
    return list(dict.fromkeys(kind for kind, _ in cells)), sorted({layer for _, layer in cells}), cells


def draw(run: Path, out: Path) -> None:
    result = json.loads((run / "run.json").read_text())
    kinds, layers, cells = table(result["ranks"])
    grid = [[cells.get((kind, layer), 0) for layer in layers] for kind in kinds]
    figure = Figure(figsize=(1.2 + 0.75 * len(layers), 0.9 + 0.42 * len(kinds)))
    axes = figure.subplots()
    image = axes.imshow(grid, cmap="YlGnBu", aspect="auto", vmin=0)
    middle = max(map(max, grid)) / 2
    for y, row in enumerate(grid):
        for x, rank in enumerate(row):
            axes.text(x, y, str(rank), ha="center", va="center", color="white" if rank > middle else "black")
    axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xlabel("layer")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    budget = result["budget"]
    axes.set_title(f"{budget['ranks_used']} of {budget['ranks_target']} ranks", fontsize=10)
    figure.colorbar(image, ax=axes, label="rank")
    figure.savefig(out, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))

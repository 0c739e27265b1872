"""Module names: modules as a table of layers and module types, and the known name closest to an unknown one."""

import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import NamedTuple


class Cell(NamedTuple):
    layer: str
    type: str


class Grid(NamedTuple):
    """Modules as a table: the cell of each by its name, and the layers and types in their order."""

    cells: dict[str, Cell]
    layers: list[str]
    types: list[str]


def grid(names: Iterable[str]) -> Grid:
    """The table of these modules; no two share a cell.

    Layers are ordered by number, stack by stack; if there are several stacks, a layer includes its stack:
    "decoder.block.3". Modules outside layers come last, in layer "–". Types are named as shortly as is unambiguous.
    """
    found = {name: parts(name) for name in names}
    stacks = list(dict.fromkeys(stack for stack, _, _ in found.values() if stack))
    kinds = list(dict.fromkeys(kind for _, _, kind in found.values()))
    types = dict(zip(kinds, short(kinds), strict=True))
    cells, order = {}, {}
    for name, (stack, number, kind) in found.items():
        layer = f"{stack}.{number}" if stack and len(stacks) > 1 else number
        cells[name] = Cell(layer, types[kind])
        order[layer] = (stacks.index(stack), int(number)) if stack else (len(stacks), 0)
    return Grid(cells, sorted(order, key=order.__getitem__), list(types.values()))


def rank_rows(ranks: Mapping[str, int]) -> tuple[list[str], dict[str, list[list[int]]]]:
    """(types, {layer: the ranks of each type}); numbered modules of a layer (experts) share a type: "experts.*.up"."""
    found = defaultdict(list)
    for name, rank in ranks.items():
        _, _, kind = parts(name)
        found[name.removesuffix(kind) + re.sub(r"(?<![^.])\d+(?![^.])", "*", kind)].append(rank)
    cells, layers, types = grid(found)
    by_cell = {cell: found[name] for name, cell in cells.items()}
    return types, {layer: [by_cell.get(Cell(layer, kind), []) for kind in types] for layer in layers}


def span(ranks: list[int]) -> str:
    """A cell of `rank_rows` as text."""
    if not ranks:
        return "·"
    return str(ranks[0]) if min(ranks) == max(ranks) else f"{min(ranks)}–{max(ranks)}"


def parts(name: str) -> tuple[str, str, str]:
    """(stack, layer, module type): "h.layer.3.attention.query" → ("h.layer", "3", "attention.query")."""
    found = re.fullmatch(r"(.*?)\.(\d+)\.(.+)", name, re.DOTALL)
    return (found[1], found[2], found[3]) if found else ("", "–", name)


def short(names: Iterable[str], dot: str = ".") -> list[str]:
    """The shortest suffix of each name, in whole components, that distinguishes it from the others."""
    suffixes = [[dot.join(name.split(dot)[-n:]) for n in range(1, name.count(dot) + 2)] for name in names]
    times = Counter(chain.from_iterable(suffixes))
    return [next((s for s in longer if times[s] == 1), longer[-1]) for longer in suffixes]


def nearest(name: str, known: Iterable[str]) -> str:
    """The name in `known` (not empty) that is most similar to `name`."""
    return difflib.get_close_matches(name, list(known), 1, cutoff=0)[0]


def natural(name: str) -> list[str | int]:
    """Sort key that puts layer 2 before layer 10; a saved config does not keep the order of the model."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]

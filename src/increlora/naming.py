"""Names: where a module stands in its model (layer and module type), and which known name comes nearest."""

import difflib
import re
from collections.abc import Iterable


def place(name: str) -> tuple[str, str]:
    """(layer, module type) of a module: "h.layer.3.attention.query" → ("3", "attention.query")."""
    _, layer, kind = parts(name)
    return layer, kind


def places(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """`place` of each name; with several stacks of layers, the layer says in which: "decoder.block.3"."""
    found = {name: parts(name) for name in names}
    several = len({stack for stack, layer, _ in found.values() if stack}) > 1
    return {
        name: (f"{stack}.{layer}" if several and stack else layer, kind) for name, (stack, layer, kind) in found.items()
    }


def parts(name: str) -> tuple[str, str, str]:
    """(stack, layer, module type): "h.layer.3.attention.query" → ("h.layer", "3", "attention.query")."""
    found = re.fullmatch(r"(.*?)\.(\d+)\.(.+)", name, re.DOTALL)
    return (found[1], found[2], found[3]) if found else ("", "–", name)


def short(names: Iterable[str]) -> list[str]:
    """Each name from its last component on, or from as far to the left as it takes to tell it from the others."""
    split = [name.split(".") for name in names]

    def shortest(name: list[str]) -> str:
        for count in range(1, len(name)):
            if sum(other[-count:] == name[-count:] for other in split) == 1:
                return ".".join(name[-count:])
        return ".".join(name)

    return [shortest(name) for name in split]


def nearest(name: str, known: Iterable[str]) -> str:
    """The one of `known` names (not empty) that looks most like `name`."""
    return difflib.get_close_matches(name, list(known), 1, cutoff=0)[0]


def natural(name: str) -> list[str | int]:
    """Sort key that puts layer 2 before layer 10; the order of the model is lost in a saved config."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]

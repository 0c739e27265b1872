"""Module names: the layer and module type of a module, and the known name closest to an unknown one."""

import difflib
import re
from collections.abc import Iterable


def place(name: str) -> tuple[str, str]:
    """(layer, module type) of a module: "h.layer.3.attention.query" → ("3", "attention.query")."""
    _, layer, kind = parts(name)
    return layer, kind


def places(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """`place` of each name; if there are several stacks of layers, the layer includes its stack: "decoder.block.3"."""
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
    """The shortest suffix of each name, in whole components, that distinguishes it from the others."""
    split = [name.split(".") for name in names]

    def shortest(name: list[str]) -> str:
        for count in range(1, len(name)):
            if sum(other[-count:] == name[-count:] for other in split) == 1:
                return ".".join(name[-count:])
        return ".".join(name)

    return [shortest(name) for name in split]


def nearest(name: str, known: Iterable[str]) -> str:
    """The name in `known` (not empty) that is most similar to `name`."""
    return difflib.get_close_matches(name, list(known), 1, cutoff=0)[0]


def natural(name: str) -> list[str | int]:
    """Sort key that puts layer 2 before layer 10; a saved config does not keep the order of the model."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]

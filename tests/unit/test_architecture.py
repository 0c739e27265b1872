"""Imports go one way, only hosts know the insides of peft, and files stay small. Read with `ast`; nothing is imported.

integrations → workbench → export → hosts → registry → structural · runtime → methods → rules → decide · deltas → ops
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "increlora"
FILES = sorted(SOURCE.rglob("*.py"))

# A part imports from itself and from lower levels; never from another part of its own level.
LEVELS = [
    {"callers", "errors", "files", "naming", "seeding"},
    {"ops", "patterns"},
    {"decide", "deltas"},
    {"rules"},
    {"methods"},
    {"structural", "runtime"},
    {"registry"},
    {"hosts"},
    {"export"},
    {""},  # increlora/__init__.py: what users import
    {"workbench"},
    {"integrations"},  # at the top, so that nothing imports them: they need frameworks that users may not have
]
LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts}
CORE = {part for part in LEVEL if LEVEL[part] <= LEVEL["registry"]}
WORKBENCH = {part for part in LEVEL if LEVEL[part] > LEVEL[""]}
# The rooms of the workbench, lowest first: the same rule holds between them.
ROOMS = [{"runs"}, {"tasks", "report"}, {"cli"}]
ROOM = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}


def module_name(path: Path) -> str:
    """`…/increlora/hosts/peft/layer.py` → `increlora.hosts.peft.layer`; a package is named without `__init__`."""
    parts = ("increlora", *path.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, module: str, *, package: bool) -> Iterator[str]:
    """Full names of everything imported anywhere in a file, relative imports resolved."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            here = module.split(".")
            above = here[: len(here) - node.level + package]
            yield from (".".join([*above, *([node.module] if node.module else []), a.name]) for a in node.names)


def part_of(module: str) -> str:
    """Part of the library a module belongs to: `increlora.hosts.peft.layer` → `hosts`, `increlora` → ``."""
    return module.split(".")[1] if "." in module else ""


def room_of(module: str) -> str:
    """Room of a module of the workbench: `increlora.workbench.cli.train` → `cli`."""
    return module.split(".")[2] if module.count(".") > 1 else ""


def same_room_or_lower(module: str, name: str) -> bool:
    here, there = room_of(module), room_of(name)
    return here == there or ROOM[there] < ROOM[here]


def problems(source: str, module: str, *, package: bool = False) -> list[str]:
    """What a file imports against the rules."""
    part, found = part_of(module), []
    for name in imports(source, module, package=package):
        top = name.split(".")[0]
        if top == "increlora":
            target = part_of(name)
            target = target if target in LEVEL else ""  # `from increlora import attach`
            if target != part and LEVEL[target] >= LEVEL[part]:
                found.append(f"{module} imports {name}: {part or 'the package'} may not know {target or 'the package'}")
            elif target == part == "workbench" and not same_room_or_lower(module, name):
                found.append(f"{module} imports {name}: {room_of(module)} may not know {room_of(name)}")
        elif top not in sys.stdlib_module_names and not allowed(name, module):
            found.append(f"{module} imports {name}: {top} is out of bounds here")
    return found


def allowed(name: str, module: str) -> bool:
    """May this module import that name of a third-party package? Of peft, the workbench sees what every user sees."""
    part, top = part_of(module), name.split(".")[0]
    if top == "torch":
        return True
    if part in CORE:
        return False
    if top == "peft" and part in WORKBENCH:
        return name.count(".") == 1
    return part in WORKBENCH | {"export"} or (
        part == "hosts" and (top != "peft" or module != "increlora.hosts.transformers")
    )


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_one_way(path: Path) -> None:
    module = module_name(path)
    assert part_of(module) in LEVEL, f"{module}: say in LEVELS where the new part belongs"
    assert problems(path.read_text(), module, package=path.name == "__init__.py") == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_files_stay_small(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    limit = 150 if path.parent == SOURCE / "methods" else 400
    assert lines <= limit, f"{path.name} has {lines} lines; split it"


def test_all_parts_were_found() -> None:
    found = {part_of(module_name(path)) for path in FILES}
    assert found >= {
        "",
        "errors",
        "decide",
        "deltas",
        "methods",
        "runtime",
        "structural",
        "hosts",
        "export",
        "workbench",
    }


@pytest.mark.parametrize(("module", "source"), [
    ("increlora.decide.scores", "from ..deltas import Delta"),  # same level
    ("increlora.deltas.base", "from ..decide.budget import Budget"),
    ("increlora.deltas.base", "from ..methods import Method"),
    ("increlora.ops.parallel", "from ..deltas import Delta"),
    ("increlora.rules.grow", "from ..methods import Method"),
    ("increlora.methods.lora", "from ..runtime.controller import Controller"),
    ("increlora.methods.lora", "def f():\n    from increlora.runtime import Controller"),  # lazily is no excuse
    ("increlora.methods.lora", "from ..structural.mora.delta import SquareDelta"),
    ("increlora.runtime.taps", "from ..structural.mora.delta import SquareDelta"),
    ("increlora.structural.mora.method", "from ...runtime import Controller"),
    ("increlora.runtime.taps", "from ..registry import METHODS"),
    ("increlora.runtime.taps", "from ..hosts.peft import attach"),
    ("increlora.runtime.taps", "from increlora import attach"),
    ("increlora.runtime.taps", "import peft"),
    ("increlora.runtime.taps", "import numpy as np"),
    ("increlora.decide.selection", "import transformers"),
    ("increlora.hosts.transformers", "from peft import PeftModel"),
    ("increlora.hosts.peft.layer", "from ...export.lora import export_lora"),
    ("increlora.hosts.peft.layer", "from ...workbench.cli.main import main"),
    ("increlora.export.lora", "from ..workbench.runs import RunFolder"),
    ("increlora.workbench.tasks.glue", "from ..report import html"),
    ("increlora.workbench.tasks.glue", "from ..cli import main"),
    ("increlora.workbench.tasks.glue", "from peft.tuners.lora import Linear"),  # peft's insides are the hosts' business
    ("increlora", "from .workbench.cli import main"),
    ("increlora", "from .integrations import axolotl"),
    ("increlora.workbench.cli.train", "from ...integrations.settings import config_of"),
    ("increlora.integrations.axolotl", "from peft.tuners.lora import Linear"),
])  # fmt: skip
def test_a_wrong_import_is_seen(module: str, source: str) -> None:
    assert len(problems(source, module, package=module == "increlora")) == 1


@pytest.mark.parametrize(("module", "package", "source"), [
    ("increlora.runtime", True, "from .controller import Controller\nfrom ..methods import Method"),
    ("increlora.methods", True, "from .base import Method"),
    ("increlora.decide.selection", False, "import math\nfrom .allocation import Grant\nfrom .budget import Budget"),
    ("increlora.structural.mora.delta", False, "from ...deltas import BlockDelta\nfrom .maps import Groups"),
    ("increlora.hosts.peft.model", False, "from peft.tuners import x\nfrom .. import transformers"),
    ("increlora.export.lora", False, "from peft import LoraConfig\nfrom safetensors import safe_open"),
    ("increlora.workbench.cli.train", False, "from ..tasks import glue\nfrom ... import attach\nimport rich"),
    ("increlora.workbench.cli.train", False, "from peft import get_peft_model\nfrom ..runs import Run"),
    ("increlora.integrations.axolotl", False, "from axolotl.integrations.base import BasePlugin\nimport increlora"),
])  # fmt: skip
def test_a_right_import_is_not(module: str, package: bool, source: str) -> None:
    assert problems(source, module, package=package) == []

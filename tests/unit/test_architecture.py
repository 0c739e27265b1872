"""Imports go one way, only hosts know the insides of peft, and files stay small. Read with `ast`; nothing is imported.

integrations → cli, tasks, report, probes → hosts → runtime → methods → scores · schedules · selection · ramps ·
penalties · deltas → budget · allocation → torch
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
    {"errors", "files", "seeding"},
    {"budget", "allocation", "naming"},
    {"scores", "schedules", "selection", "ramps", "penalties", "projections", "deltas", "kernels"},
    {"methods"},
    {"runtime"},
    {"hosts"},
    {""},  # increlora/__init__.py: what users import
    {"runs"},
    {"tasks", "report", "probes"},
    {"cli", "__main__"},
    {"integrations"},  # at the top, so that nothing imports them: they need frameworks that users may not have
]
LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts}
CORE = {part for part in LEVEL if LEVEL[part] <= LEVEL["runtime"]}
DOCUMENTED = {"peft.utils.hotswap.hotswap_adapter"}  # what users of peft import from within
WORKBENCH = {part for part in LEVEL if LEVEL[part] > LEVEL[""]}


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
        elif top not in sys.stdlib_module_names and not allowed(name, module):
            found.append(f"{module} imports {name}: {top} is out of bounds here")
    return found


def allowed(name: str, module: str) -> bool:
    """May this module import that name of a third-party package? Of peft, the workbench sees what every user sees."""
    part, top = part_of(module), name.split(".")[0]
    if top == "torch":
        return True
    if part in CORE:
        return top == "triton" and part == "kernels"
    if top == "peft" and part in WORKBENCH:
        return name.count(".") == 1 or name in DOCUMENTED
    return part in WORKBENCH or (part == "hosts" and (top != "peft" or module != "increlora.hosts.transformers"))


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
    assert found >= {"", "errors", "budget", "scores", "selection", "deltas", "methods", "runtime", "hosts", "tasks"}


@pytest.mark.parametrize(("module", "source"), [
    ("increlora.scores", "from .deltas import Delta"),  # same level
    ("increlora.scores", "from .deltas.base import Delta"),
    ("increlora.budget", "from . import selection"),
    ("increlora.deltas.base", "from ..methods import Method"),
    ("increlora.methods.lora", "from ..runtime.controller import Controller"),
    ("increlora.methods.lora", "def f():\n    from increlora.runtime import Controller"),  # lazily is no excuse
    ("increlora.runtime.taps", "from ..hosts.peft import attach"),
    ("increlora.runtime.taps", "from increlora import attach"),
    ("increlora.runtime.taps", "import peft"),
    ("increlora.runtime.taps", "import numpy as np"),
    ("increlora.selection", "import transformers"),
    ("increlora.hosts.transformers", "from peft import PeftModel"),
    ("increlora.hosts.peft.layer", "from ...tasks import glue"),
    ("increlora.hosts.peft.layer", "from ...cli.main import main"),
    ("increlora.tasks.glue", "from ..report import html"),
    ("increlora.tasks.glue", "from ..cli import main"),
    ("increlora.tasks.glue", "from peft.tuners.lora import Linear"),  # peft's insides are the hosts' business
    ("increlora", "from .cli import main"),
    ("increlora", "from .integrations import axolotl"),
    ("increlora.cli.train", "from ..integrations.settings import config_of"),
    ("increlora.integrations.axolotl", "from peft.tuners.lora import Linear"),
])  # fmt: skip
def test_a_wrong_import_is_seen(module: str, source: str) -> None:
    assert len(problems(source, module, package=module == "increlora")) == 1


@pytest.mark.parametrize(("module", "package", "source"), [
    ("increlora.runtime", True, "from .controller import Controller\nfrom ..methods import Method"),
    ("increlora.methods", True, "from .base import Method"),
    ("increlora.selection", False, "import math\nfrom .allocation import Grant\nfrom .budget import Budget"),
    ("increlora.hosts.peft.model", False, "from peft.tuners import x\nfrom .. import transformers"),
    ("increlora.hosts.export", False, "from peft import LoraConfig\nfrom safetensors import safe_open"),
    ("increlora.cli.train", False, "from ..tasks import glue\nfrom .. import attach\nimport rich, transformers"),
    ("increlora.cli.train", False, "from peft import get_peft_model\nfrom ..runs import Run"),
    ("increlora.integrations.axolotl", False, "from axolotl.integrations.base import BasePlugin\nimport increlora"),
])  # fmt: skip
def test_a_right_import_is_not(module: str, package: bool, source: str) -> None:
    assert problems(source, module, package=package) == []

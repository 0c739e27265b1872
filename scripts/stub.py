"""Write src/increlora/__init__.pyi, what static tools see of the package: `make stub`, after a change of options.

The config classes are made at import, out of the methods' settings; a type checker or an editor cannot follow that. The
stub spells out what `inspect.signature` and `help` show at run time, and leaves the rest of the package to its source.
"""

import inspect
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from peft import LoraConfig

import increlora
from increlora.hosts.peft import CONFIGS
from increlora.hosts.peft.config import MethodConfig

ROOT = Path(__file__).resolve().parents[1]
STUB = ROOT / "src" / "increlora" / "__init__.pyi"

Imports = set[tuple[str, str]]  # (module, name)


def stub() -> str:
    """The whole file, formatted."""
    configs = {config_cls.__name__: config_cls for config_cls in CONFIGS.values()}
    used: Imports = {(MethodConfig.__module__, MethodConfig.__name__)}
    classes = [line for name in sorted(configs) for line in class_lines(configs[name], used)]
    public = {(getattr(increlora, name).__module__, name) for name in increlora.__all__ if name not in configs}
    lines = [
        f'"""{increlora.__doc__}"""',
        "# Written by scripts/stub.py out of the methods' settings: change those, then run `make stub`.",
        *(f"from {relative(module)} import {name}" for module, name in sorted(used)),
        *(f"from {relative(module)} import {name} as {name}" for module, name in sorted(public)),
        f"__all__ = {sorted(increlora.__all__)!r}",
        "__version__: str",
        *classes,
    ]
    return formatted("\n".join(lines) + "\n")


def class_lines(config_cls: Any, used: Imports) -> Iterator[str]:
    """A config class: the meaning of its options, the options, and its preset."""
    options, inherited = inspect.signature(config_cls).parameters, {f.name for f in fields(LoraConfig)}
    types = {name: rendered(option.annotation, used) for name, option in options.items()}
    yield f"class {config_cls.__name__}({MethodConfig.__name__}):"
    yield f'    """{indented(config_cls.__doc__)}\n    """'
    yield from (f"    {f.name}: {types[f.name]}" for f in fields(config_cls.settings_cls) if f.name not in inherited)
    yield f"    def __init__(self, *, {arguments(types)}) -> None: ..."
    if hasattr(config_cls, "paper"):
        used.add(("typing", "Self"))
        preset = inspect.signature(config_cls.paper).parameters
        every = {name: rendered(option.annotation, used) for name, option in preset.items()}
        yield "    @classmethod"
        yield f"    def paper(cls, {arguments({'r': every.pop('r')})} *, {arguments(every)}) -> Self:"
        yield f'        """{indented(inspect.getdoc(config_cls.paper), 8)}"""'


def arguments(types: dict[str, str]) -> str:
    return " ".join(f"{name}: {kind} = ...," for name, kind in types.items())


def rendered(hint: Any, used: Imports) -> str:
    """A type as source; the names to import for it are added to `used`."""
    origin, args = get_origin(hint) or hint, get_args(hint)
    if origin is NoneType:
        return "None"
    if origin in (Union, UnionType):
        return " | ".join(rendered(member, used) for member in args)
    name = origin.__name__ if origin is not Literal else "Literal"
    if origin.__module__ != "builtins":
        used.add((origin.__module__, name))
    inner = map(repr, args) if origin is Literal else (rendered(member, used) for member in args)
    return f"{name}[{', '.join(inner)}]" if args else name


def relative(module: str) -> str:
    return module.removeprefix("increlora") if module.startswith("increlora.") else module


def indented(text: str | None, spaces: int = 4) -> str:
    return (text or "").replace("\n", "\n" + " " * spaces).replace("\n" + " " * spaces + "\n", "\n\n")


def formatted(source: str) -> str:
    for command in (["check", "--fix", "--quiet", "--select", "I"], ["format"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--stdin-filename", str(STUB), "-"]
        source = subprocess.run(ruff, input=source, capture_output=True, check=True, text=True, cwd=ROOT).stdout
    return source


if __name__ == "__main__":
    STUB.write_text(stub())

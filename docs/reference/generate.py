"""What mkdocs puts into the reference pages: read from the code, at build time, so that it cannot fall behind.

A page says `<!-- generated: options -->`; `on_page_markdown` (a hook of mkdocs) puts the text there.
"""

import inspect
import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import typer
from typer.cli import get_docs_for_click

import increlora
from increlora import errors
from increlora.hosts.peft.config import CONFIGS
from increlora.hosts.peft.options import INSTEAD, SHARED, settings_doc, switches_doc
from increlora.workbench.cli.app import app
from increlora.workbench.cli.methods import CAPABILITIES, SIGNS, footnoted
from increlora.workbench.cli.options import described

DOCS = Path(__file__).resolve().parents[1]


def on_page_markdown(markdown: str, **context: Any) -> str:
    return re.sub(r"<!-- generated: (\w+) -->", lambda found: GENERATED[found[1]](), markdown)


# -- names ---------------------------------------------------------------------------------------------------------


def api() -> str:
    """Every public function and class but the configs and errors, which have their own pages."""
    elsewhere = {c.__name__ for c in CONFIGS.values()} | set(vars(errors))
    return "\n\n".join(f"::: increlora.{name}" for name in increlora.__all__ if name not in elsewhere)


def error_types() -> str:
    own = [c for c in vars(errors).values() if inspect.isclass(c) and c.__module__ == errors.__name__]
    rows = [[f"`{c.__name__}`", ", ".join(f"`{b.__name__}`" for b in c.__bases__), c.__doc__ or ""] for c in own]
    return table(["error", "is a", "when"], rows)


# -- options of the methods ----------------------------------------------------------------------------------------


def options() -> str:
    """A section per config class: its own options by group."""
    return "\n\n".join(section for config_cls in CONFIGS.values() for section in config_section(config_cls))


def config_section(config_cls: Any) -> Iterator[str]:
    settings, name = config_cls.settings_cls, config_cls.__name__
    yield f"## {name}"
    yield cell(settings_doc(settings).partition("\n")[0])
    yield from tables(settings, settings_doc(settings))
    if config_cls.switches:
        yield f"The following options belong to `{name}.paper(...)` alone, together with all of the above."
        yield from tables(config_cls.paper_cls, switches_doc(config_cls.paper_cls))


def tables(settings: Any, docstring: str) -> Iterator[str]:
    """A table for every group of options in the docstring."""
    known, hints = {f.name: f for f in fields(settings)}, get_type_hints(settings)
    for group, entries in meanings(docstring):
        rows = [[f"`{n}`", values(hints[n]), f"`{default(known[n])}`", text] for n, text in entries if n in known]
        yield f"**{group}**" if group else ""
        yield table(["option", "value", "default", "meaning"], rows)


def meanings(docstring: str) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """(group, [(option, meaning)]) out of a docstring of lines `name, name: meaning.   name: meaning.`"""
    text = re.sub(r"\n {8,}", " ", inspect.cleandoc(docstring))
    for block in re.split(r"\n(?=\S)", text):
        group, _, body = block.partition("\n")
        found = [entry.partition(": ") for line in body.splitlines() for entry in re.split(r" {3,}", line.strip())]
        entries = [(name, meaning) for names, colon, meaning in found if colon for name in names.split(", ")]
        if entries:
            yield ("" if group == "Attributes:" else group), entries


def values(hint: Any) -> str:
    if hint == int | float:
        return "steps (int) or a share (float)"
    if get_origin(hint) is Mapping:
        return f"module name → {'word' if get_args(hint)[1] is str else 'number'}"
    return described(hint).replace("'", "`")


def default(option: Field[Any]) -> Any:
    return option.default_factory() if option.default_factory is not MISSING else option.default


def shared_options() -> str:
    return table(["option of LoraConfig", "meaning"], [[f"`{name}`", text] for name, (_, text) in SHARED.items()])


def refused_options() -> str:
    return table(["option of LoraConfig", "instead"], [[f"`{name}`", remedy] for name, remedy in INSTEAD.items()])


# -- capabilities --------------------------------------------------------------------------------------------------


def capabilities() -> str:
    """The table as the command prints it."""
    data = json.loads(CAPABILITIES.read_text())
    found, reasons = footnoted(data["capabilities"])
    rows = [[name, *(capability(*cell) for cell in row.values())] for name, row in found.items()]
    foot = [f"{number}. {reason}" for reason, number in reasons.items()]
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    return "\n".join([table(["", *next(iter(found.values()))], rows), "", *foot, "", f"With {versions}."])


def capability(verdict: str, number: str) -> str:
    return SIGNS[verdict][0] + (f" <sup>{number}</sup>" if number else "")


def probe_meanings() -> str:
    meanings = json.loads(CAPABILITIES.read_text())["meanings"]
    return table(["", "yes means"], [[name, meaning] for name, meaning in meanings.items()])


# -- the command line ----------------------------------------------------------------------------------------------


def command_line() -> str:
    """What `typer utils docs` prints, below the page's own heading."""
    group: Any = typer.main.get_command(app)
    text = get_docs_for_click(obj=group, ctx=group.context_class(group, info_name="increlora"), name="increlora")
    return re.sub(r"\[default: \((.*)\)\]", r"Default: \1", text.partition("\n")[2])


# -- peft's tests --------------------------------------------------------------------------------------------------


def read_conformance() -> dict[str, Any]:
    return json.loads((DOCS / "conformance.json").read_text())


def conformance() -> str:
    """Counts per method of the last run of `make conformance` that was committed."""
    found = read_conformance()
    counts = found["counts"]
    kinds = ["passed", "skipped", "refused", "allowed", "failed"]
    rows = [[f"`{name}`", *(f"{row[kind]:,}" for kind in kinds)] for name, row in counts.items()]
    total = ["all", *(f"{sum(row[kind] for row in counts.values()):,}" for kind in kinds)]
    return f"peft {found['peft']}:\n\n" + table(["config class", *kinds], [*rows, total])


def allowed_failures() -> str:
    entries = tomllib.loads((DOCS.parent / "tests/conformance/allowed.toml").read_text())["allowed"]
    explained = read_conformance()["explained"]
    return table(
        ["tests", "failures", "why"],
        [[f"`{e['tests']}`", f"{explained.get(e['tests'], 0)}", e["reason"]] for e in entries],
    )


def left_out() -> str:
    found = read_conformance()["left_out"]
    reasons = sorted({reason for counts in found.values() for reason in counts})
    rows = [[r, *(f"{counts.get(r, '')}" for counts in found.values())] for r in reasons]
    return table(["refused because of", *(name.removesuffix("Config") for name in found)], rows)


# -- speed -----------------------------------------------------------------------------------------------------------


def measured(name: str) -> dict[str, Any]:
    """What `benchmarks/speed` wrote: `performance`, or `performance_curves`."""
    return json.loads(Path(__file__).with_name(f"{name}.json").read_text())


def performance() -> str:
    found = measured("performance")
    rows = []
    for row in found["targets"]:
        spread = f"{row['low']:.2f} – {row['high']:.2f}" if "low" in row else ""
        bound = f"{'≥' if row['at least'] else '≤'} {row['bound']:g}"
        rows.append([row["what"], bound, f"{row['ratio']:.3f}", spread, "met" if row["met"] else "**missed**"])
    where = ", ".join(f"{name} {value}" for name, value in found["machine"].items())
    return table(["what", "target", "measured", "quartiles of single steps", ""], rows) + f"\n\nMeasured on: {where}."


def steps() -> str:
    """Median step of every subject and phase, beside the first subject's."""
    rows = []
    for comparison, subjects in measured("performance")["steps"].items():
        base = next(iter(subjects.values()))["all"]["median"]
        for name, phases in subjects.items():
            for phase, row in phases.items():
                if phase != "all" or len(phases) > 2:
                    spread = f"{row['low'] * 1e3:.0f} – {row['high'] * 1e3:.0f}"
                    optimizer = f"{row['optimizer'] * 1e3:.1f}" if "optimizer" in row else ""
                    numbers = [f"{row['steps']}", f"{row['median'] * 1e3:.0f}", spread, optimizer]
                    rows.append([comparison, name, phase, *numbers, f"{row['median'] / base:.3f}"])
    head = ["comparison", "subject", "phase", "steps", "median, ms", "quartiles", "optimizer, ms", "÷ the first"]
    return table(head, rows)


def curves() -> str:
    """Steps of LoRA and IncreLoRA beside the floor and peft's LoRA, over models, ranks and numbers of modules."""
    found, rows = measured("performance_curves"), []
    for row in (row for name in ("models", "rank", "modules") for row in found[name]):
        at, floor, theirs, *ours = row.values()  # in the order of the subjects: ours are LoRA and, mostly, IncreLoRA
        beside = [f"{ms / floor:.2f}" for ms in (theirs, *ours)] + [""] * (2 - len(ours))
        rows.append([at, f"{floor:,.1f}", *beside, *(f"{ms / theirs:.2f}" for ms in ours), *[""] * (2 - len(ours))])
    head = ["", "floor, ms", "peft LoRA ÷ floor", "LoRA ÷ floor", "IncreLoRA ÷ floor"]
    return table([*head, "LoRA ÷ peft LoRA", "IncreLoRA ÷ peft LoRA"], rows)


def counts() -> str:
    """What a step of every method does and keeps beyond the floor; the same on every machine."""
    rows = [[row["method"], f"{row['operations']:,}", f"{row['MiB kept']:.1f}"]
            for row in measured("performance_curves")["counts"]]  # fmt: skip
    return table(["method", "operations beyond the floor's", "MiB kept for backward, beyond the floor's"], rows)


# -- Markdown ------------------------------------------------------------------------------------------------------


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(map(cell, row)) + " |" for row in [head, ["---"] * len(head), *rows])


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


GENERATED: dict[str, Callable[[], str]] = {
    "api": api, "errors": error_types, "options": options, "shared": shared_options, "refused": refused_options,
    "cli": command_line, "capabilities": capabilities, "probes": probe_meanings, "conformance": conformance,
    "allowed": allowed_failures, "left_out": left_out, "performance": performance, "steps": steps,
    "curves": curves, "counts": counts,
}  # fmt: skip

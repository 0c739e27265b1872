"""The reference is complete: every public name, option and command-line option is in the pages as they are built."""

import html
import importlib.util
import re
from dataclasses import fields
from typing import Any

import pytest
import typer

import increlora
from increlora import errors
from increlora.hosts.peft.config import CONFIGS
from increlora.registry import METHODS
from increlora.workbench.cli.app import app
from tests import probes
from tests.docs.blocks import ROOT


@pytest.fixture(scope="module")
def generate() -> Any:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "reference" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def page(generate):
    """A reference page as mkdocs gets it."""
    return lambda name: generate.on_page_markdown((ROOT / "docs" / "reference" / f"{name}.md").read_text())


def rows(text, heading=""):
    """Cells of every table row below a heading, up to the next of its level."""
    section = text.partition(heading)[2].split("\n## ")[0] if heading else text
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in section.splitlines() if line[:1] == "|"]


def test_every_public_name_is_in_the_reference(page):
    everything = page("api") + page("options") + page("errors")
    configs = {c.__name__ for c in CONFIGS.values()}
    for name in increlora.__all__:
        wanted = (
            f"## {name}\n" if name in configs else f"`{name}`" if hasattr(errors, name) else f"::: increlora.{name}\n"
        )
        assert wanted in everything + "\n", name
        assert getattr(increlora, name).__doc__, name


def test_every_error_is_in_the_reference(page):
    documented = {row[0].strip("`"): row[2] for row in rows(page("errors"))[2:]}
    own = {n for n, e in vars(errors).items() if isinstance(e, type) and issubclass(e, errors.IncreLoraError)}
    assert set(documented) == own and all(documented.values())


@pytest.mark.parametrize("config_cls", CONFIGS.values(), ids=lambda c: c.__name__)
def test_every_option_has_a_meaning_values_and_its_default(page, generate, config_cls):
    found = {row[0].strip("`"): row[1:] for row in rows(page("options"), f"## {config_cls.__name__}\n")}
    for option in fields(config_cls.settings_cls):
        values, default, meaning = found[option.name]
        assert values and meaning and default == f"`{generate.default(option)}`", option.name


def test_every_command_and_its_options_are_in_the_reference(page):
    text = html.unescape(page("cli"))
    for name, command in typer.main.get_command(app).commands.items():
        section = text.partition(f"## `increlora {name}`")[2].split("\n## ")[0]
        assert command.help.strip().splitlines()[0] in section
        for parameter in command.params:
            known = parameter.opts if parameter.param_type_name == "option" else [parameter.metavar or parameter.name]
            assert parameter.help, f"increlora {name}: {known[0]} has no help"
            (line,) = (line for line in section.splitlines() if re.match(rf"\* `{re.escape(known[0])}[` ,]", line))
            assert parameter.help in line and all(word in line for word in known)


def test_every_capability_and_every_method_is_on_its_page(generate):
    text = generate.on_page_markdown((ROOT / "docs" / "capabilities.md").read_text())
    found = rows(text.partition("## What")[0])
    assert found[0][1:] == list(METHODS) and {row[0] for row in found[2:]} == set(probes.MEANINGS)
    assert all(cell.split(" <sup>")[0] in ("yes", "no") for row in found[2:] for cell in row[1:])
    notes = [int(number) for number in re.findall(r"<sup>(\d+)</sup>", text)]
    assert set(map(str, notes)) == set(re.findall(r"^(\d+)\. ", text, re.MULTILINE))
    assert {row[0]: row[1] for row in rows(text, '## What "yes" means')[2:]} == probes.MEANINGS

"""What the pages say works: Python blocks run, commands parse, shown files exist."""

import argparse
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from increlora.workbench.cli.app import app
from increlora.workbench.cli.options import from_flags
from increlora.workbench.cli.settings import FLAGS, TrainSettings, parse_options
from tests.docs.blocks import PAGES, ROOT, commands, python_blocks, snippets
from tests.docs.stand_ins import STAND_INS, language_model

TEST = re.compile(r"`(?:tests/)?((?:contract|distributed|hosts|parity|unit)/(?:\w+/)*test_\w+\.py)(?:::(\w+))?`")
LONGEST = 120  # characters of a line of text
CODE = re.compile(r"^```.*?^```$|^<!-- test:.*?^-->$", re.DOTALL | re.MULTILINE)
WITH_PYTHON = [page for page in PAGES if python_blocks(page)]

# Code that stands between two blocks of a page without being worth showing: (page, number of the block it precedes).
BETWEEN = {
    ("README.md", 1): "import increlora, torch\n"
    "optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])",
}


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page", **STAND_INS.get(page, language_model)()}
    skipped = []
    for number, block in enumerate(python_blocks(page)):
        if block.reason:
            skipped.append(f"{page}:{block.line}: {block.reason}")
            continue
        exec(BETWEEN.get((page, number), ""), names)
        exec(compile("\n" * block.line + block.code, ROOT / page, "exec"), names)
    if skipped:
        pytest.skip("all but these blocks ran: " + "; ".join(skipped))


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_ours_parse(page):
    group = typer.main.get_command(app)
    for words in commands(page, "increlora"):
        assert words[1] in group.commands, f"{page}: {' '.join(words)}: no such command"
        command = group.commands[words[1]]
        context = command.context_class(command, info_name=words[1])
        given, _, _ = command.make_parser(context).parse_args([w for w in words[2:] if w != "…"])
        if words[1] == "train":
            from_flags(TrainSettings, {name: text for name, text in given.items() if name in FLAGS})
            parse_options(given.get("method") or "increlora", given.get("set_") or [], given.get("preset"))


@pytest.mark.parametrize("page", PAGES)
def test_scripts_on_the_pages_exist_and_know_their_options(page, monkeypatch):
    for program in ("python", "torchrun", "accelerate launch"):
        for words in commands(page, program):
            script = next((n for n, word in enumerate(words) if word.endswith(".py")), None)
            if script is not None:
                monkeypatch.setattr(sys, "argv", words[script:])
                assert parsed(ROOT / words[script]), f"{page}: {' '.join(words)}"


def parsed(script: Path) -> bool:
    """Does a script accept its command line? It is stopped where it would begin."""

    class Accepted(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def stop(self, *args):
        parse(self, *args)
        raise Accepted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.syspath_prepend(script.parent)  # as Python does with the script it runs
        with pytest.raises(Accepted):
            runpy.run_path(str(script), run_name="__main__")
    return True


@pytest.mark.parametrize("page", PAGES)
def test_tests_on_the_pages_exist(page):
    for file, name in TEST.findall((ROOT / page).read_text()):
        path = ROOT / "tests" / file
        assert path.is_file() and (not name or f"def {name}(" in path.read_text()), f"{page}: {file}::{name}"


@pytest.mark.parametrize("page", PAGES)
def test_lines_are_short_enough_to_edit(page):
    long = [f"{page}:{number}: {len(line)} characters" for number, line in prose(page) if len(line) > LONGEST]
    assert not long, "\n".join(long)


def prose(page: str) -> Iterator[tuple[int, str]]:
    """(number, line) of a page, without code, hidden checks, tables, and the targets of links."""
    text = CODE.sub(lambda found: "\n" * found[0].count("\n"), (ROOT / page).read_text())
    for number, line in enumerate(text.splitlines(), 1):
        if not line.startswith(("|", "    ")):
            yield number, re.sub(r"\]\([^)]*\)", "]", line)


@pytest.mark.parametrize(
    ("text", "found"),
    (
        ("a\n" + "b" * 121, True),
        ("b" * 120, False),
        ("- " + "b" * 119, True),
        (f"[{'b' * 100}](https://example.org/{'c' * 100})", False),
        (f"| {'b' * 121} |", False),
        (f"```sh\n{'b' * 121}\n```\n", False),
        (f"<!-- test:\n{'b' * 121}\n-->\n", False),
        (f"```sh\nb\n```\n{'b' * 121}", True),
    ),
)
def test_a_long_line_would_be_seen(text, found, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.docs.test_pages.ROOT", tmp_path)
    (tmp_path / "page.md").write_text(text)
    assert any(len(line) > LONGEST for _, line in prose("page.md")) == found


def test_shown_files_are_examples():
    shown = {path for page in PAGES for path in snippets(page)}
    assert shown == {str(path.relative_to(ROOT)) for path in (ROOT / "examples").glob("*.py")}


@pytest.mark.parametrize(
    ("text", "complaint"),
    (
        ("```sh\nincrelora train --rr 8\n```", "--rr"),
        ("see `increlora tarin`", "no such command"),
        ("Run:\n\n    increlora train --set top=3 # all of it\n", "no such option; did you mean 'top_h'"),
        ("```sh\nincrelora train \\\n  --sead 1\n```", "--sead"),
        ("```sh\nincrelora train --r half\n```", "--r=half: give an int"),
    ),
)
def test_a_wrong_command_would_be_seen(text, complaint, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.docs.blocks.ROOT", tmp_path)
    (tmp_path / "page.md").write_text(text)
    with pytest.raises(Exception) as caught:
        test_commands_of_ours_parse("page.md")
    assert complaint in str(caught.value)


def test_a_wrong_option_of_a_script_would_be_seen(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["trainer.py", "--stepps", "1"])
    with pytest.raises(SystemExit):
        parsed(ROOT / "examples" / "trainer.py")

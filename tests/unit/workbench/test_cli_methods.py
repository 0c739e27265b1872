"""`increlora methods`: the packaged table, its reasons, JSON, and how it fits a terminal."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from increlora.registry import METHODS
from increlora.workbench.cli import methods as command
from increlora.workbench.cli.app import app

CAPABILITIES = json.loads(command.CAPABILITIES.read_text())["capabilities"]


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Makes a table in which every cell is a plain yes, but for those given."""

    def make(cells: dict[tuple[str, str], tuple[str, str]]) -> dict[str, Any]:
        yes = {"verdict": "yes", "reason": ""}
        found = {name: dict.fromkeys(METHODS, yes) for name in ("export", "resume", "DDP")}
        for (name, method), (verdict, reason) in cells.items():
            found[name][method] = {"verdict": verdict, "reason": reason}
        data = {"versions": {"torch": "9.8", "peft": "7.6"}, "meanings": {}, "capabilities": found}
        path = tmp_path / "capabilities.json"
        path.write_text(json.dumps(data))
        monkeypatch.setattr(command, "CAPABILITIES", path)
        return data

    return make


def call(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["methods", *words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_the_table_has_every_method_and_every_capability_on_one_screen() -> None:
    code, text = call()
    lines = text.splitlines()
    assert code == 0 and max(map(len, lines)) <= 120
    assert re.sub(r"[^\w ]", " ", lines[0]).split() == list(METHODS)
    shown = lines[2 : 2 + len(CAPABILITIES)]
    assert [line.partition("│")[0].strip() for line in shown] == list(CAPABILITIES)
    assert all(len(re.findall("yes|no", line.partition("│")[2])) == len(METHODS) for line in shown)


def test_a_narrow_terminal_gets_several_tables_and_no_name_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, text = call()
    heads = [line for line in text.splitlines() if "┃" in line]
    assert code == 0 and len(heads) == 2 and max(map(len, text.splitlines())) <= 80
    assert re.sub(r"[^\w ]", " ", " ".join(heads)).split() == list(METHODS)
    assert all(text.count(f"{name} ") >= 2 for name in CAPABILITIES) and "…" not in text


def test_reasons_are_numbered_once_and_told_below(table: Any) -> None:
    table({
        ("resume", "lorta"): ("no", "lorta cannot: use lora"), ("resume", "mora"): ("no", "mora cannot: use lora"),
        ("export", "mora"): ("yes", "approximate"), ("DDP", "mora"): ("not probed", "no gloo"),
    })  # fmt: skip
    code, text = call("--method", "mora", "--method", "lorta")
    cells = {line.split("│")[0].strip(): [c.strip() for c in line.split("│")[1:]] for line in text.splitlines()}
    assert code == 0
    assert cells["export"] == ["yes 1", "yes"] and cells["resume"] == ["no 2", "no 2"]
    assert cells["DDP"] == ["– 3", "yes"]
    assert [line.rstrip() for line in text.splitlines()[-4:]] == [
        "1  approximate", "2  the method cannot: use lora", "3  no gloo", "Probed with torch 9.8, peft 7.6.",
    ]  # fmt: skip


def test_json_is_the_data_of_the_chosen_methods(table: Any) -> None:
    data = table({("resume", "sora"): ("no", "sora cannot: use lora")})
    code, text = call("--json", "--method", "sora")
    assert code == 0 and json.loads(text)["versions"] == data["versions"]
    assert json.loads(text)["capabilities"] == {
        name: {"sora": row["sora"]} for name, row in data["capabilities"].items()
    }
    assert json.loads(call("--json")[1]) == data


def test_an_unknown_method_names_the_nearest() -> None:
    code, text = call("--method", "adalore")
    assert code == 2 and text == "error: --method adalore: no such method; did you mean adalora?\n"

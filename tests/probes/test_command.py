"""`increlora methods`: the table, its reasons, JSON, and the exit code. The probes themselves are played."""

import json
import re
from typing import Any

import pytest
from typer.testing import CliRunner

from increlora import probes
from increlora.probes.outcome import Outcome
from increlora.probes.processes import PROBES as DISTRIBUTED
from increlora.registry import METHODS
from increlora.workbench.cli.app import app

REFUSAL = "no mixed batch: use one adapter per batch"


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Every probe says yes, but for those named here; as (probe, method) → outcome."""
    told: dict[str, Any] = {}

    def outcome_of(probe: Any, subject: Any) -> Outcome:
        name = next(name for name, known in probes.PROBES.items() if known is probe)
        return told.get((name, subject.method), Outcome("yes"))

    def in_processes(methods: Any) -> Any:
        return {(name, method): told.get((name, method), Outcome("yes")) for name in DISTRIBUTED for method in methods}

    monkeypatch.setattr(probes, "outcome_of", outcome_of)
    monkeypatch.setattr(probes.processes, "in_processes", in_processes)
    return told


def call(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["methods", *words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_the_table_has_every_method_and_every_capability_on_one_screen(played: dict) -> None:
    code, text = call()
    lines = text.splitlines()
    assert code == 0 and max(map(len, lines)) <= 120
    assert re.sub(r"[^\w ]", " ", lines[0]).split() == list(METHODS)
    assert [line.partition("│")[0].strip() for line in lines[2:]] == list(probes.MEANINGS)
    assert all(line.count("yes") == len(METHODS) for line in lines[2:])


def test_a_narrow_terminal_gets_several_tables_and_no_name_is_cut(
    played: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, text = call()
    heads = [line for line in text.splitlines() if "┃" in line]
    assert code == 0 and len(heads) == 2 and max(map(len, text.splitlines())) <= 80
    assert re.sub(r"[^\w ]", " ", " ".join(heads)).split() == list(METHODS)
    assert all(text.count(f"{name} ") >= 2 for name in probes.MEANINGS) and "…" not in text


def test_reasons_are_numbered_once_and_told_below(played: dict) -> None:
    for method in ("lorta", "mora"):
        played["mixed batch", method] = Outcome("no", f"x is no batch that {method} can mix: use lora")
    played["export", "mora"] = Outcome("yes", "approximate")
    played["DDP", "mora"] = Outcome("not probed", "no gloo")
    code, text = call("--method", "mora", "--method", "lorta")
    cells = {line.split("│")[0].strip(): [c.strip() for c in line.split("│")[1:]] for line in text.splitlines()}
    assert code == 0
    assert cells["mixed batch"] == ["no 2", "no 2"] and cells["export"] == ["yes 1", "yes"]
    assert cells["DDP"] == ["– 3", "yes"]
    foot = [line.rstrip() for line in text.splitlines()[-3:]]
    assert foot == ["1  approximate", "2  x is no batch that the method can mix: use lora", "3  no gloo"]


def test_json_says_the_same_and_reads_back(played: dict) -> None:
    played["resume", "sora"] = Outcome("no", REFUSAL)
    code, text = call("--json", "--method", "sora")
    table = probes.from_data(json.loads(text))
    assert code == 0 and table["resume"]["sora"] == Outcome("no", REFUSAL)
    assert probes.as_data(table) == json.loads(text)
    assert set(json.loads(text)["versions"]) == {"torch", "peft", "transformers"}


def test_anything_broken_is_exit_code_1(played: dict) -> None:
    played["FSDP2", "lora"] = Outcome("broken", "hangs")
    code, text = call("--method", "lora")
    assert code == 1 and "BROKEN 1" in text and "1  hangs" in text
    assert call("--method", "lora", "--json")[0] == 1


def test_an_unknown_method_names_the_nearest() -> None:
    code, text = call("--method", "adalore")
    assert code == 2 and text == "error: --method adalore: no such method; did you mean adalora?\n"

"""`python -m tests.probes`: what it prints, when it writes, and the exit code. The probes themselves are played."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from increlora.registry import METHODS
from increlora.workbench.cli import methods as command
from tests import probes
from tests.probes.outcome import Outcome
from tests.probes.processes import PROBES as DISTRIBUTED


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Every probe says yes, but for those named here; as (probe, method) → outcome."""
    outcomes: dict[str, Any] = {}

    def outcome_of(probe: Any, subject: Any) -> Outcome:
        name = next(name for name, known in probes.PROBES.items() if known is probe)
        return outcomes.get((name, subject.method), Outcome("yes"))

    def in_processes(methods: Any) -> Any:
        cells = [(name, method) for name in DISTRIBUTED for method in methods]
        return {cell: outcomes.get(cell, Outcome("yes")) for cell in cells}

    monkeypatch.setattr(probes, "outcome_of", outcome_of)
    monkeypatch.setattr(probes.processes, "in_processes", in_processes)
    return outcomes


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where `--write` writes."""
    path = tmp_path / "capabilities.json"
    monkeypatch.setattr(command, "CAPABILITIES", path)
    return path


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> Any:
    """The exit code, or the message instead of one."""
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "argv", ["tests.probes", *words])
    with pytest.raises(SystemExit) as exit:
        runpy.run_module("tests.probes", run_name="__main__")
    return exit.value.code


def test_a_complete_table_is_written_and_reads_back(
    played: dict, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    played["resume", "sora"] = Outcome("no", "sora cannot: use lora")
    assert call(monkeypatch) == 0 and not written.exists()
    assert call(monkeypatch, "--write") == 0
    data = json.loads(written.read_text())
    table = probes.table_of(data)
    assert table["resume"]["sora"] == Outcome("no", "sora cannot: use lora") and probes.as_data(table) == data
    assert set(data["versions"]) == {"torch", "peft", "transformers"}
    assert all(list(row) == list(METHODS) for row in table.values())


def test_an_incomplete_table_is_not_written(played: dict, written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    played["quantised base", "mora"] = Outcome("not probed", "not installed")
    assert call(monkeypatch) == 0
    message = call(monkeypatch, "--write")
    assert message == "nothing written: quantised base of mora is not probed" and not written.exists()
    assert call(monkeypatch, "--write", "--method", "lora") == 2 and not written.exists()


def test_anything_broken_is_exit_code_1(
    played: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    played["FSDP2", "lora"] = Outcome("broken", "hangs")
    assert call(monkeypatch, "--method", "lora") == 1
    text = capsys.readouterr().out
    assert "BROKEN 1" in text and "1  hangs" in text

"""`increlora report`: where it writes, and one sentence for what it cannot read."""

import re
import sys

import pytest
from typer.testing import CliRunner

from increlora.workbench.cli.app import app
from increlora.workbench.report import writing
from increlora.workbench.report.figures import FIGURES

from .folders import write_run


@pytest.fixture(autouse=True)
def without_vega(monkeypatch):
    """Putting Vega together takes seconds, and no browser opens these pages."""
    monkeypatch.setattr(writing, "vega", lambda: "'vega'")


def call(*words):
    result = CliRunner().invoke(app, ["report", *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_one_run_has_its_report_beside_it(tmp_path):
    run = write_run(tmp_path / "run")
    assert call(run).exit_code == 0
    assert f"increlora report {run}</code>" in (run / "report.html").read_text()


def test_several_runs_share_one_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [write_run(tmp_path / name) for name in ("a", "b")]
    assert call(*runs).output == "written to report.html\n"
    assert (tmp_path / "report.html").read_text().count("<article") == 2
    call(*runs, "--out", "other.html")
    assert (tmp_path / "other.html").is_file() and not (runs[0] / "report.html").exists()


def test_figures_of_several_runs_have_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(writing, "FIGURES", FIGURES[1:3])  # drawing all of them takes seconds
    runs = [write_run(tmp_path / name / "run") for name in ("a", "b")]
    assert "4 figures written" in call(*runs, "--figures", "figures").output
    found = {path.relative_to(tmp_path / "figures").as_posix() for path in (tmp_path / "figures").rglob("*.svg")}
    assert found == {f"{i}-run/{figure.name}.svg" for i in (1, 2) for figure in FIGURES[1:3]}


@pytest.mark.parametrize("words", [["nowhere"], ["."], [], ["x", "--format", "gif"]])
def test_what_cannot_be_read_is_one_sentence(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    result = call(*words)
    assert result.exit_code == 2 and re.fullmatch(r"error: .+\n", result.stderr)
    assert not list(tmp_path.iterdir())


def test_without_its_libraries_the_command_names_the_extra(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("increlora.workbench.report")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "altair", None)
    result = call(write_run(tmp_path / "run"))
    assert result.stderr == "error: reports need altair: pip install 'increlora[report]'\n"

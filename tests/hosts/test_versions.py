"""Versions outside the tested window are told once, at import; the windows are those that pip installs by."""

import subprocess
import sys
import tomllib
import warnings
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from increlora.hosts.versions import TESTED, VersionWarning, warn_untested

ROOT = Path(__file__).parents[2]


def play(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name in versions and versions[name] is None:
            raise metadata.PackageNotFoundError(name)
        return versions.get(name) or real(name)

    monkeypatch.setattr(metadata, "version", version)


@pytest.mark.parametrize(("name", "version"), [
    ("peft", "0.20.1"), ("peft", "0.23.0"), ("peft", "0.23.1.dev0"), ("transformers", "4.57.0"),
    ("transformers", "6.0.0.dev0"), ("torch", "2.6.1+cu124"),
])  # fmt: skip
def test_a_version_outside_is_told_with_its_window(name: str, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, **{name: version})
    with pytest.warns(VersionWarning) as told:
        warn_untested()
    assert [str(w.message) for w in told] == [f"increlora is not tested with {name} {version} (tested: {TESTED[name]})"]


def test_several_are_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, torch="2.0", peft="1.0")
    with pytest.warns(VersionWarning, match=r"torch 2.0 \(tested: .*\), peft 1.0 \(tested: ") as told:
        warn_untested()
    assert len(told) == 1


def test_versions_inside_and_unknown_ones_are_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, torch="2.14.0.dev20260101+cpu", peft="0.22.0", transformers=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_untested()


def test_the_windows_are_those_of_the_package_and_hold_the_versions_of_the_tests() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = [*project["dependencies"], *project["optional-dependencies"]["cli"]]
    wanted = {r.name: r.specifier for r in map(Requirement, listed)}
    pins = dict(line.split("==") for line in (ROOT / "constraints-dev.txt").read_text().splitlines() if "==" in line)
    for name, window in TESTED.items():
        assert SpecifierSet(window) == wanted[name], name
        assert SpecifierSet(window).contains(pins[name]), name


def test_importing_tells_it_once_and_first() -> None:
    """With a release that is too old, what is imported next may well fail."""
    script = """
import importlib.metadata as metadata, warnings
real = metadata.version
metadata.version = lambda name: "0.1" if name == "peft" else real(name)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    import increlora, increlora.hosts.peft
print([str(w.message) for w in told if w.category.__name__ == "VersionWarning"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == f"['increlora is not tested with peft 0.1 (tested: {TESTED['peft']})']\n"

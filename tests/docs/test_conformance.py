"""The page on peft's tests shows the committed run, and that run is of the peft that is pinned, whole and green."""

import json
from collections import Counter

from tests.conformance.cases import CLASSES
from tests.conformance.run import HERE
from tests.conformance.verdict import read_allowed, too_many
from tests.docs.blocks import ROOT
from tests.docs.test_reference import generate, rows  # noqa: F401  a fixture

SUMMARY = json.loads((ROOT / "docs" / "conformance.json").read_text())
TOTALS = sum(map(Counter, SUMMARY["counts"].values()), Counter())


def test_the_committed_run_is_whole_and_green():
    assert f"peft=={SUMMARY['peft']}\n" in (ROOT / "constraints-dev.txt").read_text()
    assert set(SUMMARY["counts"]) == set(CLASSES)
    allowed = read_allowed(HERE / "allowed.toml")
    assert set(SUMMARY["explained"]) <= {entry.tests for entry in allowed}
    assert set(SUMMARY["explained"]) >= {entry.tests for entry in allowed if not entry.may_pass}
    assert sum(SUMMARY["explained"].values()) == TOTALS["allowed"] and not too_many(TOTALS)
    assert not TOTALS["failed"]


def test_the_page_shows_it(generate):  # noqa: F811
    page = generate.on_page_markdown((ROOT / "docs" / "conformance.md").read_text())
    shown = rows(page, "## What comes out")
    assert shown[-1] == ["all", *(f"{TOTALS[kind]:,}" for kind in shown[0][1:])]
    assert [row[0].strip("`") for row in shown[2:-1]] == sorted(CLASSES)
    assert [row[2] for row in rows(page, "## Allowed failures")[2:]] == [
        entry.reason for entry in read_allowed(HERE / "allowed.toml")
    ]
    assert len(rows(page, "## Cases left out")) > 2

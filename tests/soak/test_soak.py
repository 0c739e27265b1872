"""Processes killed by SIGKILL at any moment: what is on disk is old or new and whole, and runs go on bitwise.

`make soak` (INCRELORA_SOAK=1) kills more often than `make test`, and runs of every method.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.catalogue import METHODS

SOAK = os.environ.get("INCRELORA_SOAK") == "1"
KILLS = 8 if SOAK else 2  # of each run: at file operations and at random moments
SOAKED = list(METHODS) if SOAK else ["increlora"]

pytestmark = [pytest.mark.soak, pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")]


def run(worker: str, *words: Any) -> dict[str, Any]:
    """What a worker prints last."""
    command = [sys.executable, "-m", f"tests.soak.{worker}", *map(str, words)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_files_and_folders_are_old_or_new_wherever_their_writing_is_killed(tmp_path: Path) -> None:
    found = run("files_worker", tmp_path)
    assert found["write_folder True"][0] > 5 and found["write_in_two True"][0] > found["write_folder True"][0]
    assert not any(wrong for _, wrong in found.values()), found


@pytest.mark.slow
@pytest.mark.timeout(3600 if SOAK else 300)
def test_runs_that_are_killed_end_as_straight_ones(tmp_path: Path) -> None:
    found = run("train_worker", tmp_path, KILLS, 0, *SOAKED)
    assert not any(of_run["differences"] for of_run in found.values()), found
    assert all(found[method]["kills"] == KILLS for method in SOAKED)
    assert found["begin True"]["kills"] > found["begin False"]["kills"] > 3
    assert not SOAK or sum(of_run["kills"] for of_run in found.values()) >= 50

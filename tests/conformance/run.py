"""Runs peft's tests on our methods, in a process of their own: its warnings and its options are not ours."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import increlora

from .fetch import suite
from .plugin import MODULES

HERE = Path(__file__).parent
NOT_OURS = ("COVERAGE_PROCESS_START", "COVERAGE_PROCESS_CONFIG", "PYTEST_ADDOPTS")


@dataclass(frozen=True)
class Run:
    """outcomes: test id → (outcome, first line of the message).   left_out: config class → reason → cases."""

    outcomes: dict[str, tuple[str, str]]
    left_out: dict[str, dict[str, int]]


def run(modules: Sequence[str] = MODULES, *options: str, timeout: float | None = None) -> Run:
    """Run these modules of peft's tests. Raises FetchError, or RuntimeError with pytest's output if it breaks."""
    source = suite()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = Path(folder, "outcomes.json")
        command = [
            sys.executable, "-m", "pytest", "-p", "conformance.plugin", "-p", "no:cacheprovider", "--quiet", "--tb=no",
            "-c", str(source / "pyproject.toml"), "--rootdir", str(source), "-o", "addopts=", "-o", "filterwarnings=",
            "--outcomes", str(outcomes), *options, *(str(source / "tests" / f"{name}.py") for name in modules),
        ]  # fmt: skip
        done = subprocess.run(command, cwd=folder, env=environment(source), timeout=timeout, **OUTPUT)
        if done.returncode not in (0, 1) or not outcomes.exists():  # 1: some tests failed
            raise RuntimeError(f"pytest broke ({done.returncode}):\n{done.stdout[-5000:]}")
        return Run(**json.loads(outcomes.read_text()))


OUTPUT: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}


def environment(source: Path) -> dict[str, str]:
    """`tests` is peft's there, the plugin `conformance`, and nothing asks a network."""
    ours = Path(increlora.__file__).parents[1]
    kept = {name: value for name, value in os.environ.items() if name not in NOT_OURS}
    return kept | {
        "PYTHONPATH": os.pathsep.join(map(str, (source, HERE.parent, ours))), "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error",
    }  # fmt: skip

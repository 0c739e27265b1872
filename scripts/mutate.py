"""Does a test notice? Applies one-line changes to formulas, one at a time, each in a copy, and expects red.

    PYTHONPATH=.venv/quantised .venv/bin/python scripts/mutate.py [--jobs N] [--only TEXT]

The changes are in scripts/mutations.toml: a file below src/increlora, the text to find (once in that file), what to put
there, and the tests that must fail. The named tests must pass on the unchanged tree first. Exits with 1 if a change
survives, breaks the collection of tests instead of failing one, or takes too long.

The expensive imports happen once; every trial is a fork of this process.
"""

import argparse
import multiprocessing as mp
import os
import shutil
import sys
import tempfile
import time
import tomllib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 300  # seconds a trial may take
PASSED, FAILED, BROKEN = 0, 1, 70  # pytest's exit codes, and ours where pytest itself does not run
IMPORTED_BEFORE = "ignore::pytest.PytestAssertRewriteWarning"


@dataclass(frozen=True)
class Mutation:
    """One change. `tests`: pytest node ids."""

    name: str
    file: str
    find: str
    replace: str
    tests: tuple[str, ...]

    def check(self) -> None:
        """Exit with a message if the text is not there exactly once: the formula has changed, so must this entry."""
        count = (ROOT / "src/increlora" / self.file).read_text().count(self.find)
        if count != 1 or self.find == self.replace:
            sys.exit(f"{self.name}: {self.find!r} occurs {count} times in {self.file}; mend scripts/mutations.toml")

    def apply(self, tree: Path) -> None:
        path = tree / "src/increlora" / self.file
        path.write_text(path.read_text().replace(self.find, self.replace))


@dataclass
class Trial:
    """A running pytest in a copy of the tree; `mutation` is None for the unchanged one."""

    mutation: Mutation | None
    process: BaseProcess
    tree: Path
    started: float

    def verdict(self) -> str:
        code = self.process.exitcode
        if code is None:
            self.process.kill()
            return "too slow"
        return {PASSED: "survived", FAILED: "killed"}.get(code, f"broken ({code})")


def load(only: str) -> list[Mutation]:
    entries = tomllib.loads((ROOT / "scripts/mutations.toml").read_text())["mutation"]
    mutations = [Mutation(**{**entry, "tests": tuple(entry["tests"])}) for entry in entries]
    chosen = [m for m in mutations if only in m.name or only in m.file]
    for mutation in chosen:
        mutation.check()
    return chosen


def copy_tree(target: Path) -> None:
    for name in ("src", "tests"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    shutil.copy(ROOT / "pyproject.toml", target)


def import_once() -> None:
    """What every test file needs, imported before the first fork; never the library itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import hypothesis  # noqa: F401
        import peft  # noqa: F401
        import pytest  # noqa: F401
        import torch  # noqa: F401
        import transformers.trainer  # noqa: F401
    assert "increlora" not in sys.modules


def run_tests(tree: Path, tests: Sequence[str]) -> None:
    """In the fork: pytest on the copy, its output in `tree`/output."""
    import pytest
    import torch

    torch.set_num_threads(1)
    sys.dont_write_bytecode = True
    sys.path[:0] = [str(tree / "src"), str(tree)]
    os.chdir(tree)
    for stream in (1, 2):
        os.dup2(os.open("output", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    code: int = BROKEN
    try:
        code = pytest.main([*tests, "-q", "-x", "-p", "no:cacheprovider", "-p", "no:cov", "-W", IMPORTED_BEFORE])
    finally:
        sys.stdout.flush()
        os._exit(code)


def start(mutation: Mutation | None, tests: Sequence[str], folder: Path, number: int) -> Trial:
    tree = folder / str(number)
    copy_tree(tree)
    if mutation is not None:
        mutation.apply(tree)
    process = mp.get_context("fork").Process(target=run_tests, args=(tree, tests))
    process.start()
    return Trial(mutation, process, tree, time.monotonic())


def run_all(mutations: Sequence[Mutation], jobs: int, folder: Path) -> list[tuple[str, Mutation | None]]:
    """The unchanged tree and all mutations, `jobs` at a time; prints a line each; returns (verdict, mutation)."""
    everything = tuple(sorted({test for m in mutations for test in m.tests}))
    waiting: list[tuple[Any, Sequence[str]]] = [(None, everything), *((m, m.tests) for m in mutations)]
    running: list[Trial] = []
    results: list[tuple[str, Mutation | None]] = []
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(start(*waiting.pop(0), folder, len(waiting)))
        wait([t.process.sentinel for t in running], timeout=5)
        for trial in [t for t in running if t.process.exitcode is not None or time.monotonic() - t.started > LIMIT]:
            running.remove(trial)
            results.append((report(trial), trial.mutation))
            shutil.rmtree(trial.tree)
    return results


def report(trial: Trial) -> str:
    """Print one row of the table, and the output of pytest where it is not what was hoped for."""
    verdict, seconds = trial.verdict(), time.monotonic() - trial.started
    name, file = (trial.mutation.name, trial.mutation.file) if trial.mutation else ("(unchanged)", "")
    if trial.mutation is None:
        verdict = "green" if verdict == "survived" else f"red: {verdict}"
    print(f"{verdict:<10} {seconds:5.1f} s  {file:<28} {name}", flush=True)
    if verdict not in ("killed", "green"):
        print((trial.tree / "output").read_text()[-3000:], flush=True)
    return verdict


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="trials at a time (default: all cores)")
    parser.add_argument("--only", default="", help="mutations whose name or file contains this text")
    options = parser.parse_args()
    mutations = load(options.only)
    if not mutations:
        sys.exit(f"no mutation's name or file contains {options.only!r}")
    import_once()
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        results = run_all(mutations, options.jobs, Path(folder))
    bad = [(verdict, m) for verdict, m in results if verdict not in ("killed", "green")]
    print(f"\n{len(mutations)} mutations, {sum(v == 'killed' for v, _ in results)} killed")
    for verdict, mutation in bad:
        print(f"  {verdict}: {mutation.name if mutation else 'the unchanged tree, so no other verdict counts'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

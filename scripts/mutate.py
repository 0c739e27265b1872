"""Does a test notice? Changes formulas, one at a time, each in a copy, and expects red.

    PYTHONPATH=.venv/quantised .venv/bin/python scripts/mutate.py [--jobs N] [--only TEXT] [--every N] [--check]

The changes are in scripts/mutations.toml. Each names a function, an expression in it, what to put there, and the tests
that must fail. Files are not named, and code is compared as Python reads it, so a change survives moves and formatting.
The named tests must pass on the unchanged tree first. Exits with 1 if a change survives, breaks the collection of tests
instead of failing one, or takes too long.

The expensive imports happen once; every trial is a fork of this process.
"""

import argparse
import ast
import multiprocessing as mp
import os
import re
import shutil
import sys
import tempfile
import time
import tomllib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "increlora"
LIMIT = 300  # seconds a trial may take
PASSED, FAILED, BROKEN = 0, 1, 70  # pytest's exit codes, and ours where pytest itself does not run
IMPORTED_BEFORE = "ignore::pytest.PytestAssertRewriteWarning"


class StaleError(Exception):
    """An entry that fits the code or the tests no more: the formula has changed, so must the entry."""


@dataclass(frozen=True)
class Mutation:
    """One change.

    Attributes:
        function: name or Class.name of the function it is in.   find, replace: Python expressions.
        tests: names of test functions, with a file where several have the name: `test_mora.py::test_gradcheck`.
    """

    name: str
    function: str
    find: str
    replace: str
    tests: tuple[str, ...]

    def place(self) -> tuple[Path, ast.expr]:
        """The file, and the expression in its parsed source. Raises StaleError unless it is there exactly once."""
        wanted = ast.dump(ast.parse(self.find, mode="eval").body)
        found = [
            (path, node)
            for path, function in functions(self.function)
            for node in ast.walk(function)
            if isinstance(node, ast.expr) and ast.dump(node) == wanted
        ]
        if len(found) != 1:
            raise StaleError(f"{self.name}: {self.find!r} occurs {len(found)} times in a function {self.function}")
        return found[0]

    def nodes(self) -> list[str]:
        """The tests as pytest wants them. Raises StaleError for a name that no file has, or several have."""
        return [node_id(test) for test in self.tests]

    def apply(self, tree: Path) -> Path:
        """Change a copy of the repository; returns the file, relative to src/increlora."""
        path, node = self.place()
        relative = path.relative_to(SOURCE)
        lines = path.read_bytes().splitlines(keepends=True)  # positions are counted in bytes
        assert node.end_lineno is not None and node.end_col_offset is not None
        before = b"".join(lines[: node.lineno - 1]) + lines[node.lineno - 1][: node.col_offset]
        after = lines[node.end_lineno - 1][node.end_col_offset :] + b"".join(lines[node.end_lineno :])
        (tree / "src/increlora" / relative).write_bytes(before + f"({self.replace})".encode() + after)
        return relative


@cache
def parsed() -> list[tuple[Path, ast.Module]]:
    return [(path, ast.parse(path.read_text())) for path in sorted(SOURCE.rglob("*.py"))]


def functions(name: str) -> Iterator[tuple[Path, ast.FunctionDef]]:
    """Every function called `name`, or `Class.name`, in the library."""
    for path, module in parsed():
        for qualified, function in inside(module):
            if f".{qualified}".endswith(f".{name}"):
                yield path, function


def inside(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """(qualified name, definition) of the functions of a module or class."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef):
            yield prefix + child.name, child
        elif isinstance(child, ast.ClassDef):
            yield from inside(child, f"{prefix}{child.name}.")


@cache
def tests_by_name() -> dict[str, list[str]]:
    """Test function → the files that define it."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for name in re.findall(r"^def (test_\w+)\(", path.read_text(), re.MULTILINE):
            found.setdefault(name, []).append(str(path.relative_to(ROOT)))
    return found


def node_id(test: str) -> str:
    file, _, name = test.rpartition("::")
    files = [path for path in tests_by_name().get(name, []) if f"/{path}".endswith(f"/{file}" if file else "")]
    if len(files) != 1:
        raise StaleError(f"{test} is in {len(files)} files of tests: {', '.join(files)}")
    return f"{files[0]}::{name}"


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


def load(only: str = "") -> list[Mutation]:
    entries = tomllib.loads((ROOT / "scripts/mutations.toml").read_text())["mutation"]
    mutations = [Mutation(**{**entry, "tests": tuple(entry["tests"])}) for entry in entries]
    return [m for m in mutations if only in m.name or only in m.function]


def stale(mutations: Sequence[Mutation]) -> list[str]:
    """What is wrong with entries that fit no more."""
    messages = []
    for mutation in mutations:
        try:
            mutation.place()
            mutation.nodes()
        except StaleError as error:
            messages.append(str(error))
    return messages


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
    everything = tuple(sorted({test for m in mutations for test in m.nodes()}))
    waiting: list[tuple[Any, Sequence[str]]] = [(None, everything), *((m, m.nodes()) for m in mutations)]
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
    name, where = (trial.mutation.name, trial.mutation.function) if trial.mutation else ("(unchanged)", "")
    if trial.mutation is None:
        verdict = "green" if verdict == "survived" else f"red: {verdict}"
    print(f"{verdict:<10} {seconds:5.1f} s  {where:<28} {name}", flush=True)
    if verdict not in ("killed", "green"):
        print((trial.tree / "output").read_text()[-3000:], flush=True)
    return verdict


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="trials at a time (default: all cores)")
    parser.add_argument("--only", default="", help="mutations whose name or function contains this text")
    parser.add_argument("--every", type=int, default=1, help="a sample: every so many-th of them")
    parser.add_argument("--check", action="store_true", help="only say which entries fit the code no more")
    options = parser.parse_args()
    mutations = load(options.only)[:: options.every]
    if not mutations:
        sys.exit(f"no mutation's name or function contains {options.only!r}")
    if messages := stale(mutations):
        sys.exit("\n".join([*messages, "change scripts/mutations.toml"]))
    if options.check:
        return 0
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

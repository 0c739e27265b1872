"""Writes files and folders again and again, and is killed at every single file operation; prints what went wrong.

A process of its own, without torch: whoever forks should have no threads."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

from tests.soak.killing import attempt

SOURCE = Path(__file__).parents[2] / "src" / "increlora" / "files.py"
spec = importlib.util.spec_from_file_location("files", SOURCE)
assert spec is not None and spec.loader is not None
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)


def write_file(path: Path, text: str) -> None:
    files.write_text(path, text)


def write_folder(path: Path, text: str) -> None:
    with files.whole(path) as new:
        new.mkdir()
        for name in "abc":
            (new / name).write_text(text)


def write_in_two(path: Path, text: str) -> None:
    """Where the system cannot exchange two names."""
    files._exchange = lambda one, other: False
    write_folder(path, text)


def content(path: Path) -> str:
    """What is there: the text of a file, or of a folder with three files; or what it is instead."""
    if path.is_dir():
        texts = {file.name: file.read_text() for file in path.iterdir()}
        return texts["a"] if texts.keys() == {*"abc"} and len({*texts.values()}) == 1 else str(texts)
    return path.read_text() if path.exists() else "nothing"


def check(root: Path, write: Callable[[Path, str], None], *, before: bool) -> tuple[int, list[str]]:
    """Kill the writing at each operation in turn. Returns how often, and what was then wrong."""
    wrong, killed = [], 0
    while True:
        folder = root / f"{write.__name__}-{before}-{killed}"
        folder.mkdir()
        path = folder / "target"
        if before:
            write_folder(path, "old") if write is not write_file else write_file(path, "old")
        if attempt(lambda path=path: write(path, "new"), at=killed):
            return killed, wrong
        there, old = content(path), "old" if before else "nothing"
        put_aside = write is write_in_two and there == "nothing" and any(content(p) == "old" for p in folder.iterdir())
        if there not in (old, "new") and not put_aside:
            wrong.append(f"{folder.name}: {there} after the kill")
        attempt(lambda path=path: begin(path))
        if (there := content(path)) not in (old, "new") or [*folder.iterdir()] != [path][: there != "nothing"]:
            wrong.append(f"{folder.name}: {there} beside {sorted(p.name for p in folder.iterdir())} when it is tidied")
        attempt(lambda path=path: write(path, "third"))
        if content(path) != "third" or [*folder.iterdir()] != [path]:
            wrong.append(f"{folder.name}: {content(path)} beside {sorted(p.name for p in folder.iterdir())} at the end")
        killed += 1


def begin(path: Path) -> None:
    """Another process begins to write there, and fails."""
    try:
        with files.whole(path):
            raise OSError("no space left on device")
    except OSError:
        pass


if __name__ == "__main__":
    writers = [write_file, write_folder, write_in_two]
    found = {f"{w.__name__} {b}": check(Path(sys.argv[1]), w, before=b) for w in writers for b in (False, True)}
    print(json.dumps(found))

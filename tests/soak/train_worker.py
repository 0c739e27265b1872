"""Kills training runs and resumes them, again and again; prints how they differ from straight ones.

A process of its own that computes nothing itself: every run is a fork of it, with all imports done."""

import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from increlora.workbench.cli import run as imported_for_all_forks
from increlora.workbench.cli.app import app
from increlora.workbench.runs import RunFolder
from tests.catalogue import METHODS
from tests.hosts.bases import write_character_bert
from tests.soak import killing

assert imported_for_all_forks
SIZES = "--r 2 --epochs 1.25 --batch-size 8 --max-length 16 --max-train-samples 64 --max-eval-samples 20"  # 10 steps
TRACES = ("metrics.jsonl", "events.jsonl", "trace.jsonl", "spectra.jsonl")


def command(words: list[str], log: Path) -> None:
    """`increlora` with these words, its output in a file."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1), os.dup2(out, 2)
    torch.set_num_threads(1)
    try:
        app(words, prog_name="increlora")
    except SystemExit as end:
        if end.code:
            raise


def counting(work: Callable[[], None], report: Path) -> None:
    """Do the work, and write down how many file operations it took."""
    done = [0]
    sys.addaudithook(lambda event, args: done.__setitem__(0, done[0] + killing.changes_a_file(event, args)))
    work()
    report.write_text(str(done[0]))


def content(folder: Path) -> dict[str, Any]:
    """All that a finished run leaves, without times; and what should not be left."""
    state = json.loads((folder / "run.json").read_text())
    found: dict[str, Any] = {key: state[key] for key in ("status", "metric", "metrics", "budget", "ranks")}
    for name in TRACES:
        rows = RunFolder(folder).rows(name)
        found[name] = [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
    for part in (part for part in ("adapter", "lora") if (folder / part).is_dir()):
        found[f"config of {part}"] = json.loads((folder / part / "adapter_config.json").read_text())
        tensors = load_file(folder / part / "adapter_model.safetensors")  # the order of metadata in a file is random
        found[part] = {name: (t.dtype, t.shape, t.numpy().tobytes()) for name, t in tensors.items()}
    found["left behind"] = [str(path) for path in folder.rglob(".*")]
    return found


def soak(method: str, root: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kill and resume until there were so many kills and the run is finished."""
    row, log = METHODS[method], root / "log"
    write_character_bert(root / "model")
    options = {**row.options, **row.needs.get("llama", ({},))[0]}
    chosen = [word for key, value in options.items() for word in ("--set", f"{key}={value}")]
    start = ["train", "--model", str(root / "model"), "--method", method, *SIZES.split(), *chosen]
    began = time.monotonic()
    killing.attempt(partial(counting, partial(command, [*start, "--out", str(root / "a")], log), root / "count"))
    seconds, operations = time.monotonic() - began, int((root / "count").read_text())
    expected, random_of, done, differences = content(root / "a"), random.Random(f"{method} {seed}"), 0, list[str]()
    out = root / "b"
    while True:
        resumable = (RunFolder(out).state() or {}).get("status") == "running"
        words = ["train", "--resume"] if resumable else [*start, "--overwrite"]
        at = random_of.randrange(operations) if done % 2 else None
        after = None if done % 2 else random_of.uniform(0, seconds)
        how = {"at": at, "after": after} if done < kills else {}
        if not killing.attempt(partial(command, [*words, "--out", str(out)], log), **how):
            done += 1
            continue
        found = content(out)
        differences += [key for key in expected if found[key] != expected[key]]
        if done >= kills:
            return {"kills": done, "operations": operations, "seconds": seconds, "differences": differences}
        shutil.rmtree(out)


def begin(folder: RunFolder, name: str, status: str) -> None:
    folder.create(f"# increlora train {name}\n", {"status": status, "name": name}, overwrite=True)


def begun(root: Path, *, before: bool) -> dict[str, Any]:
    """Kill the beginning of a run at each file operation in turn, in an empty folder or over another run."""
    wrong, kills = [], 0
    while True:
        folder = RunFolder(root / f"{before}-{kills}")
        if before:
            begin(folder, "old", "finished")
            (folder.path / "adapter").mkdir()
            for file in ("adapter/old", "metrics.jsonl", "notes.txt"):
                (folder.path / file).write_text("old")
        if killing.attempt(partial(begin, folder, "new", "running"), at=kills):
            return {"kills": kills, "differences": wrong}
        state = folder.state() or {"status": "none", "name": "none"}
        old = {path for path in ("adapter/old", "metrics.jsonl") if (folder.path / path).exists()}
        if state["status"] == "running" and ("new" not in folder.config().read_text() or old):
            wrong.append(f"{folder.path.name}: a new run beside {sorted(old)}")
        if state["status"] == "finished" and len(old) < 2:
            wrong.append(f"{folder.path.name}: a finished run with {sorted(old)} alone")
        begin(folder, "third", "running")
        left = sorted(path.name for path in folder.path.iterdir())
        if left != ["config.toml", *["notes.txt"] * before, "run.json"] or "third" not in folder.config().read_text():
            wrong.append(f"{folder.path.name}: {left} in the end")
        kills += 1


if __name__ == "__main__":
    root, kills, seed = Path(sys.argv[1]), *map(int, sys.argv[2:4])
    (root / "begun").mkdir()
    found = {f"begin {before}": begun(root / "begun", before=before) for before in (False, True)}
    for method in sys.argv[4:]:
        (root / method).mkdir()
        found[method] = soak(method, root / method, kills, seed)
    print(json.dumps(found))

"""Run folders: what a run leaves on disk, written so that no crash leaves half a file, and read back.

    run/  config.toml  run.json  metrics.jsonl  events.jsonl  adapter/  lora/  checkpoints/

Files and folders appear whole (`files.py`). The two .jsonl files grow line by line while a run
goes on and are cut back to its checkpoint when it is resumed; a torn last line is not read.
"""

import contextlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import RunFolderError
from ..files import remove, write_text

FORMAT = "increlora-run/1"
FILES = (
    "config.toml", "metrics.jsonl", "events.jsonl", "trace.jsonl", "spectra.jsonl", "adapter", "lora", "checkpoints",
    "report.html", "run.json",
)  # fmt: skip
MARK = b"# increlora train "  # how config.toml begins
UNFINISHED = ("running", "interrupted", "failed")


class RunFolder:
    """A run on disk. Nothing is created before `create`, and nothing but a run's own files is ever deleted."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def state(self) -> dict[str, Any] | None:
        """Content of run.json; None if there is none. Raises RunFolderError if it is not one of ours."""
        try:
            found: dict[str, Any] = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise RunFolderError(f"{self.path}/run.json cannot be read ({error}); give another --out") from error
        check_format(self.path, found, "give another --out")
        return found

    def check_free(self, *, overwrite: bool) -> None:
        """May a new run start here? Raises RunFolderError if a run, or anything foreign, is in the way."""
        if self.path.exists() and not self.path.is_dir():
            raise RunFolderError(f"{self.path} is a file; give another --out")
        state = self.state()
        if state is None and self.path.is_dir() and not self.only_begun(overwrite=overwrite):
            raise RunFolderError(f"{self.path} holds files but no run of increlora; give another --out")
        if state is not None and not overwrite:
            resume = "continue it with --resume, " if state["status"] in UNFINISHED else ""
            remedy = f"{resume}replace it with --overwrite, or give another --out"
            raise RunFolderError(f"{self.path} already holds a run ({state['status']}); {remedy}")

    def only_begun(self, *, overwrite: bool) -> bool:
        """Is there nothing, or, to be overwritten, all that a run killed at its beginning leaves: its config.toml?"""
        names = {path.name for path in self.path.iterdir() if not path.name.startswith((".config.toml.", ".run.json."))}
        config = self.path / "config.toml"
        return not names or (overwrite and names == {config.name} and config.read_bytes().startswith(MARK))

    def create(self, config: str, state: Mapping[str, Any], *, overwrite: bool) -> None:
        """Start a run: remove the files of the one before (where allowed), write config.toml and run.json.

        Whenever it is killed, no run.json tells of a run that its config or its files do not belong to."""
        self.check_free(overwrite=overwrite)
        self.path.mkdir(parents=True, exist_ok=True)
        if (old := self.state()) is not None:
            self.write_state(old | {"status": "replaced"})
        for name in FILES[1:-1]:
            remove(self.path / name)
        write_text(self.path / "config.toml", config)
        self.write_state(state)

    def config(self) -> Path:
        """Settings file of the run that is here. Raises RunFolderError if there is no run, or none to continue."""
        state = self.state()
        if state is None:
            raise RunFolderError(f"{self.path} holds no run to resume; leave out --resume to start one")
        if state["status"] not in UNFINISHED:
            raise RunFolderError(f"{self.path} is {state['status']}: nothing is left to resume; give another --out")
        if not (self.path / "config.toml").is_file():
            raise RunFolderError(f"{self.path} has lost its config.toml: start the run anew with --overwrite")
        return self.path / "config.toml"

    def checkpoint(self) -> Path | None:
        """The latest complete checkpoint: its state file is the last one written."""
        for folder in sorted(self.path.glob("checkpoints/checkpoint-*"), key=checkpoint_step, reverse=True):
            with contextlib.suppress(OSError, ValueError):
                json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
                return folder
        return None

    def rewind(self, checkpoint: Path | None) -> None:
        """Cut the .jsonl files back to a checkpoint, or to the start."""
        done = checkpoint_step(checkpoint) if checkpoint else 0
        for name in ("metrics.jsonl", "trace.jsonl", "spectra.jsonl", "events.jsonl"):
            last = done - (name == "events.jsonl")  # events name their step, from 0; the others count steps done
            rows = [row for row in self.rows(name) if row["step"] <= last]
            write_text(self.path / name, "".join(map(json_line, rows)))

    def write_state(self, state: Mapping[str, Any]) -> None:
        write_text(self.path / "run.json", json.dumps(finite({"format": FORMAT, **state}), indent=2) + "\n")

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """Add a row to a .jsonl file."""
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json_line(row))

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Rows of a .jsonl file, without a torn last line; none if it is not there."""
        path = self.path / name
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return [json.loads(line) for line in text.split("\n")[:-1]]


def check_format(path: Path, state: Any, remedy: str) -> None:
    """Raise RunFolderError unless this content of run.json is one that this version reads."""
    written = str(state.get("format")) if isinstance(state, dict) else ""
    if not written.startswith("increlora-run/"):
        raise RunFolderError(f"{path}/run.json was not written by increlora; {remedy}")
    if written != FORMAT:
        raise RunFolderError(f"{path} has format {written}, this version reads {FORMAT}; upgrade increlora")


def checkpoint_step(folder: Path) -> int:
    """Optimizer steps done at a checkpoint, from its name."""
    found = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(found[1]) if found else -1


def finite(value: Any) -> Any:
    """The value as JSON has it: None for NaN and infinities, a sorted list for a set."""
    return json.loads(json.dumps(value, default=sorted), parse_constant=lambda name: None)


def json_line(row: Mapping[str, Any]) -> str:
    return json.dumps(finite(row)) + "\n"

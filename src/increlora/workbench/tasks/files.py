"""Rows out of files: Parquet, JSON, JSON lines, text; a split by the start of a file's name."""

import hashlib
import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from ...errors import TaskError
from .base import summary

TABLES = (".parquet", ".jsonl", ".json", ".txt")  # endings of data files in a folder; any other file is read as text
# By the start of a file's name: train_5k and dev.clean, but not trainer.
SPLIT = re.compile(
    r"(?:(?P<train>train)|(?P<validation>validation|valid|val|dev|eval)|(?P<test>test))(?![a-z])", re.IGNORECASE
)
VISIBLE = re.compile(r"\S")
HELD_OUT = 20  # one row in so many, where there is no validation file


@dataclass(frozen=True)
class Rows:
    """A table with rows, and the files it is from; messages count rows from 0."""

    origin: str
    table: pa.Table

    def __post_init__(self) -> None:
        if not len(self.table):
            raise TaskError(f"{self.origin} has no rows; name a file with some")

    def first(self, column: str) -> Any:
        """The first value of a column that is not null, or None."""
        return next(iter(self.table[column].drop_null()[:1].to_pylist()), None)

    def text(self, column: str, *, nulls: bool = False) -> list[str]:
        """The texts of a column; a null, where it is allowed, reads as an empty one. Raises TaskError for the rest."""
        values = self.table[column].to_pylist()
        for row, value in enumerate(values):
            if not isinstance(value, str) and not (nulls and value is None):
                found = "is null" if value is None else f"holds {value!r:.40}, not text,"
                raise TaskError(f"{self.origin}: column {column!r} {found} at row {row}; remove or correct it")
        return [value or "" for value in values]

    def sample(self, limit: int | None, seed: int) -> "Rows":
        """At most `limit` of the rows, drawn by `seed`, in their order."""
        return Rows(self.origin, self.table.take(draw(len(self.table), limit, seed)))

    def parts(self) -> tuple["Rows", "Rows"]:
        """The rows without their last twentieth, and that twentieth."""
        if len(self.table) < 2:
            raise TaskError(f"{self.origin} has one row only, so none can be held out; add rows")
        train, validation = held_out(self.table)
        return Rows(self.origin, train), Rows(self.origin, validation)


def read_splits(path: Path | None) -> tuple[Rows, Rows | None, str]:
    """What `--data` holds: training rows, validation rows (or else test rows; None: part of the training rows has to be
    held out), and their description for the record. A folder with a file for each, or a single file."""
    if path is None:
        raise TaskError("this task has no data of its own: name a file or folder by --data")
    files = split_files(path) if path.is_dir() else {"train": [path]}
    train, source = read_rows(files["train"]), f"training on {names(files['train'])}"
    other = files.get("validation") or files.get("test")
    if other is None:
        return train, None, f"{source} without its last twentieth, validation on that, {digest(files['train'])}"
    note = "" if "validation" in files else " (there is no validation file)"
    return train, read_rows(other), f"{source}, validation on {names(other)}{note}, {digest(files['train'] + other)}"


def split_files(folder: Path) -> dict[str, list[Path]]:
    """The data files of a folder by split, in order of their names; a file alone is for training."""
    found = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix.lower() in TABLES)
    files: dict[str, list[Path]] = {}
    for path in found:
        if match := SPLIT.match(path.name):
            files.setdefault(str(match.lastgroup), []).append(path)
    if not files and len(found) == 1:
        files["train"] = found
    if "train" not in files:
        there = names(found) or f"no {', '.join(TABLES)}"
        raise TaskError(f"{folder} has no training file but {there}; give one a name like train.parquet")
    return files


def read_rows(paths: Sequence[Path]) -> Rows:
    """The rows of all files, one after the other."""
    tables = [read_table(path) for path in paths]
    for path, table in zip(paths, tables, strict=True):
        if set(table.column_names) != set(tables[0].column_names):
            raise TaskError(
                f"{path} has the columns {', '.join(table.column_names)} but {paths[0].name} beside it has "
                f"{', '.join(tables[0].column_names)}; name one of the files, or give them the same columns"
            )
    origin = str(paths[0].parent / names(paths))
    try:
        return Rows(origin, pa.concat_tables(tables, promote_options="permissive"))
    except pa.ArrowException as error:
        raise TaskError(f"{origin} cannot be read together ({summary(error)}); convert one") from error


def read_table(path: Path) -> pa.Table:
    """The table in a file: Parquet, JSON rows in a list or one after the other; any other file is one text."""
    kind = path.suffix.lower()
    try:
        if kind == ".parquet":
            return parquet.read_table(path)
        text = path.read_text(encoding="utf-8-sig")  # some programs put a mark of the encoding first
        if kind not in (".json", ".jsonl"):
            return pa.table({"text": [text]})
        rows: list[Any] = []
        decoder, at = json.JSONDecoder(), 0
        while begin := VISIBLE.search(text, at):
            value, at = decoder.raw_decode(text, begin.start())
            rows += value if isinstance(value, list) else [value]
        for number, row in enumerate(rows):
            if not isinstance(row, dict):
                raise ValueError(f"row {number} is {str(row)[:40]!r}, not an object with named columns")
        columns = dict.fromkeys(chain.from_iterable(rows))  # of all rows: the first one may leave some out
        return pa.table({name: [row.get(name) for row in rows] for name in columns})
    except (pa.ArrowException, OSError, ValueError) as error:
        raise TaskError(f"{path} cannot be read ({summary(error)}); restore, correct or convert it") from error


def held_out(rows: Any) -> tuple[Any, Any]:
    """A sequence (or a table, or a text) without its last twentieth, and that twentieth (one at least)."""
    cut = len(rows) - max(1, len(rows) // HELD_OUT)
    return rows[:cut], rows[cut:]


def draw(count: int, limit: int | None, seed: int) -> list[int]:
    """At most `limit` of the numbers below `count`, drawn by `seed`, in rising order."""
    return sorted(random.Random(seed).sample(range(count), count if limit is None else min(limit, count)))


def names(paths: Iterable[Path]) -> str:
    return " + ".join(path.name for path in paths)


def digest(paths: Iterable[Path]) -> str:
    """Identifies data in a record, whatever folder it was in."""
    content = b"".join(path.read_bytes() for path in paths)
    return f"sha256 {hashlib.sha256(content).hexdigest()[:12]}"

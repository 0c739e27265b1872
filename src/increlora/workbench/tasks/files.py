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
import pyarrow.compute as pc
from pyarrow import parquet

from ...errors import TaskError
from .base import summary

TABLES = (".parquet", ".jsonl", ".json", ".txt")  # endings of data files in a folder; any other file is read as text
SPLITS = {
    "train": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation", "eval": "validation",
    "test": "test",
}  # fmt: skip
SPLIT_NAME = re.compile(rf"({'|'.join(SPLITS)})(?![a-z])", re.IGNORECASE)  # train_5k and dev.clean, but not trainer
HELD_OUT = 20  # one row in so many, where there is no validation file


@dataclass(frozen=True)
class Rows:
    """A table with rows, and the file it is from; messages count rows from 0."""

    origin: str
    table: pa.Table

    def __post_init__(self) -> None:
        if not len(self.table):
            raise TaskError(f"{self.origin} has no rows; name a file with some")

    def check(self, column: str, *, text: bool = True, nulls: bool = False) -> None:
        """Raise TaskError if `column` does not hold text where it must, or has nulls where it must not."""
        values = self.table[column]
        if text and not (is_text(values.type) or pa.types.is_null(values.type)):
            found = f"column {column!r} holds {values.type}, not text"
            raise TaskError(f"{self.origin}: {found}; name a file with text there")
        if values.null_count and not nulls:
            row = pc.index(pc.is_null(values), True).as_py()
            raise TaskError(f"{self.origin}: column {column!r} is null at row {row}; remove or correct it")

    def column(self, name: str) -> list[Any]:
        return self.table[name].to_pylist()

    def sample(self, limit: int | None, seed: int) -> "Rows":
        """At most `limit` of the rows, drawn by `seed`, in their order."""
        if limit is None or limit >= len(self.table):
            return self
        return Rows(self.origin, self.table.take(draw(len(self.table), limit, seed)))


@dataclass(frozen=True)
class Splits:
    """What `--data` holds, and its description for the record; no `validation`: part of `train` has to be held out."""

    train: Rows
    validation: Rows | None
    source: str

    def rows(self) -> tuple[Rows, Rows]:
        """Training and validation; the last twentieth of the rows is held out where there is no validation file."""
        if self.validation is not None:
            return self.train, self.validation
        if len(self.train.table) < 2:
            raise TaskError(f"{self.train.origin} has one row only, so none can be held out; add rows")
        train, validation = held_out(self.train.table)
        return Rows(self.train.origin, train), Rows(self.train.origin, validation)


def read_splits(path: Path | None) -> Splits:
    """A folder with a training and perhaps a validation (or else a test) file, or a single file."""
    if path is None:
        raise TaskError("this task has no data of its own: name a file or folder by --data")
    files = split_files(path) if path.is_dir() else {"train": [path]}
    train, source = read_rows(files["train"]), f"training on {names(files['train'])}"
    other = files.get("validation") or files.get("test")
    if other is None:
        return Splits(train, None, f"{source} without its last twentieth, validation on that, {digest(files['train'])}")
    note = "" if "validation" in files else " (there is no validation file)"
    source += f", validation on {names(other)}{note}, {digest(files['train'] + other)}"
    return Splits(train, read_rows(other), source)


def split_files(folder: Path) -> dict[str, list[Path]]:
    """The data files of a folder by split, in order of their names; a file alone is for training."""
    found = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix.lower() in TABLES)
    files: dict[str, list[Path]] = {}
    for path in found:
        if match := SPLIT_NAME.match(path.name):
            files.setdefault(SPLITS[match[1].lower()], []).append(path)
    if not files and len(found) == 1:
        files["train"] = found
    if "train" not in files:
        there = names(found) or f"no {', '.join(TABLES)}"
        raise TaskError(f"{folder} has no training file but {there}; give one a name like train.parquet")
    return files


def read_rows(paths: Sequence[Path]) -> Rows:
    """The rows of all files, one after the other; a file of no known kind is read as one text."""
    try:
        tables = [read_table(path) for path in paths]
        columns = [table.column_names for table in tables]
        for path, found in zip(paths, columns, strict=True):
            if set(found) != set(columns[0]):
                raise TaskError(
                    f"{path} has the columns {', '.join(found)} but {paths[0].name} beside it has "
                    f"{', '.join(columns[0])}; name one of the files, or give them the same columns"
                )
        return Rows(str(paths[0]), pa.concat_tables(tables, promote_options="permissive"))
    except (pa.ArrowException, OSError) as error:
        there = paths[0].parent / names(paths)
        raise TaskError(f"{there} cannot be read ({summary(error)}); restore or convert it") from error


def read_table(path: Path) -> pa.Table:
    kind = path.suffix.lower()
    if kind == ".parquet":
        return parquet.read_table(path)
    rows: Any = []
    place = str(path)
    try:
        text = path.read_text(encoding="utf-8")
        if kind == ".json":
            rows = json.loads(text)
        elif kind == ".jsonl":
            for number, line in enumerate(text.split("\n"), 1):  # splitlines would also cut inside strings
                place = f"{path}, line {number}"
                rows += [json.loads(line)] if line.strip() else []
        else:
            rows = [{"text": text}]
    except UnicodeDecodeError as error:
        raise TaskError(f"{path} is not UTF-8 text (byte {error.start}); convert it") from error
    except json.JSONDecodeError as error:
        remedy = "correct it, or give a text another ending, like .txt"
        raise TaskError(f"{place}: is not JSON ({error}); {remedy}") from error
    if not isinstance(rows, list):
        raise TaskError(f"{path} holds a JSON {type(rows).__name__}, not a list of rows; write [{{…}}, {{…}}]")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise TaskError(f"{path}: row {number} is {str(row)[:40]!r}, not an object with named columns; correct it")
    columns = dict.fromkeys(chain.from_iterable(rows))  # of all rows: the first one may leave some out
    return pa.table({name: [row.get(name) for row in rows] for name in columns})


def held_out(rows: Any) -> tuple[Any, Any]:
    """A sequence (or a table, or a text) without its last twentieth, and that twentieth (one at least)."""
    cut = len(rows) - max(1, len(rows) // HELD_OUT)
    return rows[:cut], rows[cut:]


def draw(count: int, limit: int | None, seed: int) -> list[int]:
    """At most `limit` of the numbers below `count`, drawn by `seed`, in rising order."""
    return sorted(random.Random(seed).sample(range(count), count if limit is None else min(limit, count)))


def text_columns(table: pa.Table) -> list[str]:
    return [field.name for field in table.schema if is_text(field.type)]


def is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def names(paths: Iterable[Path]) -> str:
    return " + ".join(path.name for path in paths)


def digest(paths: Iterable[Path]) -> str:
    """Identifies data in a record, whatever folder it was in."""
    sha = hashlib.sha256()
    for path in paths:
        sha.update(path.read_bytes())
    return f"sha256 {sha.hexdigest()[:12]}"

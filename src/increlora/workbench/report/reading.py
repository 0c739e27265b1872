"""Run folders as a report needs them: what can be read, and notes on what is missing or damaged."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import RunFolderError
from ...naming import short
from ..runs import check_format

Row = dict[str, Any]
OWN_COLUMNS = {"step", "loss", "learning_rate", "ranks", "parameters", "seconds"}  # of metrics.jsonl; others: metrics
LARGEST = 1e100  # of numbers in figures: sums of what is larger leave the range of floats
REMEDY = "give the folder that `increlora train --out` wrote"


@dataclass(frozen=True)
class Run:
    """A run as it is in its folder.

    Attributes:
        label: the shortest end of the path that no other run has.   state: content of run.json.
        metrics, events, trace, spectra: rows that could be read of the file of that name, by rising step; `step`
            counts steps done, in events, too.
        config: text of config.toml.   notes: what is missing, damaged or unfinished, a sentence each.
    """

    path: Path
    label: str
    state: Mapping[str, Any]
    metrics: Sequence[Row]
    events: Sequence[Row]
    trace: Sequence[Row]
    spectra: Sequence[Row]
    config: str
    notes: Sequence[str]

    def get(self, *keys: str) -> Any:
        """A value of run.json by its path; None where it is missing."""
        value: Any = self.state
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def number(self, *keys: str) -> float | None:
        """The same if it is a finite number."""
        value = self.get(*keys)
        return value if is_number(value) else None

    def column(self, name: Any) -> list[Any]:
        """The values of a column of metrics.jsonl; none if `name` is none of its names."""
        return [row[name] for row in self.metrics if isinstance(name, str) and name in row]

    @property
    def steps(self) -> int:
        """Steps done, as far as the files know."""
        return max((row["step"] for row in (*self.metrics, *self.trace, *self.events, *self.spectra)), default=0)

    @property
    def metric_names(self) -> list[str]:
        """Metrics in metrics.jsonl, the run's main one first."""
        found = [name for row in self.metrics for name in row if name not in OWN_COLUMNS]
        main = self.get("metric", "name")
        return sorted(dict.fromkeys(found), key=lambda name: name != main)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Raises RunFolderError for a folder without a run of ours."""
    return [read_run(path, label) for path, label in zip(paths, labels(paths), strict=True)]


def read_run(path: Path, label: str) -> Run:
    notes: list[str] = []
    state = read_state(path, notes)
    rows = {
        name: read_rows(path / f"{name}.jsonl", notes) if name != "events" or state.get("adaptive", True) else []
        for name in COLUMNS
    }
    ends = {
        "running": "The run had not finished when this report was made: it shows the steps until then.",
        "interrupted": "The run was interrupted: this report shows the steps until then.",
        "replaced": "Another run was about to take its place: files may be missing.",
        "failed": f"The run failed: {state.get('error') or 'no reason is recorded'}",
    }
    if (status := str(state.get("status"))) in ends:
        notes.append(ends[status])
    try:
        config = (path / "config.toml").read_text(encoding="utf-8", errors="replace")
    except OSError:
        config = ""
        notes.append("config.toml is missing: the settings of the run are not shown.")
    return Run(path, label, state, config=config, notes=notes, **rows)


def labels(paths: Sequence[Path]) -> list[str]:
    """Folder names with as many parents as make them different; the same folder twice gets a number."""
    whole = [printable(path.resolve().as_posix()) for path in paths]
    label = dict(zip(dict.fromkeys(whole), short(dict.fromkeys(whole), "/"), strict=True))
    return [label[p] + (f" ({whole[: i + 1].count(p)})" if whole.count(p) > 1 else "") for i, p in enumerate(whole)]


def read_state(path: Path, notes: list[str]) -> Mapping[str, Any]:
    """run.json; empty, and noted, if it is damaged. Raises RunFolderError if this is no run folder of ours."""
    if not path.is_dir():
        raise RunFolderError(f"{path} is not a folder; {REMEDY}")
    try:
        state: Mapping[str, Any] = printable(json.loads((path / "run.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise RunFolderError(f"{path} holds no run (run.json is missing); {REMEDY}") from None
    except (ValueError, RecursionError) as error:
        if not (path / "metrics.jsonl").is_file():
            raise RunFolderError(f"{path}/run.json cannot be read ({error}); {REMEDY}") from error
        notes.append(f"run.json is damaged ({error}): settings and results of the run are not shown.")
        return {}
    check_format(path, state, REMEDY)
    return state


def read_rows(path: Path, notes: list[str]) -> list[Row]:
    """Rows of a .jsonl file by rising step; lines that are torn or not as expected are left out, and counted."""
    ahead = path.stem == "events"  # these count steps from 0, reports the steps done
    if not path.is_file():
        notes.append(f"{path.name} is missing: the figures made from it are left out or less detailed.")
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n")
    rows, bad = [], []
    for number, line in enumerate(lines, 1):
        try:
            row = printable(json.loads(line))
            rows.append({**COLUMNS[path.stem](row), "step": count(row["step"]) + ahead})
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
            bad.append(number)
    if bad:
        which = f"line {bad[0]}" if len(bad) == 1 else f"{len(bad)} lines, the first is line {bad[0]}"
        notes.append(f"{path.name} is damaged ({which} of {len(lines)}): what can be read is shown.")
    return sorted(rows, key=lambda row: row["step"])


def printable(value: Any) -> Any:
    """The value with characters escaped, in every text, that a terminal would obey and the library that draws figures
    dies of."""
    if isinstance(value, str):
        return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in value)
    if isinstance(value, dict):
        return {printable(key): printable(entry) for key, entry in value.items()}
    return [printable(entry) for entry in value] if isinstance(value, list) else value


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**53:
        raise ValueError(f"expected a count, found {value!r}")
    return value


def change(value: Any) -> int:
    """A count with a sign."""
    return count(abs(value)) * (-1 if value < 0 else 1)


def numbers(row: Mapping[str, Any]) -> Row:
    return {key: value for key, value in row.items() if is_number(value)}


def standing(row: Row) -> Row:
    """Rank and importance of a module."""
    return {"rank": count(row["rank"]), "importance": numbers(row).get("importance")}


# By file: what a report takes of a row, beside its step.
COLUMNS: Mapping[str, Callable[[Row], Row]] = {
    "metrics": numbers,
    "events": lambda row: {
        "kind": str(row["kind"]), "module": str(row["module"]), "ranks": change(row["ranks"]), **standing(row),
    },
    "trace": lambda row: {
        "modules": {name: standing(module) for name, module in row["modules"].items()},
        "lr_factor": {int(born): factor for born, factor in numbers(row.get("lr_factor", {})).items()},
    },
    "spectra": lambda row: {
        "modules": {name: [value for value in values if is_number(value)] for name, values in row["modules"].items()}
    },
}  # fmt: skip

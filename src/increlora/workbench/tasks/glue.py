"""Tasks `glue/…`: the nine GLUE classification and regression tasks, judged by GLUE's own metrics.

Columns and label numbers are those of `nyu-mll/glue` on the hub. Test labels are hidden, so `validation` judges."""

import math
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from ...errors import TaskError
from .base import Batches, Task, TaskOptions, encoded, summary
from .files import Rows, digest, names, read_rows, split_files

HUB_NAME = "nyu-mll/glue"
MAX_SCORE = 5.0  # of stsb
MISMATCHED = "mismatched"  # mnli's second validation set: other genres than in training


@dataclass(frozen=True)
class Glue:
    """A task's published facts.

    Attributes:
        columns: of text, one or two.
        labels: names by number; none where the label is a score from 0 to 5.
        train_size, validation_size: rows of the official splits (mnli: validation_matched).
        metrics: what GLUE reports; the first judges a run."""

    columns: tuple[str, ...]
    labels: tuple[str, ...]
    train_size: int
    validation_size: int
    metrics: tuple[str, ...] = ("accuracy",)

    def score(self, labels: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
        """The metrics of predictions (n,) against labels (n,), n ≥ 1, under the names of the `evaluate` library.

        A correlation is 0 where one side is constant, NaN where a prediction is."""
        from scipy import stats  # late: scikit-learn takes a second
        from sklearn import metrics

        def correlation(test: Any, x: np.ndarray, y: np.ndarray) -> float:
            if not np.isfinite(y).all():
                return math.nan
            return np.nan_to_num(test(x, y).statistic) if len(x) > 1 else 0.0

        compute = {
            "accuracy": metrics.accuracy_score,
            "f1": partial(metrics.f1_score, zero_division=0.0),  # of label 1
            "matthews_correlation": metrics.matthews_corrcoef,
            "pearson": partial(correlation, stats.pearsonr),
            "spearmanr": partial(correlation, stats.spearmanr),
        }
        with warnings.catch_warnings(action="ignore"):  # about constant answers, which untrained models give
            return {name: float(compute[name](labels, predicted)) for name in self.metrics}

    def baseline(self, labels: np.ndarray) -> dict[str, float]:
        """The best that one answer for all reaches, by metric: the majority's accuracy, the F1 of always 1, or 0."""
        answers = [self.score(labels, np.full_like(labels, answer)) for answer in range(len(self.labels) or 1)]
        return {name: max(answer[name] for answer in answers) for name in self.metrics}


PAIR, ENTAILMENT = ("sentence1", "sentence2"), ("entailment", "not_entailment")
GLUE: dict[str, Glue] = {
    "rte": Glue(PAIR, ENTAILMENT, 2_490, 277),
    "mrpc": Glue(PAIR, ("not_equivalent", "equivalent"), 3_668, 408, ("accuracy", "f1")),
    "cola": Glue(("sentence",), ("unacceptable", "acceptable"), 8_551, 1_043, ("matthews_correlation",)),
    "stsb": Glue(PAIR, (), 5_749, 1_500, ("pearson", "spearmanr")),
    "wnli": Glue(PAIR, ("not_entailment", "entailment"), 635, 71),
    "sst2": Glue(("sentence",), ("negative", "positive"), 67_349, 872),
    "qnli": Glue(("question", "sentence"), ENTAILMENT, 104_743, 5_463),
    "qqp": Glue(("question1", "question2"), ("not_duplicate", "duplicate"), 363_846, 40_430, ("accuracy", "f1")),
    "mnli": Glue(("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), 392_702, 9_815),
}


def glue_task(name: str, tokenizer: PreTrainedTokenizerBase, options: TaskOptions) -> Task:
    """The task, tokenized; `options.data` is its folder or the one around it, None for the hub.

    mnli is judged on `validation_matched`; where `validation_mismatched` is there, its numbers stand beside.
    Raises: TaskError if files, columns or labels are missing or foreign."""
    glue = GLUE[name]
    splits, source = from_hub(name) if options.data is None else from_folder(name, options.data)
    examples = {}
    for split, rows in splits.items():
        check_rows(rows, name)
        drawn = rows.sample(*options.draws[split != "train"])
        texts, labels = map(drawn.text, glue.columns), drawn.table["label"].to_pylist()
        examples[split] = encoded(tokenizer, *texts, labels=labels, max_length=options.max_length)
    validation = examples["validation"]
    answers = np.array([example["labels"] for example in validation])
    if MISMATCHED in splits:
        validation = [{**e, MISMATCHED: i} for i, s in enumerate(("validation", MISMATCHED)) for e in examples[s]]
    return Task(
        name=f"glue/{name}",
        metric=glue.metrics[0],
        source=source,
        train=examples["train"],
        validation=validation,
        collate=DataCollatorWithPadding(tokenizer),
        measure=partial(measured, glue),
        baseline=glue.baseline(answers),
    )


def glue_train_size(name: str, data: Path | None) -> int:
    """Number of training examples: the official one, or that of the files in `data`; no tokenizer is needed."""
    if data is None:
        return GLUE[name].train_size
    rows = from_folder(name, data)[0]["train"]
    check_rows(rows, name)
    return len(rows.table)


def measured(glue: Glue, model: nn.Module, batches: Batches) -> dict[str, float]:
    """The task's metrics; those of mnli's second validation set beside them."""
    answers = []
    for batch in batches:
        labels = batch.pop("labels")
        other = batch.pop(MISMATCHED, torch.zeros_like(labels))
        logits = model(**batch).logits
        predicted = logits.squeeze(-1) if logits.shape[-1] == 1 else logits.argmax(-1)
        answers.append(torch.stack([column.cpu().double() for column in (labels, predicted, other)]))
    labels, predicted, other = torch.cat(answers, dim=1).numpy()
    numbers = glue.score(labels[other == 0], predicted[other == 0])
    if other.any():
        beside = glue.score(labels[other == 1], predicted[other == 1])
        numbers |= {f"{name}_{MISMATCHED}": value for name, value in beside.items()}
    return numbers


def from_folder(name: str, folder: Path) -> tuple[dict[str, Rows], str]:
    expected = f"glue/{name} reads train.parquet and validation.parquet of a folder {name}"
    if not folder.is_dir():
        raise TaskError(f"--data {folder} is a file but {expected}; name that folder or the one around it")
    folder = folder / name if (folder / name).is_dir() else folder
    files = split_files(folder)
    chosen: dict[str, list[Path]] = {"train": files["train"], "validation": [], MISMATCHED: []}
    for path in files.get("validation", []):
        chosen[MISMATCHED if name == "mnli" and MISMATCHED in path.name else "validation"].append(path)
    if not chosen["validation"]:
        raise TaskError(f"{folder} has no validation file beside {names(files['train'])}; {expected}")
    every = [path for paths in chosen.values() for path in paths]
    rows = {split: read_rows(paths) for split, paths in chosen.items() if paths}
    return rows, f"{names(every)}, {digest(every)}"


def from_hub(name: str) -> tuple[dict[str, Rows], str]:
    try:
        from datasets import load_dataset  # an extra of ours, and not needed for local files

        found = load_dataset(HUB_NAME, name)
    except Exception as error:  # not installed, no network and offline mode share no base class
        raise TaskError(
            f"glue/{name}: {HUB_NAME} cannot be loaded from the hub ({summary(error)}); "
            f"name the folder that holds {name}/train.parquet and {name}/validation.parquet by --data"
        ) from error
    called = {"validation_matched": "validation", "validation_mismatched": MISMATCHED}
    rows = {
        called.get(split, split): Rows(f"{HUB_NAME} {name} {split}", found[split].with_format("arrow")[:])
        for split in found
        if not split.startswith("test")
    }
    return rows, f"{HUB_NAME} on the hub"


def check_rows(rows: Rows, name: str) -> None:
    """Raise TaskError for columns or labels that are not the task's."""
    glue, there = GLUE[name], rows.table.column_names
    expected = (*glue.columns, "label")
    if not {*expected} <= {*there}:
        found = f"has the columns {', '.join(there)} but glue/{name} reads {', '.join(expected)}"
        raise TaskError(f"{rows.origin} {found}; rename or add them")
    for column in glue.columns:
        rows.text(column)
    allowed = ", ".join(f"{n} {label}" for n, label in enumerate(glue.labels)) or "0 to 5"
    kinds, most = ((int,), len(glue.labels) - 1) if glue.labels else ((int, float), MAX_SCORE)
    for row, label in enumerate(rows.table["label"].to_pylist()):
        if type(label) not in kinds or not 0 <= label <= most:
            hint = "a test set's labels are hidden: name another file" if label == -1 else "remove or correct it"
            raise TaskError(f"{rows.origin}: label {label!r} at row {row} but glue/{name} has {allowed}; {hint}")

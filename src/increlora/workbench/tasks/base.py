"""A task: examples in, numbers out."""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import BatchEncoding
from transformers.trainer_pt_utils import LengthGroupedSampler

from ...errors import TaskError

VALIDATION_SEED = 0  # draws validation examples, fixed: every run answers the same questions

Example = dict[str, Any]
Batches = Iterable[MutableMapping[str, Any]]


@dataclass(frozen=True)
class TaskOptions:
    """What a user may choose about a task's data.

    Attributes:
        data: folder or file to read; None: the task's own source (the hub, the running Python, a generator).
        max_length: tokens per example, longer ones are cut.
        max_train_samples, max_eval_samples: upper limits ≥ 2; None for all.
        seed: draws the training examples; the validation examples do not depend on it.
    Raises: TaskError for a limit below 2, or data that is not there."""

    data: Path | None = None
    max_length: int = 64
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.data is not None:
            object.__setattr__(self, "data", Path(self.data).expanduser())  # a string will do
            if not self.data.exists():
                raise TaskError(f"data {self.data} does not exist: name a folder or file")
        for option in ("max_train_samples", "max_eval_samples"):
            if (value := getattr(self, option)) is not None and value < 2:
                raise TaskError(f"{option} is {value} but a sample needs 2 at least; raise it or leave it out")

    @property
    def draws(self) -> tuple[tuple[int | None, int], tuple[int | None, int]]:
        """(limit, seed) of the training examples, and of the validation examples."""
        return (self.max_train_samples, self.seed), (self.max_eval_samples, VALIDATION_SEED)


@dataclass(frozen=True)
class Task:
    """What a model is trained on and how it is judged.

    `train`, `validation` and `collate` fit the HF Trainer (`train_dataset`, `eval_dataset`, `data_collator`).

    Attributes:
        name: as on the command line.
        metric: the one of `measure`'s numbers by which a run is judged, e.g. "accuracy".
        source: where the examples came from, for the record; numbers compare only where it is equal.
        train, validation: tokenized, unpadded examples with `labels` and, for text, `input_ids`.
        collate: list of examples → padded batch.
        measure: (model, batches) → numbers by name.
        higher_is_better: whether `metric` should rise.
        baseline: what a model that ignores its input reaches (majority class, untrained student), by metric."""

    name: str
    metric: str
    source: str
    train: Sequence[Example]
    validation: Sequence[Example]
    collate: Callable[[list[Example]], MutableMapping[str, Any]]
    measure: Callable[[nn.Module, Batches], dict[str, float]]
    higher_is_better: bool = True
    baseline: Mapping[str, float] = field(default_factory=dict)

    def batches(self, batch_size: int, *, seed: int, epoch: int = 0) -> DataLoader:
        """One epoch of padded training batches, shuffled, with examples of similar length together; the order is a
        function of (seed, epoch, batch_size) alone."""
        sampler = EpochSampler(self.train, batch_size, seed, epoch)
        own = torch.Generator()  # without one, a loader draws from torch's, which would move the training's dropout
        return DataLoader(self.train, batch_size, sampler=sampler, collate_fn=self.collate, generator=own)  # type: ignore[arg-type]

    @torch.no_grad()
    def evaluate(self, model: nn.Module, *, batch_size: int = 64) -> dict[str, float]:
        """`measure` over the validation examples, in evaluation mode; leaves the model's mode and all random states."""
        examples = sorted(self.validation, key=lambda e: lengths([e]))
        batches = (self.collate(examples[i : i + batch_size]) for i in range(0, len(examples), batch_size))
        device, was_training = next(model.parameters()).device, model.training
        model.eval()
        try:
            return self.measure(model, (BatchEncoding(batch).to(device) for batch in batches))
        finally:
            model.train(was_training)


class EpochSampler(LengthGroupedSampler):
    """Indices of one epoch, shuffled, similar lengths together: drawn from seed, epoch and batch size alone, so that a
    resumed run sees the same batches. accelerate tells later epochs by `set_epoch`."""

    def __init__(self, examples: Sequence[Example], batch_size: int, seed: int, epoch: int = 0) -> None:
        super().__init__(batch_size, lengths=lengths(examples))
        self.seed, self.epoch = seed, epoch

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return super().__iter__()


def lengths(examples: Sequence[Example]) -> list[int]:
    """Tokens of each example; 1 for what is not text."""
    return [len(example.get("input_ids", (0,))) for example in examples]


def accuracy(model: nn.Module, batches: Batches) -> dict[str, float]:
    """Share of examples whose largest logit is at the label, in [0, 1]."""
    right = total = 0
    for batch in batches:
        labels = batch.pop("labels")
        right += int((model(**batch).logits.argmax(-1) == labels).sum())
        total += len(labels)
    return {"accuracy": right / total}


def encoded(tokenizer: Any, *texts: list[str], labels: Sequence[Any], max_length: int) -> list[Example]:
    """Examples of one or two columns of text, tokenized and cut, with their labels."""
    columns = {**tokenizer(*texts, truncation=True, max_length=max_length), "labels": labels}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def summary(error: Exception) -> str:
    """Type and first line of an error."""
    return f"{type(error).__name__}: " + str(error).strip().partition("\n")[0]

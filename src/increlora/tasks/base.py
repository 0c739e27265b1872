"""A task: examples in, one number out."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import BatchEncoding
from transformers.trainer_pt_utils import LengthGroupedSampler

Example = dict[str, Any]
Batches = Iterable[BatchEncoding]


@dataclass(frozen=True)
class Task:
    """What a model is trained on and how it is judged.

    `train`, `validation` and `collate` fit the HF Trainer (`train_dataset`, `eval_dataset`, `data_collator`).

    Attributes:
        name: as on the command line. metric: what `measure` returns, e.g. "accuracy".
        source: where the examples came from, for the record; numbers compare only where it is equal.
        num_labels: outputs the model needs; None for a language model.
        train, validation: tokenized, unpadded examples with `input_ids` and `labels`.
        collate: list of examples → padded batch.
        measure: (model, batches) → the metric, a float."""

    name: str
    metric: str
    source: str
    num_labels: int | None
    train: Sequence[Example]
    validation: Sequence[Example]
    collate: Callable[[list[Example]], BatchEncoding]
    measure: Callable[[nn.Module, Batches], float]

    def batches(self, batch_size: int, *, seed: int, epoch: int = 0) -> DataLoader:
        """One epoch of padded training batches, shuffled, with examples of similar length together.

        The order is a function of (seed, epoch, batch_size) alone, so a resumed run sees the same batches."""
        order = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        sampler = LengthGroupedSampler(batch_size, lengths=_lengths(self.train), generator=order)
        return self._loader(self.train, batch_size, sampler=sampler)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, *, batch_size: int = 64) -> float:
        """`measure` over the validation examples, in evaluation mode; leaves the model's mode and all random states."""
        by_length = sorted(self.validation, key=lambda example: len(example["input_ids"]))
        device = next(model.parameters()).device
        loader = self._loader(by_length, batch_size)
        was_training = model.training
        model.eval()
        try:
            return self.measure(model, (batch.to(device) for batch in loader))
        finally:
            model.train(was_training)

    def _loader(self, examples: Sequence[Example], batch_size: int, **options: Any) -> DataLoader:
        # A loader without a generator of its own draws from torch's, which would move the training's dropout.
        own = torch.Generator()
        return DataLoader(examples, batch_size, collate_fn=self.collate, generator=own, **options)  # type: ignore[arg-type]


def accuracy(model: nn.Module, batches: Batches) -> float:
    """Share of examples whose largest logit is at the label, in [0, 1]."""
    right = total = 0
    for batch in batches:
        labels = batch.pop("labels")
        right += int((model(**batch).logits.argmax(-1) == labels).sum())
        total += len(labels)
    return right / total


def _lengths(examples: Sequence[Example]) -> list[int]:
    return [len(example["input_ids"]) for example in examples]

"""The Hugging Face Trainer as this command uses it: batches that a resumed run draws again, and quiet."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_pt_utils import LengthGroupedSampler

from ...decide.schedules import Run, in_steps
from ...errors import ConfigError
from ..tasks.base import epoch_order, lengths
from .settings import TrainSettings


class SampledTrainer(Trainer):
    """The Trainer with batches of similar length, drawn from (seed, epoch) alone: a resumed epoch goes on as begun."""

    def get_train_dataloader(self) -> DataLoader:
        sampler = EpochSampler(lengths(self.train_dataset), self.args.train_batch_size, self.args.seed)
        loader = DataLoader(
            self.train_dataset, self.args.train_batch_size, sampler=sampler, collate_fn=self.data_collator
        )
        return self.accelerator.prepare(loader)


class EpochSampler(Sampler[int]):
    """Indices of one epoch, shuffled, similar lengths together; the epoch is told by `set_epoch`."""

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order = epoch_order(self.seed, self.epoch)
        return iter(LengthGroupedSampler(self.batch_size, lengths=self.lengths, generator=order))

    def __len__(self) -> int:
        return len(self.lengths)


def check_logger(name: str) -> None:
    """Raise ConfigError unless the Trainer can report to this logger (several: `all`)."""
    known = ["none", "all", *get_available_reporting_integrations()]
    if name not in known:
        raise ConfigError(f"--report-to {name}: not known or not installed; choose one of {', '.join(known)}")


def training_arguments(settings: TrainSettings, out: Path, *, total: int, save_every: int) -> TrainingArguments:
    """Four decisions are ours: fp32, linear decay, a log row per step, and no more than two checkpoints."""
    return TrainingArguments(
        output_dir=str(out),
        max_steps=total,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.lr,
        lr_scheduler_type="linear",
        warmup_steps=in_steps(settings.lr_warmup, Run(total, 0), name="--lr-warmup"),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        save_steps=save_every,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=settings.report_to,
        disable_tqdm=True,
        log_level="error",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )

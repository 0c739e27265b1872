"""Training by the Hugging Face Trainer, with batches that a resumed run draws again, and quiet."""

import math
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from ...decide.schedules import Run, in_steps
from ...errors import ConfigError
from ...runtime import controllers_of
from ..runs import RunFolder, checkpoint_step
from ..tasks import Task
from ..tasks.base import EpochSampler
from .display import Progression
from .recorder import Recorder
from .settings import TrainSettings

CHECKPOINTS = 4  # per run
EVALUATION_BATCHES = 2  # training batches in one batch of evaluation: without gradients twice the examples fit


class SampledTrainer(Trainer):
    """The Trainer with batches of similar length, drawn from (seed, epoch) alone: a resumed epoch goes on as begun."""

    def get_train_dataloader(self) -> DataLoader:
        examples, size = self.train_dataset, self.args.train_batch_size
        sampler = EpochSampler(examples, size, self.args.seed)
        return self.accelerator.prepare(DataLoader(examples, size, sampler=sampler, collate_fn=self.data_collator))


def check_logger(name: str) -> None:
    """Raise ConfigError unless the Trainer can report to this logger (several: `all`)."""
    known = ["none", "all", *get_available_reporting_integrations()]
    if name not in known:
        raise ConfigError(f"--report-to {name}: not known or not installed; choose one of {', '.join(known)}")


def fit(
    settings: TrainSettings, folder: RunFolder, model: Any, task: Task, console: Console, checkpoint: Path | None
) -> None:
    """Evaluate, train from the checkpoint or from the start, evaluate in between and at the end.

    Four decisions are ours: fp32, linear decay, a log row per step, and no more than two checkpoints."""
    total = settings.total_steps(len(task.train))
    args = TrainingArguments(
        output_dir=str(folder.path / "checkpoints"),
        max_steps=total,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=EVALUATION_BATCHES * settings.batch_size,
        eval_steps=math.ceil(total / settings.evaluations),
        learning_rate=settings.lr,
        lr_scheduler_type="linear",
        warmup_steps=in_steps(settings.lr_warmup, Run(total), name="--lr-warmup"),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        save_steps=math.ceil(total / CHECKPOINTS),
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=settings.report_to,
        disable_tqdm=True,
        log_level="error",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = SampledTrainer(model=model, args=args, train_dataset=task.train, data_collator=task.collate)
    trainer.remove_callback(PrinterCallback)
    rows = folder.rows("metrics.jsonl")
    if not rows:
        rows = [{"step": 0, **task.evaluate(model, batch_size=args.per_device_eval_batch_size)}]
        folder.append("metrics.jsonl", rows[0])
    if checkpoint is not None and checkpoint_step(checkpoint) >= total:  # the Trainer would take a step more
        model.load_adapter(checkpoint, "default", is_trainable=True)
        return
    budget = controllers_of(model)[0].method.budget.ranks if controllers_of(model) else None
    with Progression(console, total=total, done=rows[-1]["step"], budget=budget) as progress:
        trainer.add_callback(Recorder(folder, task, progress))
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

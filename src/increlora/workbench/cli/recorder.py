"""The run's first Trainer callback: it measures, writes rows, and updates the display."""

import time
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import TrainerCallback

from ...hosts.peft import rank_summary
from ...runtime import controllers_of
from ..runs import RunFolder
from ..tasks import Task
from .display import Progression


class Recorder(TrainerCallback):
    """Writes metrics.jsonl (a row per optimizer step) and events.jsonl (a row per event of the controller).

        {"step", "loss", "learning_rate", "ranks", "parameters", "seconds"[, metrics]}

    step: optimizer steps done.   ranks: active after the step.   parameters: live during the step, reserve included (in
    LoRA form, where the method has one).   seconds: of training so far, without evaluation.   The task's metrics, each
    under its name, are there every `evaluate_every` steps and at the end; row 0 has nothing but those before training.
    """

    def __init__(
        self, folder: RunFolder, task: Task, progress: Progression, *, evaluate_every: int, batch_size: int
    ) -> None:
        self.folder, self.task, self.progress = folder, task, progress
        self.evaluate_every, self.batch_size = evaluate_every, batch_size
        self.before = max((row.get("seconds", 0.0) for row in folder.rows("metrics.jsonl")), default=0.0)
        self.events = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter() - self.before

    def on_step_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        self.live = rank_summary(model).live_parameters

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        for controller in controllers_of(model):
            for event in controller.events[self.events :]:
                self.folder.append("events.jsonl", event.as_dict())
            self.events = len(controller.events)
        stopped = time.perf_counter()
        seconds = round(stopped - self.started, 3)
        self.row = {"ranks": rank_summary(model).active, "parameters": self.live, "seconds": seconds}
        if state.global_step % self.evaluate_every == 0 or state.global_step == state.max_steps:
            self.row |= self.task.evaluate(model, batch_size=self.batch_size)
            self.started += time.perf_counter() - stopped  # seconds of training alone

    def on_log(self, args: Any, state: Any, control: Any, *, logs: Mapping[str, float], **kwargs: Any) -> None:
        if "loss" not in logs:  # the Trainer's summary at the end
            return
        row = {"step": state.global_step, "loss": logs["loss"], "learning_rate": logs["learning_rate"], **self.row}
        self.folder.append("metrics.jsonl", row)
        self.progress.step(row, self.task.metric)

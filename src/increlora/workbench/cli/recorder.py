"""The run's own Trainer callback: it measures, writes rows, and updates the display."""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ...deltas import Delta
from ...hosts.peft import rank_summary
from ...runtime import controllers_of
from ...runtime.records import birth_factors, snapshot
from ..runs import RunFolder
from ..tasks import Task
from .display import Progression

TRACES, SPECTRA = 200, 10  # evenly spaced rows per run, beside those at events, at the start and at the end
DIGITS = 6


class Recorder(TrainerCallback):
    """Writes what happens in a run; a resumed run continues the files.

        metrics.jsonl   every step: {"step", "loss", "learning_rate", "ranks", "parameters", "seconds"[, metrics]}
        events.jsonl    every event of the controller
        trace.jsonl     some steps: {"step", "modules": {name: {"rank", "importance"}}, "lr_factor": {created: factor}}
        spectra.jsonl   some steps: {"step", "modules": {name: [σ₁, σ₂, …]}}

    step: optimizer steps done.   ranks: active after the step.   parameters: live during the step, reserve included (in
    LoRA form, where the method has one).   seconds: of training so far, without evaluation.   The task's metrics, each
    under its name, are there every `eval_steps` and at the end; row 0 has nothing but those before training.
    importance: None for methods that score nothing.   lr_factor: learning rate in the last step of tensors born after
    step `created` (see `runtime.records`).   σ: singular values of ΔW, largest first, as many as there are ranks in the
    forward pass."""

    def __init__(self, folder: RunFolder, task: Task, progress: Progression) -> None:
        self.folder, self.task, self.progress, self.events = folder, task, progress, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        if not self.folder.rows("trace.jsonl"):
            self._append("trace.jsonl", 0, trace(model))
        before = max((row.get("seconds", 0.0) for row in self.folder.rows("metrics.jsonl")), default=0.0)
        self.started = time.perf_counter() - before

    def on_step_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        self.live = rank_summary(model).live_parameters

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        stopped, step = time.perf_counter(), state.global_step
        seconds = round(stopped - self.started, 3)
        self.row = {"ranks": rank_summary(model).active, "parameters": self.live, "seconds": seconds}
        events = [event for controller in controllers_of(model) for event in controller.events[self.events :]]
        self.events += len(events)
        for event in events:
            self.folder.append("events.jsonl", asdict(event))
        at_end = step == state.max_steps
        if at_end or events or step % math.ceil(state.max_steps / TRACES) == 0:
            self._append("trace.jsonl", step, trace(model))
        if at_end or step % math.ceil(state.max_steps / SPECTRA) == 0:
            self._append("spectra.jsonl", step, spectra(model))
        if at_end or step % args.eval_steps == 0:
            self.row |= self.task.evaluate(model, batch_size=args.per_device_eval_batch_size)
        self.started += time.perf_counter() - stopped  # seconds of training alone

    def on_log(self, args: Any, state: Any, control: Any, *, logs: Mapping[str, float], **kwargs: Any) -> None:
        if "loss" in logs:  # not in the Trainer's summary at the end
            row = {"step": state.global_step, "loss": logs["loss"], "learning_rate": logs["learning_rate"], **self.row}
            self.folder.append("metrics.jsonl", row)
            self.progress.step(row, self.task.metric)

    def _append(self, name: str, step: int, content: Any) -> None:
        """Add a row with six digits of every number."""
        short = json.loads(json.dumps(content), parse_float=lambda digits: float(f"{float(digits):.{DIGITS}g}"))
        self.folder.append(name, {"step": step, **short})


def trace(model: nn.Module) -> dict[str, Any]:
    """Content of a row of trace.jsonl; modules without a controller (plain LoRA) have ranks alone."""
    modules = {m.module: {"rank": m.active, "importance": None} for m in rank_summary(model).modules}
    factors: dict[int, float] = {}
    for controller in controllers_of(model):
        modules |= snapshot(controller)
        factors |= birth_factors(controller)
    return {"modules": modules, "lr_factor": factors}


def spectra(model: nn.Module) -> dict[str, Any]:
    deltas = [module for module in model.modules() if isinstance(module, Delta)]
    return {"modules": {delta.name: singular_values(*delta.factors()).tolist() for delta in deltas}}


@torch.no_grad()
def singular_values(A: Tensor, B: Tensor) -> Tensor:
    """Singular values of B A, shape (R,), largest first, for A (R, in) and B (out, R); the product is never formed.

        A ᵀ = Q_A R_A    B = Q_B R_B        σ(B A) = σ(R_B R_Aᵀ)

    NaN where ΔW is not finite. In float64: what is learnt by a newborn rank lies many orders below σ₁."""
    _, right = torch.linalg.qr(A.double().mT, mode="r")
    _, left = torch.linalg.qr(B.double(), mode="r")
    inner = left @ right.mT
    return torch.linalg.svdvals(inner) if inner.isfinite().all() else inner.diagonal() * torch.nan

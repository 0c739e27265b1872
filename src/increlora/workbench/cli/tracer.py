"""The run's second Trainer callback: it writes rank, importance and singular values of ΔW at some steps of the run."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ...deltas import Delta
from ...hosts.peft import rank_summary
from ...runtime import controllers_of
from ...runtime.records import birth_factors, snapshot
from ..runs import RunFolder

TRACES, SPECTRA = 200, 10  # evenly spaced rows per run, beside those at events, and at the start or the end
DIGITS = 6


class Tracer(TrainerCallback):
    """Writes trace.jsonl and spectra.jsonl; a resumed run continues them.

        trace.jsonl     {"step", "modules": {name: {"rank", "importance"}}, "lr_factor": {created: factor}}
        spectra.jsonl   {"step", "modules": {name: [σ₁, σ₂, …]}}

    step: optimizer steps done.   importance: None for methods that score nothing.   lr_factor: learning rate in the
    last step of tensors born after step `created` (see `runtime.records`).   σ: singular values of ΔW, largest first,
    as many as there are ranks in the forward pass.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder, self.events = folder, 0
        before = {"trace.jsonl": -1, "spectra.jsonl": 0}
        self.last = {name: max([start, *(row["step"] for row in folder.rows(name))]) for name, start in before.items()}

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        self.events = sum(len(controller.events) for controller in controllers_of(model))
        if state.global_step == 0:
            self._write("trace.jsonl", 0, model)

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        step, before = state.global_step, self.events
        self.events = sum(len(controller.events) for controller in controllers_of(model))
        if self.events > before or step % math.ceil(state.max_steps / TRACES) == 0:
            self._write("trace.jsonl", step, model)
        if step % math.ceil(state.max_steps / SPECTRA) == 0:
            self._write("spectra.jsonl", step, model)

    def on_train_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        for name in self.last:
            self._write(name, state.global_step, model)

    def _write(self, name: str, step: int, model: nn.Module) -> None:
        if step > self.last[name]:
            content = trace(model) if name == "trace.jsonl" else {"modules": spectra(model)}
            self.folder.append(name, {"step": step, **content})
            self.last[name] = step


def trace(model: nn.Module) -> dict[str, Any]:
    """Content of a row of trace.jsonl; modules without a controller (plain LoRA) have ranks alone."""
    modules = {m.module: {"rank": m.active, "importance": None} for m in rank_summary(model).modules}
    factors: dict[int, float] = {}
    for controller in controllers_of(model):
        modules |= snapshot(controller)
        factors |= birth_factors(controller)
    return {
        "modules": {name: {key: rounded(value) for key, value in module.items()} for name, module in modules.items()},
        "lr_factor": {str(created): rounded(factor) for created, factor in factors.items()},
    }


def spectra(model: nn.Module) -> dict[str, list[Any]]:
    """Singular values of every ΔW."""
    deltas = [module for module in model.modules() if isinstance(module, Delta)]
    return {delta.name: list(map(rounded, singular_values(*delta.factors()).tolist())) for delta in deltas}


@torch.no_grad()
def singular_values(A: Tensor, B: Tensor) -> Tensor:
    """Singular values of B A, shape (R,), largest first, for A (R, in) and B (out, R); the product is never formed.

        A ᵀ = Q_A R_A    B = Q_B R_B        σ(B A) = σ(R_B R_Aᵀ)

    NaN where ΔW is not finite. In float64: what is learnt by a newborn rank lies many orders below σ₁.
    """
    _, right = torch.linalg.qr(A.double().mT, mode="r")
    _, left = torch.linalg.qr(B.double(), mode="r")
    inner = left @ right.mT
    return torch.linalg.svdvals(inner) if inner.isfinite().all() else inner.diagonal() * torch.nan


def rounded(value: float | None) -> float | None:
    """The value with six digits; None and ints as they are."""
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value

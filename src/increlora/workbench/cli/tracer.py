"""The run's second Trainer callback: it writes where rank, importance and ΔW stand, at some steps of the run."""

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
        self.folder = folder
        self.events = 0
        self.traced = max((row["step"] for row in folder.rows("trace.jsonl")), default=-1)
        self.decomposed = max((row["step"] for row in folder.rows("spectra.jsonl")), default=0)

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        self.events = count_events(model)
        if state.global_step == 0:
            self._trace(model, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        step, before = state.global_step, self.events
        self.events = count_events(model)
        if self.events > before or step % math.ceil(state.max_steps / TRACES) == 0:
            self._trace(model, step)
        if step % math.ceil(state.max_steps / SPECTRA) == 0:
            self._decompose(model, step)

    def on_train_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        self._trace(model, state.global_step)
        self._decompose(model, state.global_step)

    def _trace(self, model: nn.Module, step: int) -> None:
        if step > self.traced:
            self.folder.append("trace.jsonl", trace(model, step))
            self.traced = step

    def _decompose(self, model: nn.Module, step: int) -> None:
        if step > self.decomposed:
            self.folder.append("spectra.jsonl", {"step": step, "modules": spectra(model)})
            self.decomposed = step


def count_events(model: nn.Module) -> int:
    return sum(len(controller.events) for controller in controllers_of(model))


def trace(model: nn.Module, step: int) -> dict[str, Any]:
    """One row of trace.jsonl; modules without a controller (plain LoRA) have ranks alone."""
    modules: dict[str, dict[str, Any]]
    modules = {m.module: {"rank": m.active, "importance": None} for m in rank_summary(model).modules}
    factors: dict[int, float] = {}
    for controller in controllers_of(model):
        modules |= snapshot(controller)
        factors |= birth_factors(controller)
    for module in modules.values():
        module["importance"] = None if module["importance"] is None else rounded(module["importance"])
    return {"step": step, "modules": modules, "lr_factor": {str(k): rounded(v) for k, v in factors.items()}}


def spectra(model: nn.Module) -> dict[str, list[float]]:
    """Singular values of every ΔW that has factors."""
    found = {}
    for delta in model.modules():
        if isinstance(delta, Delta) and type(delta).factors is not Delta.factors:
            found[getattr(delta, "name", "")] = [rounded(value) for value in singular_values(*delta.factors()).tolist()]
    return found


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


def rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")

"""The Hugging Face Trainer's callback: it tells controllers the length of the run, adds penalties before clipping, and
logs ranks.

Every Trainer gets it once an adapter of ours exists; it does nothing for other models, and
`trainer.remove_callback(increlora.hosts.transformers.IncreLoraCallback)` removes it.
"""

from typing import Any

from torch import nn
from transformers import TrainerCallback, trainer

from ..errors import ConfigError
from ..runtime import Controller, controllers_of
from ..runtime.penalty import add_penalty
from .peft.drive import rank_summary


class IncreLoraCallback(TrainerCallback):
    """Run length at the start; the penalty's gradient before the first micro-batch of each step; ranks in the logs.

    The Trainer calls default callbacks before those of `report_to`: what is added to `logs` here reaches all."""

    def __init__(self) -> None:
        self.controllers: list[Controller] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, **kwargs: Any) -> None:
        self.controllers = [c for c in controllers_of(model) if any(p.requires_grad for p in c.parameters())]
        for controller in self.controllers:
            controller.expect(total_steps=state.max_steps, start=state.global_step)
            controller.attach(getattr(optimizer, "optimizer", optimizer))

    def on_step_begin(self, args: Any, state: Any, control: Any, *, optimizer: Any, **kwargs: Any) -> None:
        scaler = getattr(optimizer, "scaler", None)
        for controller in self.controllers:
            controller.begin_step(state.global_step)
            rule = controller.method.penalty
            if rule and rule.place == "before_clipping" and not controller.penalty_given:
                add_penalty(controller.deltas, rule, scale=scaler.get_scale() if scaler else 1.0)
                controller.penalty_given = True

    def on_log(self, args: Any, state: Any, control: Any, *, model: Any, logs: dict[str, float], **kw: Any) -> None:
        if "loss" in logs:  # not what is logged of evaluations, nor the summary at the end
            logs.update(rank_scalars(model))


def rank_scalars(model: nn.Module) -> dict[str, float]:
    """Mean active rank per module, active parameters in LoRA form, and the share of the budget that is used, 0 to 1;
    nothing where no adapter of ours is active."""
    try:
        ranks = rank_summary(model)
    except ConfigError:
        return {}
    target, used = ranks.budget_ranks, ranks.active
    if target is None:
        target, used = ranks.budget_parameters, ranks.parameters
    scalars = {"rank/mean": ranks.active / len(ranks.modules), "rank/active_parameters": ranks.parameters}
    return scalars | ({"budget/used": used / target} if target else {})


def install() -> None:
    """Add the callback to the Trainer's defaults, once."""
    if IncreLoraCallback not in trainer.DEFAULT_CALLBACKS:
        trainer.DEFAULT_CALLBACKS.append(IncreLoraCallback)

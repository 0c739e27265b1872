"""The Hugging Face Trainer's callback: it tells controllers the length of the run, adds penalties before clipping, and
logs ranks.

Every Trainer gets it once an adapter of ours exists; it does nothing for other models, and
`trainer.remove_callback(increlora.hosts.transformers.IncreLoraCallback)` removes it.
"""

from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, trainer

from ..callers import running
from ..errors import ConfigError
from ..runtime import Controller, controllers_of
from ..runtime.penalty import add_penalty
from .peft.drive import drive_copies, rank_summary


class IncreLoraCallback(TrainerCallback):
    """Run length at the start; the penalty's gradient before the first micro-batch of each step; ranks in the logs.

    The Trainer calls default callbacks before those of `report_to`: what is added to `logs` here reaches all."""

    controllers: Sequence[Controller] = ()

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, **kwargs: Any) -> None:
        drive_copies(model)
        self.controllers = [c for c in controllers_of(model) if any(p.requires_grad for p in c.parameters())]
        for controller in self.controllers:
            controller.expect(total_steps=state.max_steps, start=state.global_step)
            controller.attach(getattr(optimizer, "optimizer", optimizer))

    def on_step_begin(self, args: Any, state: Any, control: Any, *, optimizer: Any, **kwargs: Any) -> None:
        scaler = getattr(optimizer, "scaler", None)
        for controller in self.controllers:
            controller.begin_step(state.global_step)
            rule = controller.method.penalty
            if rule and rule.when == "before_clipping" and not controller.penalty_given:
                add_penalty(controller.deltas, rule, scale=scaler.get_scale() if scaler else 1.0)
                controller.penalty_given = True

    def on_log(self, args: Any, state: Any, control: Any, *, model: Any, logs: dict[str, float], **kw: Any) -> None:
        """Mean active rank per module, active parameters in LoRA form, and the share of the budget that is used."""
        if "loss" not in logs:  # what is logged of evaluations, and the summary at the end
            return
        try:
            ranks = rank_summary(model)
        except ConfigError:  # no adapter of ours is active
            return
        logs |= {"rank/mean": ranks.active / len(ranks.modules), "rank/active_parameters": ranks.parameters}
        if ranks.budget_ranks:
            logs["budget/used"] = ranks.active / ranks.budget_ranks
        elif ranks.budget_parameters:
            logs["budget/used"] = ranks.parameters / ranks.budget_parameters


def trainer_runs() -> bool:
    """Is a Trainer training right now? What is saved meanwhile is one of its checkpoints."""
    return running(trainer.Trainer.train) is not None


def install() -> None:
    """Add the callback to the Trainer's defaults, once."""
    if IncreLoraCallback not in trainer.DEFAULT_CALLBACKS:
        trainer.DEFAULT_CALLBACKS.append(IncreLoraCallback)

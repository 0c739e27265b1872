"""The Hugging Face Trainer: tells controllers the length of the run, and adds penalties before clipping.

The callback joins every Trainer once an adapter of ours exists; it does nothing for models without one, and
`trainer.remove_callback(IncreloraCallback)` takes it out.
"""

import importlib.util
from typing import Any

from ..runtime import controllers_of
from ..runtime.penalty import add_penalty


def callback_class() -> type:
    """The callback; built on first use, so that importing the library does not import the Trainer."""
    from transformers.trainer_callback import TrainerCallback

    class IncreloraCallback(TrainerCallback):
        """Run length at the start; the penalty's gradient before the first micro-batch of each step."""

        def on_train_begin(
            self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, **kwargs: Any
        ) -> None:
            for controller in controllers_of(model):
                controller.expect(total_steps=state.max_steps, start=state.global_step)
                if any(p.requires_grad for p in controller.parameters()):
                    controller.attach(getattr(optimizer, "optimizer", optimizer))

        def on_step_begin(
            self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, **kwargs: Any
        ) -> None:
            scaler = getattr(optimizer, "scaler", None)
            for controller in controllers_of(model):
                rule = controller.method.penalty
                if rule and rule.place == "before_clipping" and not controller.penalty_given:
                    add_penalty(controller.deltas, rule, scale=scaler.get_scale() if scaler else 1.0)
                    controller.penalty_given = True

    return IncreloraCallback


def install() -> None:
    """Add the callback to the Trainer's defaults, once; nothing happens without transformers' Trainer."""
    if importlib.util.find_spec("accelerate") is None:  # the Trainer cannot be imported without it
        return
    from transformers import trainer

    if not any(getattr(c, "__name__", "") == "IncreloraCallback" for c in trainer.DEFAULT_CALLBACKS):
        trainer.DEFAULT_CALLBACKS.append(callback_class())

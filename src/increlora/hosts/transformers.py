"""The Hugging Face Trainer: tells controllers the length of the run, and adds penalties before clipping.

The callback joins every Trainer once an adapter of ours exists; it does nothing for models without one, and
`trainer.remove_callback(increlora.hosts.transformers.IncreloraCallback)` takes it out.
"""

import functools
import importlib.util
from typing import Any

from ..runtime import Controller, controllers_of
from ..runtime.penalty import add_penalty


@functools.cache
def callback_class() -> type:
    """The callback; built on first use, so that importing the library does not import the Trainer."""
    from transformers.trainer_callback import TrainerCallback

    class IncreloraCallback(TrainerCallback):
        """Run length at the start; the penalty's gradient before the first micro-batch of each step."""

        def __init__(self) -> None:
            self.controllers: list[Controller] = []

        def on_train_begin(
            self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, **kwargs: Any
        ) -> None:
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

    return IncreloraCallback


def __getattr__(name: str) -> Any:
    if name == "IncreloraCallback":
        return callback_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def install() -> None:
    """Add the callback to the Trainer's defaults, once; nothing happens without transformers' Trainer."""
    if importlib.util.find_spec("accelerate") is None:  # the Trainer cannot be imported without it
        return
    from transformers import trainer

    if callback_class() not in trainer.DEFAULT_CALLBACKS:
        trainer.DEFAULT_CALLBACKS.append(callback_class())

"""From settings to what is trained: the model with a fresh adapter, and the task."""

import re
import warnings
from typing import Any

from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...errors import ConfigError
from ..tasks import Task, find_task, load_model, load_task
from .settings import TrainSettings


def build(settings: TrainSettings) -> tuple[Any, Task]:
    """The task, read for the model's tokenizer, and the model with a fresh adapter."""
    model, tokenizer = load_model(settings.task, settings.model, settings.seed)
    task = load_task(settings.task, tokenizer, **vars(settings.task_options()))
    return adapted(settings, model), task


def adapted(settings: TrainSettings, model: nn.Module) -> Any:
    if settings.head_dropout is not None:
        set_head_dropout(model, settings.head_dropout)
    kind = find_task(settings.task).task_type  # SEQ_CLS: the head is trained, too
    config = settings.peft_config(target_modules(settings.target_modules, model), task_type=kind)
    if settings.target_modules is None:
        config.target_modules = set(filter(config.settings().adapts, config.target_modules))
    with warnings.catch_warnings():  # peft 0.21 reads a property by the name it had before transformers 5.23
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return get_peft_model(model, config)


def target_modules(chosen: str | None, model: nn.Module) -> str | list[str]:
    """What `--target-modules` means; by default every linear map of the trunk but a pooler's."""
    if chosen is not None:
        return chosen.split(",") if re.fullmatch(r"[\w.]+(,[\w.]+)*", chosen) else chosen
    trunk = f"{model.base_model_prefix}."
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    return [name for name in linear if name.startswith(trunk) and "pooler" not in name.split(".")]


def set_head_dropout(model: nn.Module, share: float) -> None:
    """Set the dropout layers outside the trunk and its pooler. Raises ConfigError if there is none."""
    trunk = f"{model.base_model_prefix}."
    found = [m for name, m in model.named_modules() if isinstance(m, nn.Dropout) and not name.startswith(trunk)]
    if not found:
        raise ConfigError(f"--head-dropout {share}: {type(model).__name__} has no dropout before a head; leave it out")
    for dropout in found:
        dropout.p = share

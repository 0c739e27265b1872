"""Tasks by name: data in, numbers out."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from ...errors import TaskError
from ...naming import nearest
from .backbone import DEFAULT_BACKBONE, load_causal, load_classifier, load_tokenizer, meta_model, resolve_backbone
from .base import Task, TaskOptions, accuracy
from .glue import GLUE, glue_task, glue_train_size
from .lm import lm_task
from .planted import PlantedNet, planted_task
from .sft import sft_task
from .stdlib_docs import stdlib_docs_task
from .uuids import uuid_base, uuid_decoder, uuid_task

__all__ = [
    "DEFAULT_BACKBONE", "TASKS", "Task", "TaskKind", "TaskOptions", "accuracy", "find_task", "load_causal",
    "load_classifier", "load_model", "load_task", "model_name", "resolve_backbone", "sketch", "train_size",
]  # fmt: skip


@dataclass(frozen=True)
class TaskKind:
    """A task before its data is read.

    Attributes:
        build: (tokenizer, options) → task.
        task_type: peft's name of the model: a backbone under a fresh head, which is trained, too (SEQ_CLS), a language
            model (CAUSAL_LM), or None for the task's own small net.
        num_labels: outputs of the head, 1 for a regression.
        net: (seed) → the task's own net.   outline: () → a net of its shapes with any values.
        own_data: what is said to who names `data`, of a task that has its own; other tasks read it.
    """

    build: Callable[[Any, TaskOptions], Task]
    task_type: Literal["SEQ_CLS", "CAUSAL_LM"] | None = "SEQ_CLS"
    num_labels: int = 2
    net: Callable[[int], nn.Module] | None = None
    outline: Callable[[], nn.Module] | None = None
    own_data: str | None = None


UUID_KIND = TaskKind(
    uuid_task, None, net=lambda seed: deepcopy(uuid_base()), outline=uuid_decoder, own_data="draws its own pairs"
)
PLANTED_KIND = TaskKind(
    planted_task, None, net=PlantedNet, outline=partial(PlantedNet, 0), own_data="draws its own data"
)
TASKS: dict[str, TaskKind] = {
    "stdlib-docs": TaskKind(stdlib_docs_task, own_data="reads the running Python's own library"),
    **{f"glue/{n}": TaskKind(partial(glue_task, n), num_labels=len(g.labels) or 1) for n, g in GLUE.items()},
    "lm": TaskKind(lm_task, "CAUSAL_LM"),
    "sft": TaskKind(sft_task, "CAUSAL_LM"),
    "planted": PLANTED_KIND,
    "uuid": UUID_KIND,
    "uuid/value": replace(UUID_KIND, build=partial(uuid_task, value_only=True)),
}


def find_task(name: str) -> TaskKind:
    """The kind of task called `name`. Raises TaskError with the nearest name there is."""
    if name not in TASKS:
        raise TaskError(f"task {name!r} is not known; did you mean {nearest(name, TASKS)!r}? Known: {', '.join(TASKS)}")
    return TASKS[name]


def load_model(task: str, model: str | None, seed: int) -> tuple[nn.Module, Any]:
    """The model that a task trains, and its tokenizer (None where there is no text).

    Args:
        model: name on the hub or folder; None: the task's default.   seed: of the head, or of the task's own net.
    Raises: TaskError if the task has no default model or takes none; BackboneError if it cannot be loaded."""
    kind, name = find_task(task), model_name(task, model)
    if kind.net is not None:
        return kind.net(seed), None
    return load_classifier(name, kind.num_labels, seed) if kind.task_type == "SEQ_CLS" else load_causal(name)


def sketch(task: str, model: str | None) -> nn.Module:
    """The model that a task trains, on the meta device. Raises: as `load_model`."""
    kind, name = find_task(task), model_name(task, model)
    if kind.outline is None:
        return meta_model(name, kind.num_labels if kind.task_type == "SEQ_CLS" else None)
    with torch.device("meta"):
        return kind.outline()


def model_name(task: str, model: str | None) -> str:
    """What the model that a task trains is called. Raises TaskError if it has no default or takes none."""
    kind = find_task(task)
    if kind.task_type is None and model is not None:
        raise TaskError(f"--model {model}: {task} makes its own model; leave it out")
    if kind.task_type == "CAUSAL_LM" and model is None:
        raise TaskError(f"--task {task} trains a causal language model: name one by --model")
    return model or (DEFAULT_BACKBONE if kind.task_type else f"{task}'s own net")


def train_size(task: str, model: str | None, options: TaskOptions) -> int:
    """Number of training examples; of GLUE the official number where no data is given. No weights are loaded."""
    if task.startswith("glue/"):
        size = glue_train_size(task.removeprefix("glue/"), options.data)
        return min(size, options.max_train_samples or size)
    tokenizer = load_tokenizer(model_name(task, model)) if find_task(task).task_type else None
    return len(load_task(task, tokenizer, **vars(options)).train)


def load_task(name: str, tokenizer: Any, **options: Any) -> Task:
    """The task called `name`, tokenized; `options` as in `TaskOptions`. Raises TaskError for name, data or limits."""
    kind, chosen = find_task(name), TaskOptions(**options)
    if kind.own_data is not None and chosen.data is not None:
        raise TaskError(f"--data {chosen.data}: {name} {kind.own_data}; leave it out")
    most = getattr(tokenizer, "model_max_length", chosen.max_length)
    if chosen.max_length > most:
        raise TaskError(f"max_length is {chosen.max_length} but this model reads at most {most} tokens; lower it")
    return kind.build(tokenizer, chosen)

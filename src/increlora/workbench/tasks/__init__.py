"""Tasks by name: data in, numbers out."""

from collections.abc import Callable
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
from .small import small_causal
from .stdlib_docs import stdlib_docs_task
from .uuids import load_uuid_base, uuid_decoder, uuid_task

__all__ = [
    "DEFAULT_BACKBONE", "TASKS", "Task", "TaskKind", "TaskOptions", "accuracy", "find_task", "load_causal",
    "load_classifier", "load_model", "load_task", "model_name", "resolve_backbone", "sketch", "small_causal",
    "train_size",
]  # fmt: skip


@dataclass(frozen=True)
class TaskKind:
    """A task before its data is read.

    Attributes:
        build: (tokenizer, options) → task.
        model: a backbone under a fresh head (`classifier`), a language model (`causal`), or the task's `own` small net.
        num_labels: outputs of the head, 1 for a regression.
        net: (seed) → the task's `own` net.   outline: () → a net of its shapes with any values, if that is quicker.
        own_data: what is said to who names `data`, of a task that has its own; other tasks read it.
    """

    build: Callable[[Any, TaskOptions], Task]
    model: Literal["classifier", "causal", "own"] = "classifier"
    num_labels: int = 2
    net: Callable[[int], nn.Module] | None = None
    outline: Callable[[], nn.Module] | None = None
    own_data: str | None = None

    @property
    def task_type(self) -> str | None:
        """peft's name of the kind; with SEQ_CLS the head is trained, too."""
        return {"classifier": "SEQ_CLS", "causal": "CAUSAL_LM", "own": None}[self.model]


# One base for all seeds: what a seed draws is the pairs.
UUID_KIND = TaskKind(
    uuid_task, "own", net=lambda seed: load_uuid_base(), outline=uuid_decoder, own_data="draws its own pairs"
)

TASKS: dict[str, TaskKind] = {
    "stdlib-docs": TaskKind(stdlib_docs_task, own_data="reads the running Python's own library"),
    **{f"glue/{n}": TaskKind(partial(glue_task, n), num_labels=len(g.labels) or 1) for n, g in GLUE.items()},
    "lm": TaskKind(lm_task, "causal"),
    "sft": TaskKind(sft_task, "causal"),
    "planted": TaskKind(planted_task, "own", net=PlantedNet, own_data="draws its own data"),
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
    kind = find_task(task)
    if kind.net is not None:
        if model is not None:
            raise TaskError(f"--model {model}: {task} makes its own model; leave it out")
        return kind.net(seed), None
    name = required_name(task, model)
    return load_causal(name) if kind.model == "causal" else load_classifier(name, kind.num_labels, seed)


def sketch(task: str, model: str | None) -> nn.Module:
    """The model that a task trains, on the meta device. Raises: as `load_model`."""
    kind = find_task(task)
    if kind.net is not None:
        with torch.device("meta"):
            return kind.outline() if kind.outline is not None else kind.net(0)
    return meta_model(required_name(task, model), kind.num_labels if kind.model == "classifier" else None)


def required_name(task: str, model: str | None) -> str:
    if find_task(task).model == "causal" and model is None:
        raise TaskError(f"--task {task} trains a causal language model: name one by --model")
    return model or DEFAULT_BACKBONE


def train_size(task: str, model: str | None, options: TaskOptions) -> int:
    """Number of training examples; of GLUE the official number where no data is given. No weights are loaded."""
    if task.startswith("glue/"):
        size = glue_train_size(task.removeprefix("glue/"), options.data)
        return min(size, options.max_train_samples or size)
    own = find_task(task).model == "own"
    tokenizer = None if own else load_tokenizer(model or DEFAULT_BACKBONE)
    return len(load_task(task, tokenizer, **vars(options)).train)


def model_name(task: str, model: str | None) -> str:
    """What the model that `load_model` loads is called."""
    return model or {"classifier": DEFAULT_BACKBONE, "own": f"{task}'s own net"}.get(find_task(task).model, "none")


def load_task(name: str, tokenizer: Any, **options: Any) -> Task:
    """The task called `name`, tokenized; `options` as in `TaskOptions`. Raises TaskError for name, data or limits."""
    kind, chosen = find_task(name), TaskOptions(**options)
    if kind.own_data is not None and chosen.data is not None:
        raise TaskError(f"--data {chosen.data}: {name} {kind.own_data}; leave it out")
    most = getattr(tokenizer, "model_max_length", chosen.max_length)
    if chosen.max_length > most:
        raise TaskError(f"max_length is {chosen.max_length} but this model reads at most {most} tokens; lower it")
    return kind.build(tokenizer, chosen)

"""Tasks by name: data in, metric out."""

import difflib
from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from increlora.errors import TaskError
from increlora.tasks.backbone import DEFAULT_BACKBONE, load_causal, load_classifier, resolve_backbone
from increlora.tasks.base import Task, accuracy
from increlora.tasks.stdlib_docs import stdlib_docs_task

__all__ = [
    "DEFAULT_BACKBONE",
    "TASKS",
    "Task",
    "accuracy",
    "load_causal",
    "load_classifier",
    "load_task",
    "resolve_backbone",
]

TASKS: dict[str, Callable[..., Task]] = {"stdlib-docs": stdlib_docs_task}


def load_task(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 64,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    seed: int = 0,
) -> Task:
    """The task called `name`, tokenized.

    Args:
        max_length: tokens per example, longer ones are cut.
        max_train_samples, max_eval_samples: upper limits ≥ 2; None for all.
        seed: draws the training examples; the validation examples do not depend on it.
    Raises: TaskError if there is no such task, or its data cannot be had, or a limit is below 2."""
    if name not in TASKS:
        nearest = difflib.get_close_matches(name, TASKS, n=1, cutoff=0)[0]
        raise TaskError(f"task {name!r} is not known; did you mean {nearest!r}? Known: {', '.join(TASKS)}")
    for option, value in {"max_train_samples": max_train_samples, "max_eval_samples": max_eval_samples}.items():
        if value is not None and value < 2:
            raise TaskError(f"{option} is {value} but a balanced sample needs 2 at least; raise it or leave it out")
    return TASKS[name](
        tokenizer,
        max_length=max_length,
        max_train_samples=max_train_samples,
        max_eval_samples=max_eval_samples,
        seed=seed,
    )

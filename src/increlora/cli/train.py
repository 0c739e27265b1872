"""One training run, from settings to a finished run folder."""

import contextlib
import math
import re
import time
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft import TaskType, get_peft_model
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel, PrinterCallback
from transformers.pytorch_utils import Conv1D

from ..errors import CheckpointError
from ..hosts.export import export_lora
from ..hosts.peft.config import check_folder
from ..runs import RunFolder, checkpoint_step, whole_folder
from ..runtime import controllers_of
from ..schedules import Run
from ..tasks import Task, load_causal, load_classifier, load_task
from .display import Progression, show_result
from .recorder import Recorder
from .result import close, finish, initial_state
from .settings import TrainSettings
from .trainer import SampledTrainer, training_arguments

PARTS = 4  # evaluations and checkpoints per run
CHECKPOINT_FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


def train(settings: TrainSettings, folder: RunFolder, console: Console, *, resume: bool, overwrite: bool) -> None:
    """Train, and leave a complete run folder; `resume` continues the run that is there.

    Everything that can be refused is refused before the folder is touched.
    Raises: IncreloraError, peft's and the file system's errors; run.json then says `failed`, and `interrupted` after
    Ctrl-C.
    """
    began = time.perf_counter()
    checkpoint = folder.checkpoint() if resume else None
    if checkpoint is not None:
        check_checkpoint(checkpoint)
    elif not resume:
        folder.check_free(overwrite=overwrite)
    model, task = build(settings)
    total = math.ceil(settings.epochs * math.ceil(len(task.train) / settings.batch_size))
    check_schedule(model, total)
    state = (folder.state() if resume else None) or initial_state(settings, model, task, folder.path)
    open_folder(settings, folder, state, checkpoint, resume=resume, overwrite=overwrite)
    with recorded(folder, state, began):
        fit(settings, folder, model, task, console, checkpoint=checkpoint, total=total)
        with whole_folder(folder.path / "adapter") as adapter:
            model.save_pretrained(adapter)
        export_lora(model, folder.path / "lora")
        finish(state, folder, model)
    show_result(console, state, folder.path)


# -- the model and the task ------------------------------------------------------------------------------------------


def build(settings: TrainSettings) -> tuple[Any, Task]:
    """The backbone with a fresh adapter, and the task, tokenized for it."""
    model, tokenizer = load_classifier(settings.model, 2, settings.seed)
    task = load_task(
        settings.task, tokenizer, max_length=settings.max_length, max_train_samples=settings.max_train_samples,
        max_eval_samples=settings.max_eval_samples, seed=settings.seed,
    )  # fmt: skip
    if task.num_labels is None:
        model, _ = load_causal(settings.model)
    elif task.num_labels != 2:
        model, _ = load_classifier(settings.model, task.num_labels, settings.seed)
    kind = TaskType.CAUSAL_LM if task.num_labels is None else TaskType.SEQ_CLS  # SEQ_CLS: the head is trained, too
    config = settings.peft_config(target_modules(settings.target_modules, model), task_type=kind)
    with warnings.catch_warnings():  # peft 0.21 reads a property by the name it had before transformers 5.23
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return get_peft_model(model, config), task


def target_modules(chosen: str | None, model: PreTrainedModel) -> str | list[str]:
    """What `--target-modules` means; by default every linear map of the trunk but a pooler's."""
    if chosen is not None:
        return chosen.split(",") if re.fullmatch(r"[\w.]+(,[\w.]+)*", chosen) else chosen
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and name.startswith(model.base_model_prefix + ".")
        and "pooler" not in name.split(".")
    ]


def check_schedule(model: nn.Module, steps: int) -> None:
    """Ask every schedule for its events in a run of so many steps. Raises ScheduleError if one falls short."""
    for controller in controllers_of(model):
        if controller.method.events is not None and not controller.finished:
            controller.method.events(Run(steps, len(controller.names)), controller.holdings(), 0)


# -- the folder ------------------------------------------------------------------------------------------------------


def open_folder(
    settings: TrainSettings, folder: RunFolder, state: dict[str, Any], checkpoint: Path | None, *, resume: bool,
    overwrite: bool,
) -> None:  # fmt: skip
    """Begin the run's files, or cut them back to the checkpoint."""
    if not resume:
        folder.create(settings.toml(folder.path), state, overwrite=overwrite)
        return
    done = checkpoint_step(checkpoint) if checkpoint else 0
    folder.keep_rows("metrics.jsonl", before=done + 1)  # counts steps done
    folder.keep_rows("events.jsonl", before=done)  # names the step, from 0
    state |= {"status": "running", "error": ""}
    folder.write_state(state)


def check_checkpoint(path: Path) -> None:
    """Raise CheckpointError if a file of the checkpoint is missing or damaged, before anything is loaded."""
    remedy = f"remove {path} to resume from the checkpoint before it"
    for name in ("adapter_model.safetensors", *CHECKPOINT_FILES):
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name} is missing; {remedy}")
    try:
        check_folder(path)
        for name in CHECKPOINT_FILES:
            check_archive(path / name)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; or {remedy}") from error


def check_archive(path: Path) -> None:
    """Raise CheckpointError if a file written by torch.save is not whole."""
    try:
        with zipfile.ZipFile(path) as file:
            if bad := file.testzip():
                raise zipfile.BadZipFile(f"bad checksum of {bad}")
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{path} is damaged or truncated ({error}); restore it from a copy") from error


@contextlib.contextmanager
def recorded(folder: RunFolder, state: dict[str, Any], began: float) -> Iterator[None]:
    """Whatever happens inside, run.json says how it ended."""
    status, message = "failed", ""
    try:
        yield
        status = "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    except BaseException as error:
        message = f"{type(error).__name__}: {error}"
        raise
    finally:
        close(state, status, message, seconds=time.perf_counter() - began)
        folder.write_state(state)


# -- training --------------------------------------------------------------------------------------------------------


def fit(
    settings: TrainSettings, folder: RunFolder, model: Any, task: Task, console: Console, *, checkpoint: Path | None,
    total: int,
) -> None:  # fmt: skip
    """Measure, train `total` steps (the rest of them after a checkpoint), measure in between and at the end."""
    every = math.ceil(total / PARTS)
    trainer = SampledTrainer(
        model=model,
        args=training_arguments(settings, folder.path / "checkpoints", total=total, save_every=every),
        train_dataset=task.train,
        data_collator=task.collate,
    )
    trainer.remove_callback(PrinterCallback)
    if not folder.rows("metrics.jsonl"):
        folder.append("metrics.jsonl", {"step": 0, task.metric: task.evaluate(model)})
    done = checkpoint_step(checkpoint) if checkpoint else 0
    budget = controllers_of(model)[0].method.budget.ranks if controllers_of(model) else None
    with Progression(console, total=total, done=done, budget=budget) as progress:
        trainer.add_callback(Recorder(folder, task, progress, evaluate_every=every))
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

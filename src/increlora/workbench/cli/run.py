"""One training run, from settings to a finished run folder."""

import math
import time
import warnings
import zipfile
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel, PrinterCallback

from ...errors import CheckpointError
from ...export.lora import is_exact, write_lora
from ...files import whole
from ...hosts.peft.config import check_folder
from ...runtime import controllers_of
from ..runs import RunFolder, checkpoint_step
from ..tasks import Task, model_name
from .build import build, forecast_run
from .display import Progression, show_result
from .recorder import Recorder
from .result import close, finish, initial_state
from .settings import TrainSettings
from .trainer import SampledTrainer, check_logger, training_arguments

CHECKPOINTS = 4  # per run
EVALUATION_BATCHES = 2  # training batches in one batch of evaluation: without gradients twice the examples fit
CHECKPOINT_FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


def train(settings: TrainSettings, folder: RunFolder, console: Console, *, resume: bool, overwrite: bool) -> None:
    """Train, and leave a complete run folder; `resume` continues the run that is there.

    Everything that can be refused is refused before the folder is touched.
    Raises: IncreLoraError, peft's and the file system's errors; run.json then says `failed`, and `interrupted` after
    Ctrl-C.
    """
    began = time.perf_counter()
    checkpoint = folder.checkpoint() if resume else None
    if checkpoint is not None:
        check_checkpoint(checkpoint)
    elif not resume:
        folder.check_free(overwrite=overwrite)
    check_logger(settings.report_to)
    model, task = build(settings)
    forecast_run(model, total_steps(settings, len(task.train)))  # raises where a rule cannot do its work
    state = (folder.state() if resume else None) or initial_state(settings, model, task, folder.path)
    if resume:
        rewind(folder, state, steps_done(checkpoint))
    else:
        folder.create(settings.toml(folder.path), state, overwrite=overwrite)
    status, message = "finished", ""
    try:
        fit(settings, folder, model, task, console, checkpoint=checkpoint)
        save(settings, folder, model)
        finish(state, folder, model, task)
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        status, message = ("interrupted", "") if interrupted else ("failed", f"{type(error).__name__}: {error}")
        raise
    finally:
        close(state, status, message, seconds=time.perf_counter() - began)
        folder.write_state(state)
    show_result(console, state, folder.path)


def save(settings: TrainSettings, folder: RunFolder, model: Any) -> None:
    """Write adapter/ and, where it is exact, lora/. They name the base model as the user did, not its path here."""
    base = model.get_base_model()
    if isinstance(base, PreTrainedModel):
        name = model_name(settings.task, settings.model)
        model.peft_config["default"].base_model_name_or_path = name
        base.name_or_path = base.config._name_or_path = name  # the card's
    with warnings.catch_warnings():
        # by that name peft asks the hub whether the vocabulary was changed; here it never is
        warnings.filterwarnings("ignore", "Unable to fetch remote file|Could not find a config file", UserWarning)
        with whole(folder.path / "adapter") as adapter:
            model.save_pretrained(adapter)
        if is_exact(model):  # otherwise `show_result` says how it can leave
            write_lora(model, folder.path / "lora")


def steps_done(checkpoint: Path | None) -> int:
    return checkpoint_step(checkpoint) if checkpoint is not None else 0


def total_steps(settings: TrainSettings, examples: int) -> int:
    """Optimizer steps of a run over so many training examples."""
    return math.ceil(settings.epochs * math.ceil(examples / settings.batch_size))


# -- the folder ------------------------------------------------------------------------------------------------------


def rewind(folder: RunFolder, state: dict[str, Any], done: int) -> None:
    """Cut the run's files back to a checkpoint after `done` steps."""
    for name in ("metrics.jsonl", "trace.jsonl", "spectra.jsonl"):
        folder.keep_rows(name, before=done + 1)  # counts steps done
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
            with zipfile.ZipFile(path / name) as file:
                if bad := file.testzip():
                    raise zipfile.BadZipFile(f"bad checksum of {bad}")
    except CheckpointError as error:
        raise CheckpointError(f"{error}; or {remedy}") from error
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{path / name} is damaged or truncated ({error}); restore it from a copy, or {remedy}"
        ) from error


# -- training --------------------------------------------------------------------------------------------------------


def fit(
    settings: TrainSettings, folder: RunFolder, model: Any, task: Task, console: Console, *, checkpoint: Path | None
) -> None:
    """Evaluate, train from the checkpoint or from the start, evaluate in between and at the end."""
    total = total_steps(settings, len(task.train))
    args = training_arguments(
        settings, folder.path / "checkpoints", total=total, save_every=math.ceil(total / CHECKPOINTS)
    )
    trainer = SampledTrainer(model=model, args=args, train_dataset=task.train, data_collator=task.collate)
    trainer.remove_callback(PrinterCallback)
    together = EVALUATION_BATCHES * settings.batch_size
    if not folder.rows("metrics.jsonl"):
        folder.append("metrics.jsonl", {"step": 0, **task.evaluate(model, batch_size=together)})
    budget = controllers_of(model)[0].method.budget.ranks if controllers_of(model) else None
    every = math.ceil(total / settings.evaluations)
    with Progression(console, total=total, done=steps_done(checkpoint), budget=budget) as progress:
        trainer.add_callback(Recorder(folder, task, progress, evaluate_every=every, batch_size=together))
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

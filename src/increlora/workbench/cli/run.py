"""One training run, from settings to a finished run folder."""

import time
import warnings
import zipfile
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel

from ...errors import CheckpointError
from ...export.lora import export_lora, is_exact
from ...files import whole
from ...hosts.peft.checkpoint import read_config, read_contents
from ...runtime import controllers_of
from ..runs import RunFolder
from ..tasks import model_name
from .build import build
from .display import show_result
from .result import close, finish, initial_state
from .settings import TrainSettings
from .trainer import check_logger, fit

CHECKPOINT_FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


def train(settings: TrainSettings, folder: RunFolder, console: Console, *, resume: bool, overwrite: bool) -> None:
    """Train, and leave a complete run folder; `resume` continues the run that is there.

    Everything that can be refused is refused before the folder is touched.
    Raises: IncreLoraError, peft's and the file system's errors; run.json then says `failed`, and `interrupted` after
    Ctrl-C."""
    began = time.perf_counter()
    checkpoint = folder.checkpoint() if resume else None
    if checkpoint is not None:
        check_checkpoint(checkpoint)
    elif not resume:
        folder.check_free(overwrite=overwrite)
    check_logger(settings.report_to)
    model, task = build(settings)
    for controller in controllers_of(model):
        controller.forecast(settings.total_steps(len(task.train)))  # raises where a rule cannot do its work
    state = (folder.state() if resume else None) or initial_state(settings, model, task, folder.path)
    if resume:
        folder.rewind(checkpoint)
        folder.write_state(state | {"status": "running", "error": ""})
    else:
        folder.create(settings.toml(folder.path), state, overwrite=overwrite)
    status, message = "finished", ""
    try:
        fit(settings, folder, model, task, console, checkpoint)
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
        warnings.filterwarnings("ignore", ".* will refuse .*, which holds more", UserWarning)  # see `check`
        with whole(folder.path / "adapter") as adapter:
            model.save_pretrained(adapter)
        finite = all(p.isfinite().all() for p in model.parameters() if p.requires_grad)
        if finite and is_exact(model):  # otherwise `show_result` says how it can leave
            export_lora(model, folder.path / "lora")


def check_checkpoint(path: Path) -> None:
    """Raise CheckpointError if a file of the checkpoint is missing or damaged, before anything is loaded."""
    remedy = f"remove {path} to resume from the checkpoint before it"
    try:
        for file in (path / name for name in ("adapter_model.safetensors", *CHECKPOINT_FILES)):
            if not file.is_file():
                raise CheckpointError(f"{file} is missing; restore it from a copy")
            if file.name in CHECKPOINT_FILES and (bad := zipfile.ZipFile(file).testzip()):
                raise zipfile.BadZipFile(f"bad checksum of {bad}")
        read_config(path)
        read_contents(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; or {remedy}") from error
    except zipfile.BadZipFile as why:
        raise CheckpointError(f"{file} is damaged or truncated ({why}); restore it from a copy, or {remedy}") from why

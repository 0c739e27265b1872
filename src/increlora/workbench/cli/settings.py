"""What a training run is: its settings, and the command and file that say them."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import tomli_w

from ...decide.schedules import Time
from ...errors import ConfigError, RunFolderError
from ..tasks import TaskOptions
from .options import config_class, default_options, option_names, parse_options, toml_value

PRESETS = ("paper",)


@dataclass(frozen=True)
class TrainSettings:
    """Settings of a run; the defaults are those of the demo.

    Attributes:
        method, task: by name.   model: name on the hub, or a folder; None for the task's default.
        data: folder or file with the task's data; None for the task's own source.
        r: LoRA's rank, or the average rank the budget pays for.   preset: `paper` for the published code's settings.
        target_modules: None for the linear maps of the trunk (no pooler, no head); names separated by commas,
            `all-linear`, or a regular expression.
        epochs: passes over the training examples, fractions allowed.   batch_size: examples per step.
        lr: peak learning rate; it rises during `lr_warmup` (steps, or a share of the run), then falls linearly to 0.
        weight_decay: of all trained parameters.   max_grad_norm: gradients are clipped to it.
        max_length: tokens per example.   max_train_samples, max_eval_samples: None for all.
        head_dropout: before a classification head; None for the model's own.
        evaluations: how often the validation examples are measured.   report_to: the Trainer's loggers, or `none`.
        seed: of data order, head, adapter and dropout.   options: further options of the method, by name.
    """

    method: str = "increlora"
    task: str = "stdlib-docs"
    model: str | None = None
    data: str | None = None
    r: int = 8
    preset: str | None = None
    target_modules: str | None = None
    epochs: float = 2.0
    lr: float = 1e-3
    batch_size: int = 32
    max_length: int = 64
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    lr_warmup: Time = 0.06
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    head_dropout: float | None = None
    evaluations: int = 4
    report_to: str = "none"
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in {"batch_size": 1, "max_length": 8, "evaluations": 1, "seed": 0}.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{flag(name)} {getattr(self, name)}: give at least {least}")
        for name in ("epochs", "lr", "max_grad_norm"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{flag(name)} {getattr(self, name)}: give a number above 0")
        for name in ("lr_warmup", "weight_decay"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{flag(name)} {getattr(self, name)}: give a number of at least 0")
        if self.head_dropout is not None and not 0 <= self.head_dropout < 1:
            raise ConfigError(f"--head-dropout {self.head_dropout}: give a number in [0, 1)")
        if self.preset is not None and (self.preset not in PRESETS or not hasattr(config_class(self.method), "paper")):
            raise ConfigError(f"--preset {self.preset}: {self.method} has {self._presets()}")
        try:
            re.compile(self.target_modules or "")
        except re.error as error:
            raise ConfigError(f"--target-modules {self.target_modules}: no regular expression ({error})") from error
        self.task_options()
        self.peft_config()

    def task_options(self) -> TaskOptions:
        """What the settings say about the data. Raises TaskError for limits out of range or data that is not there."""
        data = Path(self.data) if self.data else None
        return TaskOptions(data, self.max_length, self.max_train_samples, self.max_eval_samples, self.seed)

    def _presets(self) -> str:
        return "the preset 'paper'" if hasattr(config_class(self.method), "paper") else "no presets: leave it out"

    def peft_config(self, target_modules: Any = "all-linear", **own: Any) -> Any:
        """The method's peft config. Raises ConfigError, whoever refuses a value."""
        make = config_class(self.method)
        if self.preset is not None:
            make = getattr(make, self.preset)
        try:
            return make(r=self.r, seed=self.seed, target_modules=target_modules, **(own | dict(self.options)))
        except ConfigError:
            raise
        except (TypeError, ValueError) as error:
            raise ConfigError(f"--method {self.method}: {error}") from error

    def command(self, out: Path) -> str:
        """The command that makes this run, naming what differs from the defaults."""
        words = ["increlora", "train", "--method", self.method, "--task", self.task]
        for option in fields(self)[2:]:
            value = getattr(self, option.name)
            if option.name != "options" and value != option.default:
                words += [flag(option.name), str(value)]
        usual = self._usual_options()
        for name, value in (usual | dict(self.options)).items():
            if value != usual.get(name):
                words += ["--set", f"{name}={value if isinstance(value, str) else toml_value(value)}"]
        return shlex.join([*words, "--out", str(out)])

    def _usual_options(self) -> dict[str, Any]:
        """Options as they are when none is given."""
        if self.preset is None:
            return default_options(self.method)
        config = getattr(config_class(self.method), self.preset)(r=self.r)
        return {name: getattr(config, name) for name in option_names(self.method)}

    def toml(self, out: Path) -> str:
        """config.toml: every setting, the method's options included, under the command that makes the run.

        TOML has no null: settings that are None are left out, options that are None against their default say "none".
        """
        usual = self._usual_options()
        every = {name: getattr(self.peft_config(), name) for name in usual} | dict(self.options)
        options = {name: value for name, value in every.items() if value is not None or usual.get(name) is not None}
        table = {option.name: getattr(self, option.name) for option in fields(self)}
        table["options"] = {name: "none" if value is None else value for name, value in options.items()}
        return f"# {self.command(out)}\n" + tomli_w.dumps({k: v for k, v in table.items() if v is not None})


def resolve(given: Mapping[str, Any], pairs: Sequence[str], recipe: Mapping[str, Any] | None = None) -> TrainSettings:
    """Settings from options given on the command line (None: not given), `--set key=value` pairs, and a recipe's table.

    What is given on the command line counts; the recipe's preset and method options are dropped with its method."""
    table = dict(recipe or {})
    chosen = {name: value for name, value in given.items() if value is not None}
    method = chosen.get("method", table.get("method", TrainSettings.method))
    if method != table.get("method", TrainSettings.method):
        table |= {"options": {}, "preset": None}
    if chosen.get("preset") == "none":
        chosen["preset"] = None
    kept = table.pop("options", {})
    return TrainSettings(**(table | chosen), options={**kept, **parse_options(method, pairs)})


def refuse_changes(settings: TrainSettings, given: Mapping[str, Any], pairs: Sequence[str], out: Path) -> None:
    """A resumed run keeps its settings. Raises RunFolderError naming the one that was given another value."""
    options = settings._usual_options() | dict(settings.options)
    asked = [(flag(n), getattr(settings, n), v) for n, v in given.items() if v is not None]
    asked += [(f"--set {n}", options.get(n), v) for n, v in parse_options(settings.method, pairs).items()]
    for name, here, value in asked:
        if value != here:
            raise RunFolderError(
                f"{out} runs with {name} {here}, not {value}: leave it out to resume, or start another run with --out"
            )


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")

"""What a training run is: its settings, and the command and file that say them."""

import math
import re
import shlex
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

import tomli_w

from ...errors import ConfigError, RunFolderError, TaskError
from ...hosts.peft.config import CONFIGS, OURS, type_name
from ...hosts.peft.old import DEFAULT_SWITCHES
from ...hosts.peft.options import WRITTEN
from ...naming import nearest
from ...registry import METHODS
from ..tasks import TASKS, TaskOptions
from .options import Valid, checked, flag, from_text, option, to_text

SET_HERE = {"task_type", "base_model_name_or_path", "inference_mode", *WRITTEN, *OURS}
ABOVE_0 = (lambda value: 0 < value < math.inf), "a number above 0"
SHARE = (lambda value: 0 <= value < 1), "a number in [0, 1)"


def at_least(least: int) -> Valid:
    return (lambda value: least <= value < math.inf), f"at least {least}"


@dataclass(frozen=True)
class TrainSettings:
    """Settings of a run; the defaults are those of the demo.

    Every option is declared here and nowhere else: `max_length` is the flag `--max-length`, the key `max_length` of a
    recipe and of config.toml. `options` holds those of the method, by name: `--set` and the table `[options]`."""

    method: str = option("increlora", f"{', '.join(METHODS)}.")
    task: str = option("stdlib-docs", f"{', '.join(TASKS)}.")
    model: str | None = option(None, "Name on the hub, or a folder.", unset="the task's")
    data: str | None = option(None, "Folder or file with the task's data.", unset="the task's own source")
    r: int = option(8, "LoRA's rank, or the average rank per module that the budget allows.")
    preset: Literal["paper"] | None = option(None, "`paper`: settings of the published code.")
    target_modules: str | None = option(
        None,
        "Modules to adapt: names separated by commas, all-linear, or a regular expression.",
        unset="linear layers of the trunk, without pooler and head",
    )
    epochs: float = option(2.0, "Passes over the training examples; fractions are allowed.", valid=ABOVE_0)
    lr: float = option(1e-3, "Peak learning rate; after it the rate falls linearly to 0.", valid=ABOVE_0)
    lr_warmup: int | float = option(
        0.06, "The learning rate rises for so many steps (an int) or this share of the run (0.1).", valid=at_least(0)
    )
    weight_decay: float = option(0.0, "Weight decay of all trained parameters.", valid=at_least(0))
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm.", valid=ABOVE_0)
    head_dropout: float | None = option(None, "Dropout before a classification head.", unset="the model's", valid=SHARE)
    batch_size: int = option(32, "Examples per step.", valid=at_least(1))
    max_length: int = option(64, "Tokens per example.", valid=at_least(8))
    max_train_samples: int | None = option(None, "Most examples to train on.", unset="all")
    max_eval_samples: int | None = option(None, "Most examples to evaluate on.", unset="all")
    evaluations: int = option(4, "How often the validation examples are evaluated.", valid=at_least(1))
    report_to: str = option("none", "Logger of the Trainer, such as tensorboard.")
    seed: int = option(0, "Seed of data order, head, adapter and dropout.", valid=at_least(0))
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for declared in fields(self):
            value, valid = getattr(self, declared.name), declared.metadata.get("valid")
            if valid and value is not None and not valid[0](value):
                raise ConfigError(f"{flag(declared.name)} {value}: give {valid[1]}")
        if self.preset is not None and not hasattr(config_class(self.method), self.preset):
            raise ConfigError(f"--preset {self.preset}: {self.method} has no such preset: leave it out")
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

    def total_steps(self, examples: int) -> int:
        """Optimizer steps of a run over so many training examples."""
        return math.ceil(self.epochs * math.ceil(examples / self.batch_size))

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
        usual = self.usual_options()
        words = ["increlora", "train"]
        for declared in fields(self)[:-1]:
            value = getattr(self, declared.name)
            if value != declared.default or declared.name in ("method", "task"):
                words += [flag(declared.name), to_text(value)]
        for name, value in (usual | dict(self.options)).items():
            if value != usual.get(name):
                words += ["--set", f"{name}={to_text(value)}"]
        return shlex.join([*words, "--out", str(out)])

    def toml(self, out: Path) -> str:
        """config.toml: every setting, the method's options included, under the command that makes the run.

        TOML has no null: what is None is left out, but options that are None against their default say "none"."""
        usual, every = self.usual_options(), method_options(self.peft_config()) | dict(self.options)
        options = {k: "none" if v is None else v for k, v in every.items() if v is not None or usual.get(k) is not None}
        table = {k: v for k, v in vars(self).items() if v is not None} | {"options": options}
        return f"# {self.command(out)}\n" + tomli_w.dumps(table)

    def usual_options(self) -> dict[str, Any]:
        """The method's own options as they are when none is given."""
        config_cls = config_class(self.method)
        return method_options(config_cls() if self.preset is None else getattr(config_cls, self.preset)(r=self.r))


FLAGS = get_type_hints(TrainSettings)


# -- options of the method -------------------------------------------------------------------------------------------


def config_class(method: str) -> Any:
    """The peft config class of a method. Raises ConfigError for an unknown name, with the nearest known one."""
    if method not in METHODS:
        raise ConfigError(f"--method {method}: not known; did you mean {nearest(method, METHODS)!r}?")
    return CONFIGS[type_name(method)]


def method_options(config: Any) -> dict[str, Any]:
    """The values of the method's own options that have no flag."""
    own = {declared.name: getattr(config, declared.name) for declared in fields(config.settings_cls)}
    return {name: value for name, value in (own | config.published).items() if name not in FLAGS}


def option_types(method: str, preset: str | None) -> dict[str, Any]:
    """Types of the options that `--set` and `[options]` take; with a preset also of the published code's switches."""
    config_cls = config_class(method)
    hints = get_type_hints(config_cls.settings_cls if preset is None else config_cls.paper_cls)
    own = [declared.name for declared in fields(config_cls)] + ([] if preset is None else config_cls.switches)
    return {name: hints.get(name, Any) for name in own if name not in SET_HERE | FLAGS.keys()}


def check_options(method: str, options: Mapping[str, Any], preset: str | None, given: str = "") -> dict[str, Any]:
    """The options with every value checked. Raises ConfigError, with the words before it, at the first wrong one."""
    for name, value in options.items():
        if name in FLAGS:
            raise ConfigError(f"{given}{name}={value}: use {flag(name)}")
        if preset is None and name in config_class(method).switches:
            remedy = "this only reproduces the published code: add --preset paper"
            raise ConfigError(f"{given}{name}={to_text(value)}: {remedy}")
    return checked(options, option_types(method, preset), method, given)


def parse_options(method: str, pairs: Iterable[str], preset: str | None = None) -> dict[str, Any]:
    """`key=value` pairs, values as in TOML (bare words are strings, `none` is None where that means something)."""
    types, options = option_types(method, preset), {}
    for key, equals, text in (pair.partition("=") for pair in pairs):
        if not equals:
            raise ConfigError(f"--set {key}: write it as key=value")
        options[key.strip()] = from_text(text, types.get(key.strip(), Any))
    return check_options(method, options, preset, "--set ")


# -- settings of a new run, and of one that is resumed ---------------------------------------------------------------


def read_recipe(path: Path) -> TrainSettings:
    """The settings of a recipe: a TOML file, such as the config.toml of a run; what it does not say has its default.

    Earlier versions wrote into every config.toml that nothing is as published; that is left out.
    Raises: ConfigError, TaskError naming file and line."""
    try:
        text = path.read_text(encoding="utf-8")
        table = tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); give a TOML file") from error
    try:
        recipe = {"method": TrainSettings.method, "options": {}, **checked(table, FLAGS, "increlora train")}
        method, preset = recipe["method"], recipe.get("preset")
        usual = DEFAULT_SWITCHES.get(method, {}) if preset is None else {}
        said = {k: v for k, v in recipe["options"].items() if k not in usual or v != usual[k]}
        return TrainSettings(**recipe | {"options": check_options(method, said, preset)})
    except (ConfigError, TaskError) as error:
        raise type(error)(f"{path}{line_of(str(error), text)}: {error}") from error


def line_of(message: str, text: str) -> str:
    """`, line 7`: that of the first key that the message names, as a key or a flag; nothing if it names none."""
    keys = [line.partition("=")[0].strip(' \t"') for line in text.splitlines()]
    named = [word.lstrip("-").replace("-", "_") for word in re.findall(r"[\w-]+", message)]
    return next((f", line {keys.index(name) + 1}" for name in named if name in keys), "")


def resolve(given: Mapping[str, Any], pairs: Iterable[str] = (), recipe: TrainSettings | None = None) -> TrainSettings:
    """Settings from flags that were given, `--set key=value` pairs, and a recipe.

    What is given on the command line counts; the recipe's preset and method options are dropped with its method."""
    recipe = recipe or TrainSettings()
    method = given.get("method", recipe.method)
    dropped: dict[str, Any] = {} if method == recipe.method else {"options": {}, "preset": None}
    chosen = vars(recipe) | dropped | dict(given)
    own = parse_options(method, pairs, chosen["preset"])
    return TrainSettings(**chosen | {"options": {**chosen["options"], **own}})


def refuse_changes(settings: TrainSettings, given: Mapping[str, Any], pairs: Iterable[str], out: Path) -> None:
    """A resumed run keeps its settings. Raises RunFolderError naming the one that was given another value."""
    here = vars(settings) | settings.usual_options() | dict(settings.options)
    for name, value in (dict(given) | parse_options(settings.method, pairs, settings.preset)).items():
        if value != here.get(name):
            shown = flag(name) if name in FLAGS else f"--set {name}"
            remedy = "leave it out to resume, or start another run with --out"
            raise RunFolderError(f"{out} runs with {shown} {here.get(name)}, not {value}: {remedy}")

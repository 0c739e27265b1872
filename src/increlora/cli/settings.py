"""What a training run is: its settings, read from options or config.toml, and written again."""

import difflib
import json
import shlex
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import tomli_w

from ..errors import ConfigError, RunFolderError
from ..hosts.peft.config import CONFIGS, default_of
from ..methods import METHODS
from ..tasks import DEFAULT_BACKBONE

OWN_FLAG = {"r": "--r", "seed": "--seed", "target_modules": "--target-modules"}
SET_HERE = {"peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "inference_mode",
            "ranks", "blocks", "increlora_version"}  # fmt: skip


@dataclass(frozen=True)
class TrainSettings:
    """Settings of a run; the defaults are those of the demo.

    Attributes:
        method, task, model: by name (model: also a path).   r: LoRA's rank, or the average rank the budget pays for.
        target_modules: None for the linear maps of the encoder (no pooler, no head); names separated by commas,
            `all-linear`, or a regular expression.
        epochs: passes over the training examples, fractions allowed.   lr: peak learning rate; it rises over a share
            `lr_warmup` of the run, then falls linearly to 0.   batch_size: examples per step.
        max_length: tokens per example.   max_train_samples, max_eval_samples: None for all.
        max_grad_norm: gradients are clipped to it.   seed: of data order, head, adapter and dropout.
        options: further options of the method, by name.
    """

    method: str = "increlora"
    task: str = "stdlib-docs"
    model: str = DEFAULT_BACKBONE
    r: int = 8
    target_modules: str | None = None
    epochs: float = 2.0
    lr: float = 1e-3
    batch_size: int = 32
    max_length: int = 64
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    lr_warmup: float = 0.06
    max_grad_norm: float = 1.0
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in {"batch_size": 1, "max_length": 8, "seed": 0}.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{flag(name)} {getattr(self, name)}: give at least {least}")
        for name in ("epochs", "lr"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{flag(name)} {getattr(self, name)}: give a number above 0")
        self.peft_config()

    def peft_config(self, target_modules: Any = "all-linear", **own: Any) -> Any:
        """The method's peft config. Raises ConfigError, whoever refuses a value."""
        try:
            return config_class(self.method)(
                r=self.r, seed=self.seed, target_modules=target_modules, **(own | dict(self.options))
            )
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
        defaults = default_options(self.method)
        for name, value in (defaults | dict(self.options)).items():
            if value != defaults.get(name):
                words += ["--set", f"{name}={value if isinstance(value, str) else toml_value(value)}"]
        return shlex.join([*words, "--out", str(out)])

    def toml(self, out: Path) -> str:
        """config.toml: every setting, the method's options included, under the command that makes the run.

        TOML has no null: settings that are None are left out, options that are None against their default say "none".
        """
        defaults = default_options(self.method)
        every = defaults | dict(self.options)
        options = {name: value for name, value in every.items() if value is not None or defaults.get(name) is not None}
        table = {option.name: getattr(self, option.name) for option in fields(self)}
        table["options"] = {name: "none" if value is None else value for name, value in options.items()}
        return f"# {self.command(out)}\n" + tomli_w.dumps({k: v for k, v in table.items() if v is not None})


def from_toml(table: Mapping[str, Any], path: Path) -> TrainSettings:
    """Settings out of a run folder's config.toml."""
    known = [option.name for option in fields(TrainSettings)]
    for name in table:
        if name not in known:
            raise RunFolderError(f"{path}/config.toml: unknown setting {name!r}; it was written by another version")
    options = {k: checked(table["method"], k, v) for k, v in table["options"].items()}
    return TrainSettings(**{**table, "options": options})


def resolve(given: Mapping[str, Any], pairs: Sequence[str]) -> TrainSettings:
    """Settings from the options given on the command line (None: not given) and the `--set key=value` pairs."""
    chosen = {name: value for name, value in given.items() if value is not None}
    return TrainSettings(**chosen, options=parse_options(chosen.get("method", TrainSettings.method), pairs))


def refuse_changes(settings: TrainSettings, given: Mapping[str, Any], pairs: Sequence[str], out: Path) -> None:
    """A resumed run keeps its settings. Raises RunFolderError naming the one that was given another value."""
    options = default_options(settings.method) | dict(settings.options)
    asked = [(flag(n), getattr(settings, n), v) for n, v in given.items() if v is not None]
    asked += [(f"--set {n}", options.get(n), v) for n, v in parse_options(settings.method, pairs).items()]
    for name, here, value in asked:
        if value != here:
            raise RunFolderError(
                f"{out} runs with {name} {here}, not {value}: leave it out to resume, or start another run with --out"
            )


# -- options of the method -------------------------------------------------------------------------------------------


def config_class(method: str) -> Any:
    """The peft config class of a method. Raises ConfigError for an unknown name, with the nearest known one."""
    if method not in METHODS:
        raise ConfigError(f"--method {method}: not known; did you mean {nearest(method, METHODS)!r}?")
    return next(c for c in CONFIGS.values() if getattr(c, "settings_cls", None) is METHODS[method])


def default_options(method: str) -> dict[str, Any]:
    """Options of a method that have no flag of their own, with their defaults."""
    settings = fields(config_class(method).settings_cls)
    return {option.name: default_of(option) for option in settings if option.name not in OWN_FLAG}


def parse_options(method: str, pairs: Iterable[str]) -> dict[str, Any]:
    """`key=value` pairs, values as in TOML (bare words are strings, `none` is None where that means something)."""
    config_class(method)
    return dict(parse_option(method, pair) for pair in pairs)


def parse_option(method: str, pair: str) -> tuple[str, Any]:
    key, equals, text = pair.partition("=")
    key = key.strip()
    if not equals:
        raise ConfigError(f"--set {pair}: write it as key=value")
    if key in OWN_FLAG:
        raise ConfigError(f"--set {pair}: use {OWN_FLAG[key]}")
    known = [option.name for option in fields(config_class(method)) if option.name not in SET_HERE]
    if key not in known:
        raise ConfigError(f"--set {key}: {method} has no such option; did you mean {nearest(key, known)!r}?")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    return key, checked(method, key, value)


def checked(method: str, key: str, value: Any) -> Any:
    """The value, None for "none". Raises ConfigError if it is not of the option's type."""
    hint = get_type_hints(config_class(method).settings_cls).get(key, Any)
    if fits(value, hint):
        return value
    if value == "none" and fits(None, hint):
        return None
    shown = json.dumps(value) if isinstance(value, bool) else value
    raise ConfigError(f"--set {key}={shown}: give {described(hint)}")


def fits(value: Any, hint: Any) -> bool:
    """Is the value of this type? An int is a float, a bool is no int."""
    if get_origin(hint) in (Union, UnionType):
        return any(fits(value, member) for member in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    kinds = {int: (int,), float: (int, float), bool: (bool,), str: (str,), NoneType: (NoneType,)}
    if hint in kinds:
        return isinstance(value, kinds[hint]) and isinstance(value, bool) == (hint is bool)
    return hint is Any or isinstance(value, get_origin(hint) or hint)


def described(hint: Any) -> str:
    """A type in words."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(described(member) for member in get_args(hint))
    if get_origin(hint) is Literal:
        return " or ".join(repr(member) for member in get_args(hint))
    words = {int: "an int", float: "a number", bool: "true or false", str: "a word", NoneType: "none"}
    return words.get(hint, "a table such as {query = 4}")


def nearest(name: str, known: Iterable[str]) -> str:
    return difflib.get_close_matches(name, list(known), 1, cutoff=0)[0]


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def toml_value(value: Any) -> str:
    """A value as `--set` reads it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml_value(item)}" for key, item in value.items()) + "}"
    return "none" if value is None else json.dumps(value)

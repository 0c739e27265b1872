"""Which of peft's cases a method of ours runs: every LoRA case that the library does not refuse.

Nobody lists what a method supports. Each case is built; a `ConfigError` is a refusal, and its reason is kept. Whatever
else goes wrong is for the case's tests to show.
"""

import copy
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from itertools import product
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn

from increlora.errors import ConfigError
from increlora.hosts.peft import CONFIGS

if __package__ == "conformance":  # the plugin of a run of peft's tests, where the package `tests` is peft's
    from catalogue import CATALOGUE
else:
    from tests.catalogue import CATALOGUE

Options = dict[str, Any]
CLASSES: dict[str, Any] = {config_cls.__name__: config_cls for config_cls in CONFIGS.values()}
ROWS = {row.config_cls.__name__: row for row in CATALOGUE}

# peft's models are tiny, down to one feature: the case's own rank, or the first of these that a method accepts.
RANKS: tuple[Options, ...] = ({}, {"r": 2}, {"r": 1})
STEPS = 100  # what a method on a schedule is told about the length of peft's loops


class Selection:
    """Takes cases, and counts what was left out.   left_out: config class → reason → how often."""

    def __init__(self) -> None:
        self.left_out: dict[str, Counter[str]] = {}

    def options(self, config_cls: Any, kwargs: Options, bases: Sequence[nn.Module]) -> Options | None:
        """The case's options with what the method needs beside them; None if it refuses one of the base models."""
        refusals = []
        for options in variants(config_cls.__name__, kwargs):
            if (refusal := refused(config_cls, options, bases)) is None:
                return options
            refusals.append(refusal)
        self.leave_out(config_cls, refusals[0])
        return None

    def takes(self, config_cls: Any, options: Options, bases: Sequence[nn.Module]) -> bool:
        """Whether the method accepts just these options."""
        if refusal := refused(config_cls, options, bases):
            self.leave_out(config_cls, refusal)
        return refusal is None

    def leave_out(self, config_cls: Any, refusal: str) -> None:
        self.left_out.setdefault(config_cls.__name__, Counter())[general(refusal)] += 1


def refused(config_cls: Any, options: Options, bases: Sequence[nn.Module]) -> str | None:
    """What the library says against a case, if anything."""
    try:
        with warnings.catch_warnings(action="ignore"):
            for base in bases:
                get_peft_model(copy.deepcopy(base), config_cls(**copy.deepcopy(options)))
    except ConfigError as error:
        return str(error)
    except Exception:  # a bug, and not for the selection to hide
        return None
    return None


def variants(name: str, kwargs: Options) -> Iterator[Options]:
    """The case as the method takes it: without what it has no use for, with what it needs, at a rank it accepts."""
    row = ROWS[name]
    given = {key: value for key, value in kwargs.items() if key not in row.unused}
    length = {"total_steps": STEPS} if row.adaptive else {}
    for rank, need in product(RANKS, row.needs.get("peft", ({},))):
        yield {**length, **need, **given, **rank}


def general(refusal: str) -> str:
    """A refusal without the names and values of its case."""
    if option := refused_option(refusal):
        return f"option `{option}`"
    if kind := re.search(r" (?:of type |is nn\.)(\w+),? (?:which \w+ )?cannot", refusal):
        return f"a module of type `{kind[1]}`"
    return re.sub(r"^[\w.]+(?: \(.*?\))?: ", "", refusal).partition(":")[0]


def refused_option(refusal: str) -> str | None:
    """The option that is refused by name, whatever else is given."""
    found = re.match(r"(?:\w+Config: )?(\w+)=.* is not supported: |\w+Config: (init_lora_weights)=", refusal)
    return found[1] or found[2] if found else None


def lora_rows(rows: Sequence[Any]) -> list[Any]:
    return [row for row in rows if any(value is LoraConfig or type(value) is LoraConfig for value in row)]


def options_of(config: Any) -> Options:
    """What was given to make a config."""
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in ("peft_type", "peft_version")}
    defaults: Mapping[str, Any] = {f.name: default_of(f) for f in fields(config)}
    return {name: value for name, value in values.items() if value != defaults[name]}


def default_of(option: Field[Any]) -> Any:
    return option.default_factory() if option.default_factory is not MISSING else option.default

"""Options of our configs: the method's own, and those of LoraConfig that mean the same here; others are refused."""

import difflib
import inspect
from collections.abc import Container, Mapping
from dataclasses import MISSING, Field, fields
from inspect import Parameter, Signature
from typing import Any, get_type_hints

from peft import LoraConfig, TaskType

from ...errors import CheckpointError, ConfigError
from ...methods.base import Settings
from ...methods.options import LoraOptions, fits, in_words
from ...patterns import check_pattern, shown

# Options of peft's LoraConfig that mean the same here: (type, meaning).
Modules = str | list[str] | set[str] | None
SHARED: dict[str, tuple[Any, str]] = {
    "target_modules": (Modules, '"all-linear", names of modules (or their endings), or a regular expression.'),
    "exclude_modules": (Modules, "modules to leave out, named in the same way."),
    "layers_to_transform": (int | list[int] | None, "numbers of the layers to adapt; default: all."),
    "layers_pattern": (str | list[str] | None, "name of the list of layers, where peft does not know it."),
    "modules_to_save": (list[str] | None, "modules that are trained in full and saved beside the adapter."),
    "fan_in_fan_out": (bool, "weights are stored as (in, out); set by itself for Conv1D."),
    "task_type": (str | TaskType | None, 'peft\'s name of the task, "CAUSAL_LM" for instance.'),
    "base_model_name_or_path": (str | None, "the base model; filled in from the model."),
    "revision": (str | None, "of the base model."),
    "inference_mode": (bool, "load without gradients."),
}  # fmt: skip
OTHERS = {"auto_mapping": dict[str, str | None] | None, "peft_version": str | None}
WRITTEN = {"peft_type", "auto_mapping", "peft_version", "runtime_config"}  # by peft or by us, not by the user

ELSEWHERE = "leave it out, or train with peft's LoraConfig"  # for whatever else there is
INSTEAD = {
    "use_dora": ELSEWHERE,
    "use_rslora": "leave it out: MoRA, which alone refuses it, has no scale",
    "bias": "add bias modules to `modules_to_save`",
    "rank_pattern": "the method chooses the ranks; leave it out (IncreLoRA: `capacity_pattern` bounds them)",
    "alpha_pattern": "one `lora_alpha` serves all modules",
    "target_parameters": "name the linear modules in `target_modules`",
    "trainable_token_indices": "add the embedding to `modules_to_save`",
    "init_lora_weights": "use True; PiSSA, OLoRA, EVA, LoftQ and the like change the base weights or the ranks",
    "layer_replication": "replicate the layers in the model, then adapt it",
    "use_qalora": "leave it out: a quantised base needs no option",
    "alora_invocation_tokens": "leave it out (the adapter then works on all tokens), or train with peft's LoraConfig",
}


class UnknownOptionError(ConfigError, TypeError):
    """An option that does not exist; also a TypeError, so that peft can drop options of newer versions on loading."""


def default_of(option: Field[Any]) -> Any:
    return option.default_factory() if option.default_factory is not MISSING else option.default


def refuse_unsupported(config: Any) -> None:
    """Raise ConfigError for a LoRA option without meaning here, with the alternative."""
    known = {*SHARED, *WRITTEN, *(f.name for f in fields(config.settings_cls))}
    for option in fields(LoraConfig):
        value = getattr(config, option.name)
        if option.name not in known and value and value != default_of(option):
            remedy = INSTEAD.get(option.name, ELSEWHERE)
            raise ConfigError(f"{type(config).__name__}: {option.name}={shown(value)} is not supported: {remedy}")
        if option.name not in known:
            setattr(config, option.name, default_of(option))  # whatever else means no
    if not isinstance(config.init_lora_weights, bool):
        remedy = INSTEAD["init_lora_weights"]
        raise ConfigError(f"{type(config).__name__}: init_lora_weights={shown(config.init_lora_weights)}: {remedy}")


def check_fields(config_cls: Any, raw: Mapping[str, Any], written: Container[str], where: str) -> None:
    """Raise CheckpointError for an entry of an adapter's config, as it was read, that has another type than it should:
    options, and the fields that are `written` by us."""
    hints = {name: hint for name, (hint, _) in SHARED.items()} | get_type_hints(config_cls.settings_cls) | OTHERS
    hints |= {f.name: f.type for f in fields(config_cls) if f.name in written}
    if strange := raw.keys() & {"self", "cls"}:  # peft passes all of them by name
        raise CheckpointError(f"{where}: {min(strange)!r} is no option; restore it from a copy")
    check_types(raw, hints, where)


def check_types(raw: Mapping[str, Any], hints: Mapping[str, Any], where: str) -> None:
    """Raise CheckpointError for an entry that has another type than its hint says."""
    for name, hint in hints.items():
        if name in raw and not fits(raw[name], hint):
            raise CheckpointError(
                f"{where}: {name}={shown(raw[name])}: expected {in_words(hint)}; restore it from a copy"
            )


def check_patterns(config: Any) -> None:
    """Raise ConfigError for a regular expression that is none, or could be matched for ever. (peft reads all of these
    as such.)"""
    for option in ("target_modules", "exclude_modules"):
        if isinstance(found := getattr(config, option), str):
            check_pattern(option, found)
    for option in ("modules_to_save", "layers_pattern"):
        found = getattr(config, option) or ()
        for pattern in [found] if isinstance(found, str) else found:
            check_pattern(option, pattern)


def check_known(config_cls: Any, options: Mapping[str, Any]) -> None:
    """Raise UnknownOptionError with the nearest name there is; for switches of the published code, with the preset that
    takes them. (There peft must not read what it takes for an option of a newer version.)"""
    name, known = config_cls.__name__, [f.name for f in fields(config_cls) if f.init]
    for option, value in options.items():
        if option in config_cls.switches:
            raise UnknownOptionError(
                f"{name}: {option!r} only reproduces the published code: use {name}.paper({option}={value!r})"
            )
        if option not in known:
            near = difflib.get_close_matches(option, known, 1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UnknownOptionError(f"{name}() got an unexpected keyword argument {option!r}{hint}")


# -- what `help`, `inspect.signature`, editors and the generated stub show ---------------------------------------------


def signature_of(settings_cls: type, preset: Any = None) -> Signature:
    """Every option that has a meaning, with the value it has in the preset if there is one, whose `r` may go without
    its name; `__init__` also takes LoraConfig's other options, to say what to use instead."""
    hints, lora = get_type_hints(settings_cls), {f.name: f for f in fields(LoraConfig)}
    known = [(f, hints[f.name]) for f in fields(settings_cls)]
    known += [(lora[name], hint) for name, (hint, _) in SHARED.items()]
    every = {f.name: Parameter(f.name, Parameter.KEYWORD_ONLY, default=getattr(preset, f.name, default_of(f)),
                               annotation=hint) for f, hint in known}  # fmt: skip
    if preset is None:
        return Signature([*every.values()])
    first = Parameter("cls", Parameter.POSITIONAL_ONLY), every.pop("r").replace(kind=Parameter.POSITIONAL_OR_KEYWORD)
    return Signature([*first, *every.values()])


def settings_doc(settings_cls: type) -> str:
    """The docstring of the class that has the fields."""
    return inspect.cleandoc(owner_of(settings_cls).__doc__ or "")


def owner_of(settings_cls: type) -> type:
    """The class that says what the method's options are; those below it add to them."""
    return [c for c in settings_cls.__mro__ if issubclass(c, Settings) and c not in (LoraOptions, Settings)][-1]


def switches_doc(paper_cls: Any) -> str:
    """The meaning of every switch of the published code; empty where there is none."""
    own = paper_cls.__doc__ if paper_cls is not owner_of(paper_cls) else ""
    return inspect.cleandoc(own or "").partition("\n\n")[2]


def config_doc(settings_cls: type) -> str:
    """The meaning of every option."""
    shared = "\n".join(f"    {name}: {meaning}" for name, (_, meaning) in SHARED.items())
    return f"{settings_doc(settings_cls)}\nAs in peft's LoraConfig\n{shared}"

"""peft configs derived from the methods' own settings: LoRA's fields under LoRA's names, refusing what we do not do."""

import difflib
import functools
import inspect
import json
from collections.abc import Callable
from dataclasses import MISSING, Field, field, fields, make_dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftType
from safetensors import SafetensorError
from torch import Tensor

from ...errors import CheckpointError, ConfigError
from ...registry import METHODS
from . import checkpoint
from .card import update_card

# Fields of peft's LoraConfig that mean the same here; any other must keep its default.
SUPPORTED = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "modules_to_save",
    "init_lora_weights", "layers_to_transform", "layers_pattern", "runtime_config",
}  # fmt: skip
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


# What we write into a config: (type, a value for none)
OURS: dict[str, Any] = {
    "ranks": (dict, dict), "blocks": (dict, dict), "shapes": (dict, dict), "inputs": (dict, dict),
    "parameters": (int, int), "budget": (dict, dict), "increlora_version": (str | None, lambda: None),
}  # fmt: skip


class UnknownOptionError(ConfigError, TypeError):
    """An option that does not exist; also a TypeError, so that peft can drop options of newer versions on loading."""


class MethodConfig(LoraConfig):
    """Abstract: what all our configs add to LoraConfig.

    Ours to write: shapes, (in, out) of each module, and inputs, of those that read no vectors; budget, in ranks and
    parameters; and, kept up to date while training: ranks, the active rank of each; blocks, the states of its blocks;
    parameters, how many count in all.
    """

    settings_cls: Any
    method_name: str

    def __post_init__(self) -> None:
        refuse_unsupported(self)  # first: what peft says of such an option is how to use it
        super().__post_init__()
        self.peft_type = PeftType(TYPE_NAMES[type(self).__name__])
        self.settings()

    def settings(self) -> Any:
        """The method's own frozen settings."""
        return self.settings_cls(**{f.name: getattr(self, f.name) for f in fields(self.settings_cls)})

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **kwargs)
        update_card(Path(save_directory), self)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        contents = check_folder(Path(pretrained_model_name_or_path, subfolder or ""))
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        config.contents = contents  # the tuner checks it against the model before it changes the model
        return config


def refuse_unsupported(config: LoraConfig) -> None:
    """Raise ConfigError for a LoRA option without meaning here, with the alternative."""
    own = {f.name for f in fields(config.settings_cls)} | set(OURS)
    for option in fields(config):
        if option.name in SUPPORTED | own:
            continue
        value = getattr(config, option.name)
        if value != default_of(option) and value:
            remedy = INSTEAD.get(option.name, ELSEWHERE)
            raise ConfigError(f"{type(config).__name__}: {option.name}={value!r} is not supported: {remedy}")
    if not isinstance(config.init_lora_weights, bool):
        remedy = INSTEAD["init_lora_weights"]
        raise ConfigError(f"{type(config).__name__}: init_lora_weights={config.init_lora_weights!r}: {remedy}")


def default_of(option: Field[Any]) -> Any:
    return option.default_factory() if option.default_factory is not MISSING else option.default


def check_folder(path: Path) -> dict[str, Tensor]:
    """What the weights of a local adapter folder hold (see `checkpoint.contents`); hub names are left to peft.

    Raises: CheckpointError if the folder is damaged."""
    if not path.is_dir():
        return {}
    config_file, weights = path / "adapter_config.json", path / "adapter_model.safetensors"
    try:
        if not isinstance(json.loads(config_file.read_text()), dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{config_file}: {error}; restore the adapter folder from a copy") from error
    try:
        return checkpoint.contents(weights) if weights.exists() else {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{weights} is damaged or truncated ({error}); restore it from a copy") from error


def derive(name: str, method: str, settings_cls: type) -> type:
    """A peft config class named `name` with the settings' fields, picklable by name."""
    added: list[Any] = [(f.name, f.type, field(default=f.default)
                         if f.default is not MISSING else field(default_factory=f.default_factory))
                        for f in fields(settings_cls)]  # fmt: skip
    added += [(name, kind, field(default_factory=nothing)) for name, (kind, nothing) in OURS.items()]
    namespace = {"settings_cls": settings_cls, "method_name": method, "__doc__": settings_cls.__doc__}
    config_cls = make_dataclass(name, added, bases=(MethodConfig,), namespace=namespace)
    config_cls.__module__ = __name__
    config_cls.__init__ = naming_nearest(config_cls.__init__, name)  # type: ignore[misc]
    return config_cls


def naming_nearest(init: Callable[..., None], name: str) -> Callable[..., None]:
    """`init` with an error for unknown options that names the nearest known one."""
    known = list(inspect.signature(init).parameters)

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        for option in kwargs:
            if option not in known:
                near = difflib.get_close_matches(option, known, 1, cutoff=0.5)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise UnknownOptionError(f"{name}() got an unexpected keyword argument {option!r}{hint}")
        init(self, *args, **kwargs)

    return checked


def with_paper(config_cls: Any) -> Any:
    """The config class, with the preset `paper` if the settings have one."""
    settings_cls = config_cls.settings_cls
    if hasattr(settings_cls, "paper"):
        default_r = inspect.signature(settings_cls.paper).parameters["r"].default
        names = {f.name for f in fields(settings_cls)}

        def paper(r: int = default_r, **overrides: Any) -> Any:
            """The published code, step by step; `overrides` are further options by name."""
            own = {k: v for k, v in overrides.items() if k in names}
            chosen = settings_cls.paper(r, **own)
            rest = {k: v for k, v in overrides.items() if k not in names}
            return config_cls(**{name: getattr(chosen, name) for name in names}, **rest)

        config_cls.paper = staticmethod(paper)
    return config_cls


# peft has methods of these names: (name of our config class, of our peft type)
RENAMED = {"adalora": ("AdaLoraConfig", "INCRELORA_ADALORA"), "lora": ("PlainLoraConfig", "PLAINLORA")}


def names_of(method: str, settings_cls: type) -> tuple[str, str]:
    """Name of a method's config class, and of its peft type."""
    return RENAMED.get(method, (f"{settings_cls.__name__}Config", method.upper()))


TYPE_NAMES = dict(names_of(method, settings_cls) for method, settings_cls in METHODS.items())
CONFIGS: dict[str, type] = {
    TYPE_NAMES[name]: with_paper(derive(name, method, settings_cls))
    for method, settings_cls in METHODS.items()
    for name, _ in [names_of(method, settings_cls)]
}
globals().update({config_cls.__name__: config_cls for config_cls in CONFIGS.values()})  # pickle looks for them here

"""Registration with peft: real members of its `PeftType`, then its own `register_peft_method`.

peft has no plug-in mechanism and refuses names that are not members of the enum; plain strings in its tables break
`load_adapter` and `get_model_status`. So members are made at import, the way the enum module makes them.
"""

import warnings
from dataclasses import is_dataclass
from typing import Any

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from ...errors import ConfigError
from ...methods import Settings
from ...registry import METHODS
from .config import CONFIGS, derive, type_name
from .model import AdapterModel


def ensure_peft_type(name: str) -> PeftType:
    """The member of `PeftType` with this name, made if missing. Idempotent."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    return member


def register_methods() -> None:
    """Make every config of ours known to peft. Raises ConfigError if peft knows the name as something else."""
    for name, config_cls in CONFIGS.items():
        peft_type = ensure_peft_type(name)
        known = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)
        if known is config_cls:
            continue
        if known is not None and known.__module__ != config_cls.__module__:
            raise ConfigError(f"peft already has a method named {name} ({known.__module__}); upgrade increlora")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            PEFT_TYPE_TO_CONFIG_MAPPING.pop(peft_type, None)
            register_peft_method(name=name.lower(), config_cls=config_cls, model_cls=AdapterModel, prefix="lora_")


def register_method(name: str, settings_cls: type[Settings]) -> Any:
    """Make a method of your own known under a name, as ours are: to peft, the command line and the loaders.

    It is known in this process; every process that trains or loads such an adapter has to call this.

    Args: settings_cls: a frozen dataclass derived from `Settings`, with a field `r` and the LoRA options it supports.
    Returns: its config class, `<settings_cls>Config`.
    Raises: ConfigError if a name is taken or cannot be one, or the settings are no such class."""
    if not name.isidentifier():
        raise ConfigError(f"{name!r} cannot name a method: give a word of letters, digits and underscores")
    if name in METHODS or type_name(name) in CONFIGS:  # names that differ only in case have one peft type
        raise ConfigError(f"there is a method {name!r} already: choose another name")
    if not (isinstance(settings_cls, type) and issubclass(settings_cls, Settings) and is_dataclass(settings_cls)):
        raise ConfigError(
            f"{name}: {settings_cls!r} is no settings class: derive a frozen dataclass from `methods.Settings`"
        )
    if any(f"{settings_cls.__name__}Config" == known.__name__ for known in CONFIGS.values()):
        raise ConfigError(f"{settings_cls.__name__}: another method has a class of this name: rename yours")
    config_cls = derive(name, settings_cls)
    METHODS[name], CONFIGS[type_name(name)] = settings_cls, config_cls
    register_methods()
    return config_cls

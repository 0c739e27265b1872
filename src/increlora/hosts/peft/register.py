"""Registration with peft: real members of its `PeftType`, then its own `register_peft_method`; and the methods of peft
that go through us, since it has no seam there.

peft has no plug-in mechanism and refuses names that are not members of the enum; plain strings in its tables break
`load_adapter` and `get_model_status`. So members are made at import, the way the enum module makes them.
"""

import functools
import warnings
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from peft import LoraModel, PeftMixedModel, PeftModel, PeftType
from peft.config import PeftConfigMixin
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method
from transformers.integrations.peft import PeftAdapterMixin

from ...errors import ConfigError
from ...methods import Settings
from ...registry import METHODS
from . import checkpoint, transformers_loading
from .config import CONFIGS, OURS, MethodConfig, derive, type_name
from .drive import rank_summary
from .loading import from_pretrained, load_adapter
from .model import AdapterModel
from .old import translated
from .options import check_fields


def ensure_peft_type(name: str) -> PeftType:
    """The member of `PeftType` with this name, made if missing. Idempotent."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
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


# -- methods of peft, each with its own as the first argument --------------------------------------------------------


def add_adapter(original: Any, model: Any, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any) -> Any:
    """Two types in one model peft refuses where one is ours; here it says so with the alternative."""
    here, other = model.peft_type, peft_config.peft_type
    if here != other and (here in CONFIGS or other in CONFIGS):
        raise ConfigError(
            f"{adapter_name}: an adapter of type {other.value} cannot join one of type {here.value}: merge the first "
            f"by `merge_and_unload()` and adapt what it returns, or use a model for each"
        )
    return original(model, adapter_name, peft_config, *args, **kwargs)


def mix(original: Any, model: Any, /, *args: Any, **kwargs: Any) -> Any:
    """The same for `PeftMixedModel` and its `add_adapter`."""
    for config in (*args, *kwargs.values()):
        if isinstance(config, MethodConfig):
            raise ConfigError(
                f"{type(config).__name__}: a PeftMixedModel cannot hold it: leave out `mixed=True`, or export it "
                f"(`increlora.export_lora`) and load the export, which is plain LoRA"
            )
    return original(model, *args, **kwargs)


def create_and_replace(original: Any, tuner: Any, config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
    """peft's own LoRA tuner with a config of ours, as X-LoRA hands it over: it would take it for LoRA's."""
    if isinstance(config, MethodConfig):
        raise ConfigError(
            f"{adapter_name}: {type(tuner).__name__} takes plain LoRA adapters: export it (`increlora.export_lora`), "
            f"and give the export"
        )
    return original(tuner, config, adapter_name, *args, **kwargs)


def from_json_file(original: Any, cls: type, path: str, **kwargs: Any) -> Any:
    """Adapter folders once named their types without a prefix. peft may come to have methods of these names, so they
    are not registered: whatever of peft reads an adapter_config.json goes through here, translated and checked."""
    checkpoint.read_object(Path(path))
    raw = translated(original(cls, path, **kwargs))
    if (kind := raw.get("peft_type")) in [*CONFIGS]:
        check_fields(CONFIGS[kind], raw, OURS, str(path))
    return raw


def print_trainable_parameters(original: Any, model: Any) -> None:
    """peft counts every parameter with requires_grad, dormant blocks among them: tell active ranks and capacity."""
    original(model)
    if isinstance(model.base_model, AdapterModel):
        print(rank_summary(model).total)


def patch_peft() -> None:
    """Put ours around peft's. Idempotent."""
    put_around(PeftModel, "add_adapter", add_adapter)
    put_around(PeftMixedModel, "__init__", mix)
    put_around(PeftMixedModel, "add_adapter", mix)
    put_around(LoraModel, "_create_and_replace", create_and_replace)
    put_around(PeftConfigMixin, "from_json_file", from_json_file)
    put_around(PeftModel, "from_pretrained", from_pretrained)
    put_around(PeftModel, "load_adapter", load_adapter)
    put_around(PeftModel, "print_trainable_parameters", print_trainable_parameters)
    put_around(PeftAdapterMixin, "load_adapter", transformers_loading.load_adapter)


def put_around(owner: type, name: str, ours: Any) -> None:
    method: Any = vars(owner)[name]
    original = getattr(method, "__func__", method)
    if hasattr(original, "increlora"):
        return

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ours(original, self, *args, **kwargs)

    wrapped.increlora = True  # type: ignore[attr-defined]
    setattr(owner, name, classmethod(wrapped) if isinstance(method, classmethod) else wrapped)

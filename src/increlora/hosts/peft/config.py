"""peft configs derived from the methods' own settings; which options they have is in `options`."""

import inspect
import json
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any, ClassVar

from peft import LoraConfig, PeftType
from safetensors import SafetensorError
from torch import Tensor

from ...errors import CheckpointError
from ...registry import METHODS
from . import checkpoint
from .card import update_card
from .options import config_doc, naming_nearest, refuse_unsupported, signature_of


def type_name(method: str) -> str:
    """The peft type of a method, also on disk. The prefix keeps it apart from whatever peft comes to have."""
    return f"INCRELORA_{method.upper()}"


# Our types before they had a prefix, by method.
OLD_TYPES = {"INCRELORA": "increlora", "PLAINLORA": "lora"} | {
    name.upper(): name for name in ("lora_mini", "lorta", "melora", "mora", "prilora", "sora")
}


def with_current_type(raw: dict[str, Any]) -> dict[str, Any]:
    """An adapter's config as read from disk, its type by today's name if it is one of ours by an old name.

    The old names may come to be peft's: ours are known by an entry that no config of peft has."""
    old = raw.get("peft_type")
    if "increlora_version" in raw and isinstance(old, str) and old in OLD_TYPES:
        return raw | {"peft_type": type_name(OLD_TYPES[old])}
    return raw


@dataclass
class MethodConfig(LoraConfig):
    """Abstract: what all our configs add to LoraConfig.

    Ours to write: shapes, (in, out) of each module, and inputs, of those that read no vectors; budget, in ranks and
    parameters; and, kept up to date while training: ranks, the active rank of each; blocks, the states of its blocks;
    parameters, how many count in all.
    """

    settings_cls: ClassVar[Any]
    method_name: ClassVar[str]

    ranks: dict[str, int] = field(default_factory=dict)
    blocks: dict[str, list[int]] = field(default_factory=dict)
    shapes: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    parameters: int = 0
    budget: dict[str, Any] = field(default_factory=dict)
    increlora_version: str | None = None

    def __post_init__(self) -> None:
        refuse_unsupported(self)  # first: what peft says of such an option is how to use it
        super().__post_init__()
        self.peft_type = PeftType(type_name(self.method_name))
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


def derive(method: str, settings_cls: Any) -> type:
    """The config class of a method: LoraConfig with the settings' fields."""
    name = f"{settings_cls.__name__}Config"
    added: list[Any] = [(f.name, f.type, field(default=f.default)
                         if f.default is not MISSING else field(default_factory=f.default_factory))
                        for f in fields(settings_cls)]  # fmt: skip
    namespace = {
        "settings_cls": settings_cls, "method_name": method, "__doc__": config_doc(settings_cls),
        "__signature__": signature_of(settings_cls),
    }  # fmt: skip
    if hasattr(settings_cls, "paper"):
        namespace["paper"] = classmethod(paper_of(settings_cls))
    config_cls = make_dataclass(name, added, bases=(MethodConfig,), namespace=namespace)
    config_cls.__module__ = "increlora"  # where users, pickle and the stub find it
    config_cls.__init__ = naming_nearest(config_cls.__init__, name)  # type: ignore[misc]
    return config_cls


def paper_of(settings_cls: Any) -> Callable[..., Any]:
    """The preset `paper` of the settings, for the config: it also takes options of LoraConfig."""
    names = {f.name for f in fields(settings_cls)}
    default_r = inspect.signature(settings_cls.paper).parameters["r"].default

    def paper(cls: type, r: int = default_r, **overrides: Any) -> Any:
        chosen = settings_cls.paper(r, **{k: v for k, v in overrides.items() if k in names})
        rest = {k: v for k, v in overrides.items() if k not in names}
        return cls(**{name: getattr(chosen, name) for name in names}, **rest)

    paper.__doc__ = settings_cls.paper.__doc__
    return paper


# By peft type.
CONFIGS: dict[str, Any] = {type_name(method): derive(method, settings_cls) for method, settings_cls in METHODS.items()}
OURS = {f.name for f in fields(MethodConfig)} - {f.name for f in fields(LoraConfig)}  # what we write into a config

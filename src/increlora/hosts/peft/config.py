"""peft configs derived from the methods' own settings; which options they have is in `options`."""

from collections.abc import Callable, Collection
from copy import copy
from dataclasses import dataclass, field, fields, make_dataclass
from inspect import cleandoc
from pathlib import Path
from typing import Any, ClassVar

from peft import LoraConfig, PeftType
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from ...errors import ConfigError
from ...registry import METHODS, PAPERS
from . import checkpoint
from .card import update_card
from .options import check_known, check_patterns, config_doc, refuse_unsupported, signature_of, switches_doc


def type_name(method: str) -> str:
    """The peft type of a method, also on disk. The prefix keeps it apart from whatever peft comes to have."""
    return f"INCRELORA_{method.upper()}"


@dataclass
class MethodConfig(LoraConfig):
    """Abstract: what all our configs add to LoraConfig.

    Ours to write: shapes, (in, out) of each module, and inputs, of those that read no vectors; budget, in ranks and
    parameters; and, kept up to date while training: ranks, the active rank of each; blocks, the states of its blocks;
    parameters, how many count in all; base_weights, which embeddings and heads of the base model are saved beside it
    (None: not known).

    published: switches of the published code, all of them; `paper` fills it. Empty: the method without them.
    """

    settings_cls: ClassVar[Any]
    paper_cls: ClassVar[Any]
    switches: ClassVar[list[str]]  # options of `paper` alone
    method_name: ClassVar[str]

    ranks: dict[str, int] = field(default_factory=dict)
    blocks: dict[str, list[int]] = field(default_factory=dict)
    shapes: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    parameters: int = 0
    budget: dict[str, Any] = field(default_factory=dict)
    published: dict[str, Any] = field(default_factory=dict)
    base_weights: list[str] | None = None
    increlora_version: str | None = None

    def __new__(cls, *args: Any, **options: Any) -> Any:
        check_known(cls, options)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        refuse_unsupported(self)  # first: what peft says of such an option is how to use it
        try:
            super().__post_init__()
        except (TypeError, ValueError, AttributeError) as error:  # what peft says of its own options
            raise ConfigError(f"{type(self).__name__}: {error}") from error
        check_patterns(self)
        self.peft_type = PeftType(type_name(self.method_name))
        self.settings()

    def settings(self) -> Any:
        """The method's own frozen settings, or those of its published code."""
        for name in self.published if isinstance(self.published, dict) else ():
            if name not in self.switches:
                raise ConfigError(f"published: {name!r} is no switch of {type(self).__name__}.paper: leave it out")
        if not isinstance(self.published, dict) or (self.published and len(self.published) < len(self.switches)):
            raise ConfigError(
                f"published={self.published!r}: {type(self).__name__}.paper fills it, with every switch of "
                f"the published code: use that, or leave it out"
            )
        make = self.paper_cls if self.published else self.settings_cls
        return make(**{f.name: getattr(self, f.name) for f in fields(self.settings_cls)}, **self.published)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        folder = Path(save_directory)
        if (folder / SAFETENSORS_WEIGHTS_NAME).is_file():  # peft writes it first
            with checkpoint.opened(folder) as file:
                others = [checkpoint.plain(key) for key in file.keys() if not checkpoint.is_ours(key)]  # noqa: SIM118
            self.base_weights = [key for key in others if not checkpoint.under(key, self.modules_to_save or ())]
        super().save_pretrained(save_directory, **kwargs)
        update_card(folder, self)


def derive(method: str, settings_cls: Any) -> type:
    """The config class of a method: LoraConfig with the settings' fields."""
    name, paper_cls = f"{settings_cls.__name__}Config", PAPERS.get(method, settings_cls)
    own = {f.name for f in fields(settings_cls)}
    switches = [f.name for f in fields(paper_cls) if f.name not in own]
    added = [(f.name, f.type, copy(f)) for f in fields(settings_cls)]
    namespace = {
        "settings_cls": settings_cls, "paper_cls": paper_cls, "switches": switches, "method_name": method,
        "__doc__": config_doc(settings_cls), "__signature__": signature_of(settings_cls),
    }  # fmt: skip
    if hasattr(paper_cls, "paper"):
        namespace["paper"] = classmethod(paper_of(paper_cls, switches))
    config_cls = make_dataclass(name, added, bases=(MethodConfig,), namespace=namespace)
    config_cls.__module__ = "increlora"  # where users, pickle and the stub find it
    return config_cls


def paper_of(paper_cls: Any, switches: Collection[str]) -> Callable[..., Any]:
    """The preset `paper` of the settings, for the config: it also takes options of LoraConfig."""
    names, preset = [f.name for f in fields(paper_cls)], paper_cls.paper()

    def paper(cls: type, r: int = preset.r, **overrides: Any) -> Any:
        chosen = paper_cls.paper(r, **{k: v for k, v in overrides.items() if k in names})
        rest = {k: v for k, v in overrides.items() if k not in names}
        values = {name: getattr(chosen, name) for name in names if name not in switches}
        return cls(**values, published={name: getattr(chosen, name) for name in switches}, **rest)

    paper.__doc__ = f"{cleandoc(paper_cls.paper.__doc__)}\n\n{switches_doc(paper_cls)}".strip()
    paper.__signature__ = signature_of(paper_cls, preset)  # type: ignore[attr-defined]
    return paper


# By peft type.
CONFIGS: dict[str, Any] = {type_name(method): derive(method, settings_cls) for method, settings_cls in METHODS.items()}
OURS = {f.name for f in fields(MethodConfig)} - {f.name for f in fields(LoraConfig)}  # what we write into a config

"""A config of ours by name, from a framework's own settings for LoRA."""

from collections.abc import Mapping
from typing import Any

from peft import TaskType

from increlora.errors import ConfigError
from increlora.hosts.peft.config import CONFIGS, type_name
from increlora.registry import METHODS

# `increlora`, `increlora_sora`, …: peft's types, so that none is taken for a method that a framework has of its own.
ADAPTERS = {
    "increlora" if method == "increlora" else type_name(method).lower(): CONFIGS[type_name(method)]
    for method in METHODS
}
ENDINGS = {
    "ForSequenceClassification": TaskType.SEQ_CLS, "ForTokenClassification": TaskType.TOKEN_CLS,
    "ForQuestionAnswering": TaskType.QUESTION_ANS, "Model": TaskType.FEATURE_EXTRACTION,
}  # fmt: skip


def config_of(name: str, given: Mapping[str, Any], options: Mapping[str, Any] | None) -> Any:
    """The config of the adapter `name` of ADAPTERS.

    Args:
        given: the framework's settings for LoRA, by LoraConfig's names; empty values leave the default.
        options: the method's own, as the user wrote them; they override what is given.
    Raises: ConfigError for options that do not exist, or have no meaning here."""
    if not isinstance(options or {}, Mapping):
        raise ConfigError(f"options of {name}: {options!r}: give a table, option: value")
    known = {option: value for option, value in given.items() if value or value == 0}
    if name == "increlora_mora":
        known.pop("lora_alpha", None)  # it has no scale, and frameworks have an α for everybody
    return ADAPTERS[name](**known | dict(options or {}))


def task_type(model: Any) -> TaskType | None:
    """peft's name for the model's task, by the ending of its class's name and by whether it generates; None where there
    is none, as for masked language models."""
    known = next((task for ending, task in ENDINGS.items() if type(model).__name__.endswith(ending)), None)
    if known in (None, TaskType.FEATURE_EXTRACTION) and hasattr(model, "prepare_inputs_for_generation"):
        return TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else TaskType.CAUSAL_LM
    return known

"""transformers' own way to adapters: `model.load_adapter`, and with it `AutoModel….from_pretrained` of their folders.

It matches weights with parameters one by one, which knows nothing of blocks: it would leave the base's function, and
say so in a log. So adapters of ours are loaded here by peft, into the same model, as they are everywhere else.
"""

import inspect
from contextlib import suppress
from dataclasses import fields
from typing import Any

from peft import PeftConfig, PeftModel
from transformers.utils.loading_report import LoadStateDictInfo

from ...errors import CheckpointError, IncreLoraError
from .config import CONFIGS
from .layer import TunerLayer

MADE = {"error_msgs": list, "conversion_errors": dict}  # what the fields of a report hold; else sets
ELSEWHERE = (
    "load it by `PeftModel.from_pretrained`, onto a model of the class it was trained with, or write a plain LoRA "
    "adapter of it (`increlora.export_lora`), which every loader takes"
)


def load_adapter(original: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    """`PeftAdapterMixin.load_adapter`, for adapters of ours. Raises as `PeftModel.from_pretrained`, and names that."""
    given = inspect.signature(original).bind(model, *args, **kwargs).arguments
    extra = given.pop("kwargs", {})
    load_config, named = given.get("load_config"), given.get("adapter_name") or "default"
    source = given.get("peft_model_id") or getattr(load_config, "pretrained_model_name_or_path", None)
    hub = getattr(load_config, "download_kwargs", None) or extra.get("download_kwargs") or {}
    hub = PeftConfig._split_kwargs({**hub, **(given.get("adapter_kwargs") or {})})[0]
    if given.get("local_files_only"):
        hub["local_files_only"] = True
    config = given.get("peft_config")
    hub = {name: value for name, value in hub.items() if value is not None}
    if kind_of(source, config, hub) not in CONFIGS:
        return original(model, *args, **kwargs)
    if given.get("adapter_state_dict") is not None or source is None:
        raise CheckpointError(f"tensors and a config of increlora cannot be loaded this way: {ELSEWHERE}")
    if given.get("hotswap") is True or named in (getattr(model, "peft_config", None) or {}):
        return original(model, *args, **kwargs)  # which says why it cannot
    trainable, low_memory = bool(given.get("is_trainable")), bool(given.get("low_cpu_mem_usage"))
    try:
        # with all its blocks: trainers give the state dict of a reloaded model to the one they train
        PeftModel.from_pretrained(
            model, source, named, is_trainable=True, config=config, low_cpu_mem_usage=low_memory, **hub
        )
    except IncreLoraError as error:
        raise type(error)(f"{error}; {ELSEWHERE}") from error
    model._hf_peft_config_loaded = True
    if not trainable:
        freeze(model, named)
    return LoadStateDictInfo(**{f.name: MADE.get(f.name, set)() for f in fields(LoadStateDictInfo)})


def kind_of(source: Any, config: Any, hub: Any) -> Any:
    """The type of the adapter, None where it cannot be read: then transformers says why."""
    if config is not None:
        return getattr(config, "peft_type", None)
    with suppress(ValueError, KeyError, OSError, TypeError):
        return PeftConfig._get_peft_type(source, **hub)
    return None


def freeze(model: Any, adapter_name: str) -> None:
    """As transformers leaves an adapter that it loads for inference."""
    model.eval()
    model.peft_config[adapter_name].inference_mode = True
    for module in model.modules():
        if isinstance(module, TunerLayer):
            module.requires_grad_(False)

"""axolotl: our methods as values of `adapter`; docs/howto/frameworks.md shows how to configure it.

Its trainers are Hugging Face Trainers, so our callback drives the ranks. Checked against the plugin interface and the
adapter loader of axolotl 0.19.0, not in a run: that release pins peft 0.20, and this library needs 0.21.
"""

from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftModel, get_peft_model
from pydantic import BaseModel

from increlora.errors import ConfigError
from increlora.integrations.settings import ADAPTERS, config_of, task_type

# LoraConfig's name of each of axolotl's settings; our config refuses what we do not support.
SETTINGS = {
    "lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout",
    "lora_modules_to_save": "modules_to_save", "lora_exclude_modules": "exclude_modules",
    "lora_fan_in_fan_out": "fan_in_fan_out", "lora_rank_pattern": "rank_pattern",
    "lora_alpha_pattern": "alpha_pattern",
    "lora_target_parameters": "target_parameters", "peft_layers_to_transform": "layers_to_transform",
    "peft_layers_pattern": "layers_pattern", "peft_use_rslora": "use_rslora", "peft_use_dora": "use_dora",
    "peft_init_lora_weights": "init_lora_weights", "peft_trainable_token_indices": "trainable_token_indices",
}  # fmt: skip


class IncreLoraArgs(BaseModel):
    """The block that axolotl's configuration gains."""

    increlora: dict[str, Any] | None = None


class IncreLoraPlugin(BasePlugin):
    """The plugin interface of axolotl."""

    def get_input_args(self) -> str:
        return f"{__name__}.{IncreLoraArgs.__name__}"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name=name) for name in ADAPTERS]

    def load_adapter(
        self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[Any, Any] | None:
        """(model with the adapter, its config), as axolotl's loader returns them; None for adapters of others.

        Raises ConfigError for settings that our methods do not support."""
        if cfg.adapter not in ADAPTERS:
            return None
        targets = cfg.lora_target_modules
        if cfg.lora_target_linear and targets:
            remedy = f"leave out lora_target_modules={targets!r}, or name all there"
            raise ConfigError(f"lora_target_linear takes all linear modules: {remedy}")
        given = {name: getattr(cfg, setting) for setting, name in SETTINGS.items()}
        given |= {"target_modules": "all-linear" if cfg.lora_target_linear else targets, "task_type": task_type(model)}
        config = config_of(cfg.adapter, given, cfg.increlora)
        if config_only:
            return None, config
        cast = {"autocast_adapter_dtype": cfg.peft_autocast_adapter_dtype is not False}  # peft's default: True
        if cfg.lora_model_dir:
            loaded = PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference, **cast)
            return loaded, loaded.peft_config[loaded.active_adapter]
        return get_peft_model(model, config, **cast), config

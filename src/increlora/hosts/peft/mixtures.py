"""Adapters of two types in one model: peft refuses them where one is ours; here it says so with the alternative."""

import functools
from collections.abc import Callable
from typing import Any

from peft import PeftMixedModel, PeftModel

from ...errors import ConfigError
from .config import CONFIGS, MethodConfig


def check_same_type(model: Any, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any) -> None:
    """For `PeftModel.add_adapter`."""
    here, other = model.peft_type, peft_config.peft_type
    if here != other and (here in CONFIGS or other in CONFIGS):
        raise ConfigError(
            f"{adapter_name}: an adapter of type {other.value} cannot join one of type {here.value}: merge the first "
            f"by `merge_and_unload()` and adapt what it returns, or use a model for each"
        )


def check_not_mixed(model: Any, *args: Any, **kwargs: Any) -> None:
    """For `PeftMixedModel` and its `add_adapter`."""
    for config in (*args, *kwargs.values()):
        if isinstance(config, MethodConfig):
            raise ConfigError(
                f"{type(config).__name__}: a PeftMixedModel cannot hold it: leave out `mixed=True`, or export it "
                f"(`increlora.export_lora`) and load the export, which is plain LoRA"
            )


def refuse_mixtures() -> None:
    """Put the checks before peft's own. Idempotent."""
    put_before(PeftModel, "add_adapter", check_same_type)
    put_before(PeftMixedModel, "__init__", check_not_mixed)
    put_before(PeftMixedModel, "add_adapter", check_not_mixed)


def put_before(owner: type, name: str, check: Callable[..., None]) -> None:
    original = getattr(owner, name)
    if hasattr(original, "checked_by_increlora"):
        return

    @functools.wraps(original)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        check(self, *args, **kwargs)
        return original(self, *args, **kwargs)

    checked.checked_by_increlora = True  # type: ignore[attr-defined]
    setattr(owner, name, checked)

"""Methods of peft that go through us, where it has no seam: each calls peft's own, which is its first argument."""

import functools
from typing import Any

from peft import PeftMixedModel, PeftModel
from peft.config import PeftConfigMixin

from ...errors import ConfigError
from .config import CONFIGS, MethodConfig
from .drive import rank_summary
from .model import AdapterModel
from .old import translated


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


def from_json_file(original: Any, cls: type, *args: Any, **kwargs: Any) -> Any:
    """Adapter folders once named their types without a prefix. peft may come to have methods of these names, so they
    are not registered: whatever of peft reads an adapter_config.json goes through here, where it is translated."""
    return translated(original(cls, *args, **kwargs))


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
    put_around(PeftConfigMixin, "from_json_file", from_json_file)
    put_around(PeftModel, "print_trainable_parameters", print_trainable_parameters)


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

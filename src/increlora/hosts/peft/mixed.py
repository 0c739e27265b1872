"""One batch, several adapters: `model(…, adapter_names=["de", "fr", "__base__"])` at inference.

The names travel to the adapter layers as a keyword argument of their forward pass, by hooks that live for one call.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from ...errors import ConfigError

BASE = "__base__"  # peft's name for no adapter


@contextmanager
def mixed_batch(
    model: nn.Module, adapter_names: Sequence[str], known: Iterable[str], call: Mapping[str, Any]
) -> Iterator[None]:
    """Within it, each example of a batch goes through the adapter named at its place. Raises ConfigError in training,
    and for names that no layer has.

    call: what the model, or its `generate`, is called with: a decoder makes several sequences of each example, beams or
    samples; an encoder makes one."""
    if model.training:
        raise ConfigError(
            "Cannot pass `adapter_names` when the model is in training mode. Call model.eval(), or train one adapter "
            "at a time."
        )
    if unknown := sorted(set(adapter_names) - {BASE, *known}):
        raise ConfigError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}; there are {', '.join(sorted(known))}"
        )
    get_encoder: Any = getattr(model, "get_encoder", lambda: None)
    encoder = get_encoder()  # models that are no encoder-decoder may give themselves
    in_encoder = set(encoder.modules()) if isinstance(encoder, nn.Module) and encoder is not model else set()
    options, config = ("num_beams", "num_return_sequences"), call.get("generation_config")
    copies = max(call.get(option) or getattr(config, option, None) or 1 for option in options)
    repeated = [name for name in adapter_names for _ in range(copies)]

    def pass_names(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        names = list(adapter_names) if module in in_encoder else repeated
        if isinstance(module, ModulesToSaveWrapper):  # an adapter without this module of its own uses the base's
            names = [name if name in module.modules_to_save else BASE for name in names]
        return args, {**kwargs, "adapter_names": names}

    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
                hooks.callback(module.register_forward_pre_hook(pass_names, with_kwargs=True).remove)
        yield

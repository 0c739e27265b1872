"""Loading a folder by peft: its files are read as a whole before any module is replaced, and what is refused, by us or
by peft, leaves the model as it was."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import nn

from ...errors import IncreLoraError
from . import checkpoint
from .handle import Handle
from .layer import TunerLayer, adapters_of
from .states import check_together


@dataclass(frozen=True)
class Source:
    """Where an adapter is being loaded from: a folder, or a name on a hub with the options of the download."""

    name: str
    options: Mapping[str, Any]

    def folder(self) -> Path | None:
        """The folder with the weights file; None if peft has to find the weights, or to say that there are none."""
        path = Path(self.name, self.options.get("subfolder") or "")
        if path.is_dir():
            pickled = (path / WEIGHTS_NAME).is_file() and not (path / SAFETENSORS_WEIGHTS_NAME).exists()
            return None if pickled else path
        known = {key: value for key, value in self.options.items() if key in signature(hf_hub_download).parameters}
        try:
            return Path(hf_hub_download(self.name, SAFETENSORS_WEIGHTS_NAME, **known)).parent
        except (OSError, ValueError):  # the hub's errors are of these kinds; peft raises the same
            return None


LOADING: ContextVar[Source | None] = ContextVar("LOADING", default=None)


def check_source(handle: Handle, model: nn.Module) -> None:
    """Raise CheckpointError if this adapter is being loaded, and its files do not belong into `model`, which is
    unchanged so far."""
    source = LOADING.get()
    folder = source.folder() if source is not None else None
    if folder is None:
        return
    contents, _ = checkpoint.read_contents(folder)
    said = checkpoint.read_config(folder) if (folder / CONFIG_NAME).exists() else {}
    renamed = bool(getattr(model, "_checkpoint_conversion_mapping", None))  # its keys are, when they are loaded
    if not renamed:
        checkpoint.check_names(contents)
        checkpoint.check_modules(handle.stored, checkpoint.split(contents))
        checkpoint.check_sites(said.get("shapes"), handle.deltas)
    checkpoint.check_budget(said, handle.method)
    if not renamed:
        brought = said.get("base_weights")
        named = [key for key in brought if isinstance(key, str)] if isinstance(brought, list) else []
        checkpoint.check_contents(contents, handle.stored, model, handle.config.modules_to_save or (), named)
        check_together(handle, checkpoint.split(contents))
    checkpoint.check_values(folder)


# -- methods of peft, each with its own as the first argument ----------------------------------------------------------


def from_pretrained(original: Any, cls: type, model: Any, model_id: Any, *args: Any, **kwargs: Any) -> Any:
    with loading(model, model_id, kwargs):
        return original(cls, model, model_id, *args, **kwargs)


def load_adapter(original: Any, model: Any, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
    if LOADING.get() is not None:  # it goes on what `from_pretrained` has begun
        return original(model, model_id, adapter_name, *args, **kwargs)
    with loading(model, model_id, kwargs):
        handle = adapters_of(model).get(adapter_name)
        if handle is not None:
            check_source(handle, model.get_base_model())
        return original(model, model_id, adapter_name, *args, **kwargs)


@contextmanager
def loading(model: nn.Module, name: Any, options: Mapping[str, Any]) -> Iterator[None]:
    token = LOADING.set(Source(str(name), options))
    restore = snapshot(model)
    try:
        yield
    except BaseException as error:
        if isinstance(error, IncreLoraError) or any(isinstance(module, TunerLayer) for module in model.modules()):
            restore()
        raise
    finally:
        LOADING.reset(token)


def snapshot(model: nn.Module) -> Any:
    """A function that gives a model the modules, parameters and attributes back that it has now. (Values of parameters
    are not kept: nothing writes them before all is checked.)"""
    modules = list(model.modules())
    attributes = [vars(module) for module in modules]
    held: list[Any] = [
        *attributes,
        *(v for own in attributes for v in own.values() if isinstance(v, dict | list | set)),
    ]
    copies = [container.copy() for container in held]
    flags = [(p, p.requires_grad) for p in model.parameters()]

    def restore() -> None:
        for container, copy in zip(held, copies, strict=True):
            container.clear()
            container.extend(copy) if isinstance(container, list) else container.update(copy)
        for p, flag in flags:
            p.requires_grad_(flag)

    return restore

"""The whole model with the adapter in its weights: W + B A. It needs neither peft nor us, and no server refuses it."""

import copy
import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import ExportError
from ..files import whole_folder
from .adapters import Adapter, read_adapter


def export_merged(
    model_or_path: nn.Module | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: nn.Module | None = None,
    tokenizer: Any = None,
    adapter_name: str | None = None,
) -> Path:
    """Write the base model with ΔW added to its weights, by transformers' `save_pretrained`.

    Args:
        model_or_path: as for `export_lora`.
        out: new or empty folder.
        base: the model that the adapter belongs to, without it, unquantised; it is changed. Needed with a folder. A
            live PeftModel is copied instead (it stays as it is, and there must be memory for both).
        tokenizer: saved beside the model.
        adapter_name: default the active adapter; of a folder: its subfolder.
    Returns: `out`, which appears in one piece or not at all. Weights keep the base's dtype.
    Raises: ExportError (no base, another model's adapter, a quantised base, a folder in the way), CheckpointError.
    """
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ExportError(f"{out} exists: choose another folder or remove it")
    adapter = read_adapter(model_or_path, adapter_name)
    if base is None:
        base = unwrapped(model_or_path)
    if not isinstance(base, PreTrainedModel):
        raise ExportError(f"base is a {type(base).__name__}: only transformers models can be written whole")
    merge_into(base, adapter)
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(out) as folder:
        base.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return out


def unwrapped(model_or_path: object) -> nn.Module:
    """A copy of the base of a live model."""
    if not isinstance(model_or_path, PeftModel):
        raise ExportError("an adapter folder has no weights to merge into: give the model as `base=`")
    return copy.deepcopy(model_or_path).unload()


@torch.no_grad()
def merge_into(base: nn.Module, adapter: Adapter) -> None:
    """Add every ΔW to its weight, and put the modules that were trained in full in their places.

    Raises ExportError, before anything is changed, if a tensor has no place of its shape."""
    state = base.state_dict(keep_vars=True)  # names without copies
    sums = {}
    for name, (A, B) in adapter.factors.items():
        weight = place(f"{name}.weight", state)
        delta = B.float() @ A.float() if B.dtype != torch.float64 else B @ A
        delta = delta.t() if isinstance(base.get_submodule(name), Conv1D) else delta
        check_shape(f"{name}.weight", weight, delta)
        sums[name] = weight, delta
    for name, value in adapter.others.items():
        check_shape(name, place(name, state), value)
    for weight, delta in sums.values():
        weight.copy_(weight + delta.to(weight.device))
    for name, value in adapter.others.items():
        state[name].copy_(value)


def place(name: str, state: Any) -> torch.Tensor:
    if name not in state or not state[name].is_floating_point():
        found = f"is {state[name].dtype} there: load the base unquantised" if name in state else "is not in the base"
        raise ExportError(f"{name} {found}; give the model that the adapter was trained on")
    tensor: torch.Tensor = state[name]
    return tensor


def check_shape(name: str, here: torch.Tensor, there: torch.Tensor) -> None:
    if here.shape != there.shape:
        raise ExportError(
            f"{name} is {tuple(here.shape)} in the base, {tuple(there.shape)} in the adapter; give the model that the "
            f"adapter was trained on"
        )

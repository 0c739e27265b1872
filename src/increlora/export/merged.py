"""The whole model with the adapter in its weights: W + B A. It loads without peft and increlora, in any engine."""

import copy
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ExportError
from ..files import whole
from ..hosts.peft import checkpoint
from ..hosts.peft.bases import read
from ..hosts.peft.checkpoint import PREFIX, ends_of
from ..hosts.peft.handle import warn_of_budget
from ..hosts.peft.layer import adapted
from ..hosts.peft.quantised import is_plain, is_quantised
from .adapters import Adapter, check_elsewhere, read_adapter


@torch.no_grad()
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
    Returns: `out`, which appears in one piece or not at all. Weights keep the base's dtype. Tied embeddings of which
        the adapter changes one are written as two (`tie_word_embeddings=False`).
    Raises: ExportError (no base, another model's adapter, a quantised base, tied weights that the adapter makes
        different where only peft can keep them apart, a folder in the way), CheckpointError.
    """
    out = Path(out)
    check_elsewhere(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ExportError(f"{out} exists: choose another folder or remove it")
    adapter = read_adapter(model_or_path, adapter_name)
    warn_of_budget(adapter.ranks, adapter.budget, adapter.steps)
    if base is None:
        live = adapted(model_or_path) if isinstance(model_or_path, nn.Module) else None
        if not isinstance(live, PeftModel):
            raise ExportError("an adapter folder has no weights to merge into: give the model as `base=`")
        model = copy.deepcopy(live)
        for layer in model.modules():
            if isinstance(layer, BaseTunerLayer) and layer.merged:
                layer.unmerge()
        base = model.unload()
    if not isinstance(base, PreTrainedModel):
        raise ExportError(f"base is a {type(base).__name__}: only transformers models can be written whole")
    values = merged_values(base, adapter)
    untie(base, values)
    state = base.state_dict(keep_vars=True)
    for name, value in values.items():
        state[name].copy_(value)
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole(out) as folder:
        base.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return out


def merged_values(base: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """The tensors that differ from the base's, by name. Raises ExportError if one has no place of its shape there."""
    state = base.state_dict(keep_vars=True)  # names without copies
    packed = {f"{name}.weight" for name, module in base.named_modules() if is_quantised(module)}
    # Beside an adapted head, peft saves the head itself, under the name it has inside the adapter.
    values = {name.replace(".base_layer.", "."): value for name, value in adapter.others.items()}
    own = [*(adapter.config.modules_to_save or ()), *checkpoint.brought_ends(base, (), None)]
    checkpoint.check_brought([PREFIX + name for name in values], own)
    for name, value in values.items():
        check_place(name, value, state, packed)
    for module, (A, B) in adapter.factors.items():
        name = f"{module}.weight"
        check_place(name, None, state, packed)
        delta = B.float() @ A.float() if B.dtype != torch.float64 else B @ A
        delta = read(base.get_submodule(module), module).inputs.as_weight(delta)
        check_place(name, delta, state, packed)
        start = values.get(name, state[name]).to(state[name].device)
        values[name] = (start + delta.to(start.device)).to(state[name].dtype)
    return values


def check_place(name: str, value: Tensor | None, state: Mapping[str, Tensor], packed: Collection[str]) -> None:
    """Raise ExportError unless the base has a tensor of this name that numbers can be added to, and of this shape."""
    if name in packed or (name in state and not is_plain(state[name].dtype)):
        raise ExportError(f"{name} is quantised in the base: give the same model unquantised")
    if name not in state:
        raise ExportError(f"{name} is not in the base; give the model that the adapter was trained on")
    if value is not None and state[name].shape != value.shape:
        raise ExportError(
            f"{name} is {tuple(state[name].shape)} in the base, {tuple(value.shape)} in the adapter; give the model "
            f"that the adapter was trained on"
        )


def untie(base: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give input and output embeddings a tensor each if they share one and their values would differ. Raises
    ExportError, before anything is changed, if other tensors are tied, or the model cannot be untied."""
    state, first = base.state_dict(), dict[int, str]()
    pairs = {frozenset((name, first.setdefault(t.untyped_storage().data_ptr(), name))) for name, t in state.items()}
    pairs |= {frozenset(tie) for tie in base.get_expanded_tied_weights_keys(all_submodels=True).items()}
    ties = sorted(sorted(pair) for pair in pairs if len(pair) == 2)  # in memory, and as the config has them
    split = []  # those that need two values now
    for tie in ties:
        one, other = (values.get(name, state[name]).to(state[name]) for name in tie)
        if not values.keys().isdisjoint(tie) and not torch.equal(one, other):
            split.append(tie)
    if not split:
        return
    ends = [base.get_submodule(name.rpartition(".")[0]) for name in split[0]]
    if len(ties) > 1 or set(ends) != set(ends_of(base)) or base.config.is_encoder_decoder:
        raise ExportError(
            f"{' and '.join(split[0])} are one tensor in the base, and the adapter makes them different; this model "
            f"cannot be written untied: serve the adapter with peft"
        )
    head = base.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.clone(), requires_grad=head.weight.requires_grad)
    for config in (base.config, base.config.get_text_config()):
        config.tie_word_embeddings = False

"""Which modules are adapted, and what each is as a linear map: its shape, and what it reads.

nn.Linear, Conv1D (GPT-2)     vectors     in, out
nn.Embedding                  tokens      vocabulary, width
nn.Conv2d                     patches     channels · kh · kw, out channels
"""

import difflib
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import _get_in_out_features
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from ...deltas import Inputs, Patches, Tokens, Vectors
from ...errors import ConfigError
from ...methods import Site
from ...registry import METHODS
from .quantised import is_plain, is_quantised, stored_dtype, working_dtype

LEAVE_OUT = "leave it out of `target_modules`"
WHOLE = f"{LEAVE_OUT}, or train it whole (`modules_to_save`)"
KINDS: Mapping[type[Inputs], str] = {Vectors: "nn.Linear or Conv1D", Tokens: "nn.Embedding", Patches: "nn.Conv2d"}


def read(base: nn.Module, name: str) -> Site:
    """A module as a site, without the totals. Raises ConfigError for a module that is no linear map."""
    inputs: Inputs
    if reason := refusal(base):
        raise ConfigError(f"{name} {reason}")
    if isinstance(base, nn.Embedding):
        gain: Any = getattr(base, "scalar_embed_scale", getattr(base, "embed_scale", 1.0))
        inputs = Tokens(base.num_embeddings, base.padding_idx, float(gain))
        sizes = base.num_embeddings, base.embedding_dim
    elif isinstance(base, nn.Conv2d):
        conv: Any = base
        padding: Any = tuple(conv._reversed_padding_repeated_twice)
        inputs = Patches(conv.in_channels, conv.kernel_size, conv.stride, padding, conv.dilation, conv.padding_mode)
        sizes = inputs.channels * inputs.kernel[0] * inputs.kernel[1], base.out_channels
    else:
        inputs, sizes = Vectors(transposed=isinstance(base, Conv1D)), _get_in_out_features(base)
    return Site(name, *sizes, dtype=working_dtype(base), inputs=inputs)


def refusal(base: nn.Module) -> str | None:
    """Why a module cannot be adapted, with the remedy; None if it can. An embedding or convolution may compute
    something of its own, as position embeddings do; word embeddings that are multiplied by a constant say so, and
    packed ones only store their weight otherwise."""
    kind = f"of type {type(base).__name__}"
    if isinstance(base, NonDynamicallyQuantizableLinear):  # nn.MultiheadAttention gives its weight to a function
        return f"{kind} is never called, its weight is read by the module around it: {WHOLE}"
    parent = next((parent for parent in (nn.Embedding, nn.Conv2d) if isinstance(base, parent)), None)
    if parent is None:
        known = isinstance(base, nn.Linear | Conv1D) or is_quantised(base)
        names = "nn.Linear, Conv1D, nn.Embedding or nn.Conv2d"
        return None if known else f"{kind} cannot be adapted: name {names} modules in `target_modules`"
    packed = is_quantised(base) or not is_plain(stored_dtype(base) or torch.float32)
    if type(base).forward is not parent.forward and not hasattr(base, "embed_scale") and not packed:
        return f"{kind} is not a plain nn.{parent.__name__}, an adapter would compute something else: {WHOLE}"
    if isinstance(base, nn.Embedding) and base.max_norm is not None:
        return f"with max_norm={base.max_norm} changes its own weight in use and cannot be adapted: {LEAVE_OUT}"
    if isinstance(base, nn.Conv2d) and base.groups > 1:
        return f"with channels in {base.groups} groups cannot be adapted: {WHOLE}"
    return None


def check_readable(config: Any, name: str, inputs: Inputs) -> None:
    """Raise ConfigError, naming methods that can, if the config's method cannot adapt a module with such inputs."""
    reads = config.settings_cls.reads
    if isinstance(inputs, reads):
        return
    others = [method for method, settings in METHODS.items() if isinstance(inputs, settings.reads)]
    own = ", ".join(KINDS[kind] for kind in reads)
    raise ConfigError(
        f"{name} is {KINDS[type(inputs)]}, which {config.method_name} cannot adapt ({own}): {LEAVE_OUT}, add it to "
        f"`modules_to_save`, or choose among {', '.join(others)}"
    )


def check_matched(peft_config: Any, model: nn.Module) -> None:
    """Raise ConfigError, with the nearest name there is, for target modules of which the model has none."""
    targets = peft_config.target_modules
    if targets == DUMMY_TARGET_MODULES:
        return
    known = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)})
    wanted = [targets] if isinstance(targets, str) else sorted(targets or ())
    near = next((n for t in wanted for n in difflib.get_close_matches(t.rpartition(".")[2], known, 1)), None)
    remedy = f"did you mean {near!r}?" if near and near not in wanted else f"it has {', '.join(known[:12])}"
    raise ConfigError(f"Target modules {wanted} not found in the base model (after exclusions): {remedy}")


def check_in_memory(bases: Mapping[str, nn.Module]) -> None:
    """Raise ConfigError for a module whose weight accelerate fetches for each use: an adapter would lie on the meta
    device beside it, and could not be trained."""
    for name, base in bases.items():
        hook = getattr(base, "_hf_hook", None)
        if any(getattr(part, "offload", False) for part in getattr(hook, "hooks", [hook])):
            raise ConfigError(
                f"{name} is offloaded, and an adapter beside it cannot be trained: load the model by a `device_map` "
                f"that keeps it in memory, leave it out of `target_modules`, or load the adapter for inference"
            )

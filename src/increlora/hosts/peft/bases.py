"""Which modules are adapted, and what each is as a linear map: its shape, and what it reads.

nn.Linear, Conv1D (GPT-2)     vectors     in, out
nn.Embedding                  tokens      vocabulary, width
nn.Conv2d                     patches     channels · kh · kw, out channels
"""

import difflib
import warnings
from collections.abc import Collection, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba, _get_in_out_features
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from ...deltas import Inputs, Patches, Tokens, Vectors
from ...errors import ConfigError
from ...methods import Site
from ...registry import METHODS
from .quantised import is_plain, is_quantised, stored_dtype, working_dtype

LEAVE_OUT = "leave it out of `target_modules`"
WHOLE = f"{LEAVE_OUT}, or train it whole (`modules_to_save`)"
KNOWN = (nn.Linear, Conv1D, nn.Embedding, nn.Conv2d)
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
    """Why a module cannot be adapted, with the remedy; None if it can. What is derived from a known class may compute
    something of its own, as position embeddings do; word embeddings that are multiplied by a constant say so, and
    packed modules only store their weight otherwise."""
    kind = f"of type {type(base).__name__}"
    if isinstance(base, NonDynamicallyQuantizableLinear):  # nn.MultiheadAttention gives its weight to a function
        return f"{kind} is never called, its weight is read by the module around it: {WHOLE}"
    quantised, names = is_quantised(base), "nn.Linear, Conv1D, nn.Embedding or nn.Conv2d"
    parent = next((parent for parent in KNOWN if isinstance(base, parent)), None)
    if parent is None:
        return None if quantised else f"{kind} cannot be adapted: name {names} modules in `target_modules`"
    packed = quantised or not is_plain(stored_dtype(base) or torch.float32)
    own = type(base).forward is not parent.forward and not hasattr(base, "embed_scale") and not packed
    if own and not (isinstance(base, nn.Linear) and is_linear_map(base)):
        plain = parent.__name__ if parent is Conv1D else f"nn.{parent.__name__}"
        return f"{kind} is not a plain {plain}, an adapter would compute something else: {WHOLE}"
    if "weight" not in base._parameters and not packed:  # weight_norm, spectral_norm, torch.nn.utils.parametrize
        return f"{kind} computes its weight from other parameters, which a merge would miss: {WHOLE}"
    if isinstance(base, nn.Embedding) and base.max_norm is not None:
        return f"with max_norm={base.max_norm} changes its own weight in use and cannot be adapted: {LEAVE_OUT}"
    if isinstance(base, nn.Conv2d) and base.groups > 1:
        return f"with channels in {base.groups} groups cannot be adapted: {WHOLE}"
    return None


@torch.no_grad()
def is_linear_map(base: nn.Linear) -> bool:
    """Does a forward pass of its own compute x Wᵀ + b all the same, as Falcon's does? It is tried on two rows, without
    hooks; on the meta device only the shape can be compared."""
    x = torch.linspace(-1, 1, 2 * base.in_features, dtype=base.weight.dtype, device=base.weight.device).view(2, -1)
    try:
        with torch.random.fork_rng(devices=[]):
            found: Any = type(base).forward(base, x)
        wanted = nn.functional.linear(x, base.weight, base.bias)
        if found.is_meta or found.shape != wanted.shape:
            return bool(found.shape == wanted.shape)
        return torch.allclose(found, wanted, rtol=1e-2, atol=1e-2 * float(wanted.abs().max()))
    except (AttributeError, TypeError, ValueError, RuntimeError):  # it takes other inputs, or gives no tensor
        return False


def is_bypassed(model: nn.Module, name: str) -> bool:
    """Does a kernel of this model read the weight of the module without calling it? peft lists such modules (Mamba's
    `out_proj`) for the types that it knows to be like LoRA."""
    try:
        _check_lora_target_modules_mamba(SimpleNamespace(peft_type="LORA"), model, name.rpartition(".")[2])
    except ValueError:
        return True
    return False


def check_called(model: nn.Module, names: Iterable[str]) -> None:
    """Raise ConfigError for a module that is never called, and for a model whose weights are in parts."""
    for name in names:
        if is_bypassed(model, name):
            raise ConfigError(f"{name}: fused kernels of this model read its weight and do not call it: {LEAVE_OUT}")
    if (processes := getattr(model, "_tp_size", None) or 1) > 1:
        raise ConfigError(
            f"the model is spread over {processes} processes by tensor parallelism, which adapters do not follow: load "
            f"it without `tp_plan`, and use DDP or FSDP2"
        )


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


def check_matched(peft_config: Any, model: nn.Module, found: Collection[str]) -> None:
    """Raise ConfigError, with the nearest name there is, for target modules of which the model has none, all together
    or, in a list, one of them."""
    targets = peft_config.target_modules
    if targets == DUMMY_TARGET_MODULES:
        return
    wanted = [targets] if isinstance(targets, str) else sorted(targets or ())
    names = {n.split(".", i)[-1] for n, _ in model.named_modules() for i in range(n.count(".") + 1)}  # and endings
    missing = [t for t in wanted if t not in names] if found else wanted
    if not missing or (found and isinstance(targets, str)):
        return
    known = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)})
    near = next((n for t in missing for n in difflib.get_close_matches(t.rpartition(".")[2], known, 1)), None)
    remedy = f"did you mean {near!r}?" if near and near not in wanted else f"it has {', '.join(known[:12])}"
    if any(".experts." in name and p.dim() == 3 for name, p in model.named_parameters()):
        remedy += "; experts that are stored as one tensor cannot be adapted yet"
    raise ConfigError(
        f"Target modules {missing} not found in the base model (after exclusions), leave them out: {remedy}"
    )


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


def warn_of_statistics(model: nn.Module, modules_to_save: Collection[str]) -> None:
    """Warn of running statistics that training changes and an adapter does not save."""
    counted = [n for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    lost = [n for n in counted if not any(f".{module}." in f".{n}." for module in modules_to_save)]
    if lost:
        others = f" (and {len(lost) - 1} modules like it)" if len(lost) > 1 else ""
        warnings.warn(
            f"{lost[0]}{others} has running statistics, which change in training and are not saved with the adapter: "
            f"name it in `modules_to_save`, or train with it in eval mode",
            stacklevel=2,
        )

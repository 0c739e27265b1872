"""Any adapter as factors: ours, peft's LoRA and peft's AdaLoRA, from a live model, a folder, or a run folder."""

import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file
from torch import Tensor, nn

from ..decide.budget import Budget
from ..deltas import Inputs, Patches, Tokens
from ..deltas.inputs import VECTORS, from_json
from ..errors import CheckpointError, ConfigError, ExportError
from ..hosts.peft import checkpoint
from ..hosts.peft.config import CONFIGS
from ..hosts.peft.handle import Handle
from ..hosts.peft.layer import adapted, adapter_layers, adapter_of
from ..hosts.peft.states import check_together
from ..methods import Site
from ..methods.scaling import scale_of
from ..naming import natural
from .lora_format import PREFIX, description, read_config, read_factors

WIDEST = 2**20  # features, or words, of a module
FOREIGN = ("LORA", "ADALORA")
LARGE = 2**16  # features: a module that is no larger costs little whatever its file says


@dataclass(frozen=True)
class Adapter:
    """What an export needs to know.

    Attributes:
        kind: peft type.   config: ours, or a LoraConfig that says what the adapter belongs to.
        factors: module → (A, B) with ΔW = B A, zero components left out.
        ranks: module → rank in use: active rank of ours, components that are not zero of others.
        parameters: how many these are, as `rank_summary` counts them.
        inputs: module → what it reads.   others: further tensors (`modules_to_save`) by module path.
        every: names of all modules of the base model, None where only the adapter is known.
        limits: module → rank to which an export has to truncate it (`Delta.export_rank`); of the others it is exact.
        budget, steps: of ours, the steps of its run so far; others have none.
    """

    kind: str
    config: Any
    factors: Mapping[str, tuple[Tensor, Tensor]]
    ranks: Mapping[str, int]
    parameters: int
    inputs: Mapping[str, Inputs]
    others: Mapping[str, Tensor]
    every: frozenset[str] | None
    limits: Mapping[str, int] = field(default_factory=dict)
    budget: Budget = field(default_factory=lambda: Budget(None))
    steps: int = 0


def read_adapter(source: nn.Module | str | os.PathLike[str], adapter_name: str | None = None) -> Adapter:
    """The adapter of a live model, of its folder, or of a run folder. Raises ExportError if there is none by that name
    or of a kind we read, CheckpointError if a folder is damaged."""
    if isinstance(source, nn.Module):
        return from_model(source, adapter_name)
    return from_folder(adapter_folder(Path(source)) / (adapter_name or ""))


def check_elsewhere(path: Path) -> None:
    """Raise ExportError for the folder that the process is in: its shell would be left in the one that is replaced."""
    if path.resolve() == Path.cwd():
        raise ExportError(f"{path} is the folder you are in, and would be replaced as a whole: name a new one in it")


def adapter_folder(path: Path, part: str = "adapter") -> Path:
    """The folder of an adapter: `path` itself, or `part` of the run folder `path`."""
    if not (path / "run.json").is_file():
        return path
    if not (path / part).is_dir():
        raise CheckpointError(f"{path} holds no {part}/: it is not finished; resume it, or give one of its checkpoints")
    return path / part


@torch.no_grad()
def from_model(model: nn.Module, adapter_name: str | None) -> Adapter:
    """The adapter of a live model. Raises ExportError if it has none by that name."""
    try:
        model = adapted(model)
    except ConfigError as error:
        raise ExportError(f"nothing to export: {error}") from None
    configs: Mapping[str, Any] = getattr(model, "peft_config", {})
    active = [n for m in model.modules() if isinstance(m, BaseTunerLayer) for n in m.active_adapters]
    name = adapter_name or next(iter(active), None)
    if name is not None and name in configs and configs[name].peft_type in FOREIGN:
        found = foreign(configs[name].to_dict(), live_state(model, name), f"adapter {name!r}", base_names(model))
        return replace(found, factors={n: scaled(f, live_scale(model, n, name)) for n, f in found.factors.items()})
    try:
        name, handle = adapter_of(model, adapter_name)
    except ConfigError as error:
        raise ExportError(f"nothing to export: {error}") from None
    scales = {layer.delta(name).name: layer.scales.get(name, 1.0) for layer in adapter_layers(model, name).values()}
    return native(handle, live_state(model, name), base_names(model), scales)


def live_state(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """An adapter's state dict as peft saves it, without its warnings of embeddings and of modules without rank."""
    config = model.peft_config[adapter_name]  # type: ignore[index]
    pattern, config.rank_pattern = config.rank_pattern, None  # by its pattern AdaLoRA would leave triplets out
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return dict(get_peft_model_state_dict(model, adapter_name=adapter_name))
    finally:
        config.rank_pattern = pattern


def base_names(model: nn.Module) -> frozenset[str]:
    """Module names of the model as it was before any adapter."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    named = dict(base.named_modules())
    inside = tuple(f"{n}." for n, m in named.items() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper))
    return frozenset(name for name in named if not name.startswith(inside))


@torch.no_grad()
def from_folder(path: Path) -> Adapter:
    """The adapter in a folder; no model is built. Raises as `read_adapter`."""
    raw = read_config(path)
    kind = raw.get("peft_type")
    if kind not in (known := (*CONFIGS, *FOREIGN)):
        raise ExportError(f"{path} holds an adapter of type {kind}, expected one of {', '.join(known)}")
    contents, _ = checkpoint.read_contents(path)
    checkpoint.check_values(path)
    state = load_file(path / SAFETENSORS_WEIGHTS_NAME)
    state = {key: state[key] for key in sorted(state, key=natural)}
    if kind in FOREIGN:
        checkpoint.check_names(contents)
        return foreign(raw, state, str(path), None)
    config: Any = CONFIGS[kind].from_pretrained(str(path))
    checkpoint.check_names(contents)
    if config.base_weights is not None:  # earlier versions did not say
        checkpoint.check_brought(contents, [*(config.modules_to_save or ()), *config.base_weights])
    sites = sites_in(config)
    check_shapes(sites, checkpoint.split(contents))
    try:
        handle = Handle(config, sites)
    except ConfigError as error:
        raise CheckpointError(f"{error}: the adapter's config and weights do not belong together") from error
    checkpoint.check_budget(raw, handle.method)
    checkpoint.load(handle.stored, state)
    check_together(handle, checkpoint.split(state))
    return native(handle, state, None)


def native(
    handle: Handle,
    state: Mapping[str, Tensor],
    every: frozenset[str] | None,
    scales: Mapping[str, float] | None = None,
) -> Adapter:
    """An adapter of ours; `state`: its state dict, whose entries beside our parameters come along; `scales`: by module,
    what `set_scale` has multiplied its ΔW with."""
    deltas, ours = handle.deltas, tuple(f"{name}.lora_" for name in handle.stored)
    named = {key.removeprefix(PREFIX): value for key, value in state.items()}
    return Adapter(
        kind=handle.config.peft_type.value,
        config=handle.config,
        factors=finite(
            {name: nonzero(*scaled(delta.factors(), (scales or {}).get(name, 1.0))) for name, delta in deltas.items()}
        ),
        ranks={name: delta.rank for name, delta in deltas.items()},
        parameters=handle.parameters,
        inputs={name: delta.inputs for name, delta in deltas.items()},
        others={name: value for name, value in named.items() if not name.startswith(ours)},
        every=every,
        limits={name: delta.export_rank for name, delta in deltas.items() if delta.export_rank is not None},
        budget=handle.method.budget,
        steps=handle.steps,
    )


def foreign(raw: Mapping[str, Any], state: Mapping[str, Tensor], where: str, every: frozenset[str] | None) -> Adapter:
    """An adapter of peft's own; `raw`: its config. Raises as `read_factors`."""
    scaled, inputs, others = read_factors(raw, state, where)
    factors = finite({name: nonzero(*pair) for name, pair in scaled.items()})
    ranks = {name: A.shape[0] for name, (A, _) in factors.items()}
    parameters = sum(A.numel() + B.numel() for A, B in factors.values())
    kind = str(getattr(raw["peft_type"], "value", raw["peft_type"]))
    return Adapter(kind, description(raw), factors, ranks, parameters, inputs, others, every)


def finite(factors: Mapping[str, tuple[Tensor, Tensor]]) -> Mapping[str, tuple[Tensor, Tensor]]:
    """The factors. Raises ExportError if a number among them is NaN or infinite."""
    for name, pair in factors.items():
        if not all(factor.isfinite().all() for factor in pair):
            raise ExportError(f"{name}: its ΔW is NaN or infinite, the run diverged: export an earlier checkpoint")
    return factors


def live_scale(model: nn.Module, module: str, adapter_name: str) -> float:
    """What `set_scale` has multiplied the ΔW of peft's LoRA with, in this module."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    layer: Any = base.get_submodule(module)
    if model.peft_config[adapter_name].peft_type != "LORA" or adapter_name not in layer.scaling:  # type: ignore[index]
        return 1.0
    r, alpha = layer.r[adapter_name], layer.lora_alpha[adapter_name]
    return float(layer.scaling[adapter_name]) / scale_of(alpha, r, rslora=layer.use_rslora.get(adapter_name, False))


def scaled(factors: tuple[Tensor, Tensor], scale: float) -> tuple[Tensor, Tensor]:
    return factors if scale == 1 else (factors[0], scale * factors[1])


def nonzero(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """(A, B) without the components that add exactly nothing: those with a zero row in A or a zero column in B."""
    used = (A != 0).any(dim=1) & (B != 0).any(dim=0)
    return A[used].cpu(), B[:, used].cpu()


def check_shapes(sites: Iterable[Site], parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise CheckpointError for modules that are large, and larger than their tensors, before memory is taken for them;
    LoRA-Mini's may lack the outer ones."""
    for site in sites:
        part = parts.get(site.name, {})
        A, B = part.get("lora_A0"), part.get("lora_B0")
        if A is None or B is None or "lora_digest" in part:
            continue
        if site.in_features > max(LARGE, A.numel()) or site.out_features > max(LARGE, B.numel()):
            found = f"lora_A0 {tuple(A.shape)} and lora_B0 {tuple(B.shape)}"
            raise CheckpointError(
                f"{site.name}: shapes ({site.in_features}, {site.out_features}), expected those of {found}"
            )


def as_matrix(inputs: Inputs) -> int | None:
    """`in` of a module that reads tokens or patches."""
    if isinstance(inputs, Patches):
        return inputs.channels * inputs.kernel[0] * inputs.kernel[1]
    return inputs.size if isinstance(inputs, Tokens) else None


def sites_in(config: Any) -> list[Site]:
    """The modules as adapter_config.json describes them. Raises CheckpointError if it is damaged there."""
    shapes = config.shapes
    if not isinstance(shapes, dict) or not shapes:
        raise CheckpointError("adapter_config.json has no `shapes` of the modules: restore it from a copy")
    for name, shape in shapes.items():
        if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 < n <= WIDEST for n in shape)):
            raise CheckpointError(f"adapter_config.json: shapes of {name}: {shape!r}, expected [in, out]")
    try:
        inputs = {name: from_json(found) for name, found in config.inputs.items()}
        for name, read in inputs.items():
            if as_matrix(read) not in (None, *shapes.get(name, ())[:1]):
                raise ValueError(f"{name} reads {as_matrix(read)} numbers, its shape is {shapes.get(name)}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"adapter_config.json: inputs ({error!r}): restore it from a copy") from error
    names = sorted(shapes, key=natural)
    return [Site(n, shapes[n][0], shapes[n][1], inputs=inputs.get(n, VECTORS)) for n in names]

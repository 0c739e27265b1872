"""The adapter layer: a frozen base and its deltas. Merge, unmerge and disable live here, once, for all methods."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from ...deltas import Delta, Vectors
from ...errors import ConfigError
from ...ops.fused_linear import PLAIN, Pending, computed
from .bases import read
from .handle import Handle
from .quantised import Rounding, SavedBase, rounding, working_dtype

LINEAR = (nn.Linear, Conv1D)  # exactly these: what is derived from them may compute something else


def pending(base: Any, x: Tensor, *, transposed: bool = False) -> Pending | None:
    """The output of a frozen linear layer without hooks, for `ops.fused_linear` to compute later; None for any other.
    base: an nn.Linear or Conv1D; the instance may have another forward pass.   transposed: the weight is (in, out)."""
    if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
        return None
    if _has_any_global_hook() or "forward" in base.__dict__:
        return None
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # they know plain operations best
        return None
    weight, bias = base.weight, base.bias
    if type(weight) not in PLAIN or weight.requires_grad or (bias is not None and bias.requires_grad):
        return None
    if type(x) not in PLAIN or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return None
    return Pending(x, weight.t() if transposed else weight, bias, base)


class TunerLayer(nn.Module, BaseTunerLayer):
    """What peft's loops visit to switch, freeze, cast, scale, delete and merge adapters.

    lora_delta: by adapter.   handles: by adapter, its owner, the same in all layers.   scales: by adapter, what its ΔW
    is multiplied with, where that is not 1; as with peft's LoRA it is not saved."""

    adapter_layer_names = ("lora_delta",)
    other_param_names = ("handles", "scales")  # what else goes when an adapter is deleted
    cast_input_dtype_enabled = True  # peft's `disable_input_dtype_casting` asks for it; inputs are never cast here

    def __init__(self) -> None:
        super().__init__()
        self.lora_delta = nn.ModuleDict()
        self.handles: dict[str, Handle] = {}
        self.scales: dict[str, float] = {}
        self.merged_adapters: list[str] = []

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply the ΔW of an adapter by this factor, whatever was set before."""
        if adapter in self.lora_delta:
            self.scales[adapter] = scale

    def scale_layer(self, scale: float) -> None:
        """Multiply the ΔW of the active adapters by one more factor."""
        for adapter in self.active_adapters:
            self.set_scale(adapter, self.scales.get(adapter, 1.0) * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """The inverse of `scale_layer`; None: undo all factors."""
        for adapter in self.active_adapters:
            self.set_scale(adapter, 1.0 if scale is None else self.scales.get(adapter, 1.0) / scale)


class SharedFactors(TunerLayer):
    """Parameters that all modules of an adapter share: they have one owner, here at the root of the model, and the
    deltas refer to them. Merging changes nothing here."""

    weight = bias = None  # peft's are those of the base layer, which it would look for in here without end

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        self.merged_adapters += [a for a in check_adapters_to_merge(self, adapter_names) if a in self.lora_delta]

    def unmerge(self) -> None:
        self.merged_adapters.clear()


class AdapterLayer(TunerLayer):
    """y = base(x) + Σ_active ΔW x, for any base that `bases.read` knows."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        site = read(self.get_base_layer(), "target module")
        self.in_features, self.out_features, self.inputs = site.in_features, site.out_features, site.inputs
        self.transposed = self.inputs == Vectors(transposed=True)
        self.saved_base: SavedBase | None = None  # the original base, while something is merged into it
        self.merge_errors: dict[str, Rounding] = {}  # what merging into a quantised base has cost

    def delta(self, adapter: str) -> Delta:
        return self.lora_delta[adapter]  # type: ignore[return-value]

    def forward(self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor:
        """adapter_names: for each example of the batch the adapter it goes through, or `__base__` for none."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if adapter_names is not None and not self.disable_adapters:
            return self._mixed(self.base_layer(x, *args, **kwargs), x, adapter_names)
        active = () if self.disable_adapters or self.merged else self.active_adapters
        y: Tensor | Pending | None = None  # the base's output, computed together with the first ΔW x where that can be
        if active and not args and not kwargs and type(self.base_layer) in LINEAR:
            y = pending(self.base_layer, x, transposed=self.transposed)
        y = self.base_layer(x, *args, **kwargs) if y is None else y
        for adapter in active:
            if adapter in self.lora_delta:
                y = self._add_to(y, x, adapter)
        return computed(y)

    def _add_to(self, y: Tensor | Pending, x: Tensor, adapter: str) -> Tensor:
        """y + ΔW x, with the factor of the adapter."""
        scale = self.scales.get(adapter, 1.0)
        if scale == 1:
            return self.delta(adapter).add_to(y, x)
        y = computed(y)
        return y + scale * self.delta(adapter).add_to(torch.zeros_like(y), x)

    def _mixed(self, y: Tensor, x: Tensor, adapter_names: Sequence[str]) -> Tensor:
        if len(x) != len(adapter_names):
            name = next((str(delta.name) for delta in self.lora_delta.values()), "a module whose adapters are deleted")
            raise ConfigError(
                f"Length of `adapter_names` should be the same as the number of inputs, but got {len(adapter_names)} "
                f"and {len(x)} respectively, in {name}: a module that all examples share (position embeddings) cannot "
                f"be mixed; of `num_beams` and `num_return_sequences` only what `generate` is called with is known"
            )
        if self.merged:
            raise ConfigError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        for adapter in set(adapter_names) & set(self.lora_delta):
            rows = [i for i, name in enumerate(adapter_names) if name == adapter]
            index = torch.tensor(rows, device=y.device)
            part = self._add_to(y.index_select(0, index), x.index_select(0, index), adapter)
            y = y.index_copy(0, index, part)
        return y

    # -- merging -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """Dense ΔW in the layout of the base weight, reserve included: what the forward pass applies."""
        weight, scale = self.inputs.as_weight(self.delta(adapter).weight()), self.scales.get(adapter, 1.0)
        return weight if scale == 1 else scale * weight

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the active adapters to the base weight; with `safe_merge` refuse non-finite results.

        `unmerge` restores the saved base: W + ΔW − ΔW is not W in floating point, and a trainer that merges for every
        generation would change the base. So an adapted weight is in memory twice while merged, but not after
        `merge_and_unload`."""
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter in self.lora_delta:
                weight = self.get_base_weight()
                change = self.get_delta_weight(adapter).to(weight.dtype)
                merged = weight + change
                if safe_merge and not torch.isfinite(merged).all():
                    broken = f"The adapter {adapter} seems to be broken"  # peft's words, which callers may look for
                    raise ValueError(f"NaNs detected in the merged weights. {broken} in {self.delta(adapter).name}")
                self.saved_base = self.saved_base or SavedBase(self)
                self._write(adapter, merged, change)
                self.merged_adapters.append(adapter)

    def _write(self, adapter: str, merged: Tensor, change: Tensor) -> None:
        """Replace the base weight; of a quantised one record the rounding error."""
        if self.quantization_backend is None:
            base = self.get_base_layer()  # a parameter of its own: what is tied to the old one is not to change
            base.weight = nn.Parameter(merged, requires_grad=base.weight.requires_grad)
        else:
            if change.any():  # some backends round even what is on their grid
                self.set_base_weight(merged)
            self.merge_errors[adapter] = rounding(self.get_base_weight(), merged, change)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take merged adapters out of the base weight again, which is then bitwise what it was."""
        if self.saved_base is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.saved_base.restore(self)
        self.saved_base = None
        self.merge_errors.clear()
        self.merged_adapters.clear()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether peft's `convert_to_lora` takes it: it knows linear maps alone, and asks every layer of a model, also
        `SharedFactors`. `export_lora` takes every model."""
        return isinstance(self.inputs, Vectors)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, torch.dtype]:
        device, _ = super()._get_base_layer_device_and_dtype(base_layer)
        return device, working_dtype(base_layer)

    def __repr__(self) -> str:
        return "increlora." + super().__repr__()


class AdapterLinear(AdapterLayer):
    """The layer over linear maps: peft knows by "Linear" in the name what "all-linear" means for a second adapter."""


def layer_over(base: nn.Module) -> AdapterLayer:
    """An adapter layer around a base module."""
    return (AdapterLinear if isinstance(base, nn.Linear | Conv1D) else AdapterLayer)(base)


def adapted(model: nn.Module) -> nn.Module:
    """The model that peft has adapted: `model`, or the one inside it, where another module is around that. Raises
    ConfigError if there are several."""
    if hasattr(model, "peft_config"):
        return model
    found = {name: module for name, module in model.named_modules() if hasattr(module, "peft_config")}
    outer = [module for name, module in found.items() if not any(name.startswith(f"{other}.") for other in found)]
    if len(outer) > 1:
        raise ConfigError(f"{len(outer)} adapted models in this {type(model).__name__}: pass one of them")
    return outer[0] if outer else model


def adapter_layers(model: nn.Module, adapter_name: str | None = None) -> dict[str, AdapterLayer]:
    """Adapter layers, or those that hold this adapter, by the module's name in `model`, in model order."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, AdapterLayer)}
    return {name: layer for name, layer in layers.items() if adapter_name is None or adapter_name in layer.lora_delta}


def adapters_of(model: nn.Module) -> dict[str, Handle]:
    """The adapters that some layer holds, by name."""
    return {name: layer.handles[name] for layer in adapter_layers(model).values() for name in layer.lora_delta}


def adapter_of(model: nn.Module, adapter_name: str | None = None) -> tuple[str, Handle]:
    """An adapter, by default the active one: its name and its owner. Raises ConfigError if there is no such adapter."""
    model = adapted(model)
    layers = adapter_layers(model).values()
    for name in [adapter_name] if adapter_name else [name for layer in layers for name in layer.active_adapters]:
        for layer in layers:
            if name in layer.lora_delta:
                return name, layer.handles[name]
    called, known = f" named {adapter_name!r}" if adapter_name else "", sorted(adapters_of(model)) or "none"
    raise ConfigError(f"no increlora adapter{called} in this model; it has {known}")


def handle_of(model: nn.Module, adapter_name: str | None = None) -> Handle:
    """The owner of an adapter, as `adapter_of`."""
    return adapter_of(model, adapter_name)[1]


def check_name(adapter_name: str) -> None:
    """Raise ConfigError for a name that no module can have: empty, with dots, or taken by `nn.ModuleDict` itself."""
    try:
        nn.ModuleDict({adapter_name: nn.Identity()})
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"{adapter_name!r} cannot name an adapter ({error.args[0]}): choose a word without dots"
        ) from error

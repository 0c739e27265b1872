"""The adapter layer: a frozen base and its deltas. Merge, unmerge and disable live here, once, for all methods."""

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...deltas import Delta
from ...errors import ConfigError


class TunerLayer(nn.Module, BaseTunerLayer):
    """What peft's loops visit to switch, freeze, cast, delete and merge adapters.   lora_delta: by adapter."""

    adapter_layer_names = ("lora_delta",)

    def __init__(self) -> None:
        super().__init__()
        self.lora_delta = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []


class SharedFactors(TunerLayer):
    """Parameters that all modules of an adapter share: they have one owner, here at the root of the model, and the
    deltas refer to them. Merging is the deltas' business."""

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        self.merged_adapters += [a for a in check_adapters_to_merge(self, adapter_names) if a in self.lora_delta]

    def unmerge(self) -> None:
        self.merged_adapters.clear()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """There is no base layer, and deltas fetch what they need."""


class AdapterLayer(TunerLayer):
    """y = base(x) + Σ_active ΔW x, for nn.Linear and GPT-2's Conv1D (whose weight is stored as (in, out))."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = in_out_features(self.get_base_layer(), "target module")
        self.transposed = isinstance(self.get_base_layer(), Conv1D)
        self._unmerged: Tensor | None = None  # the base weight as it was, while something is merged into it

    def delta(self, adapter: str) -> Delta:
        return self.lora_delta[adapter]  # type: ignore[return-value]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return y
        for adapter in self.active_adapters:
            if adapter in self.lora_delta:
                y = self.delta(adapter).add_to(y, x)
        return y

    # -- merging -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """Dense ΔW in the layout of the base weight, reserve included: what the forward pass applies."""
        delta = self.delta(adapter).weight()
        return delta.t() if self.transposed else delta

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the active adapters to the base weight; with `safe_merge` refuse non-finite results.

        The weight as it was is kept, and given back by `unmerge`: W + ΔW − ΔW is not W in floating point, and a trainer
        that merges for every generation would wear the base away. So an adapted weight is there twice while merged, but
        not after `merge_and_unload`. The weight of a quantised layer is not kept: it is rounded again either way."""
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter in self.lora_delta:
                weight = self.get_base_weight()
                if not self.merged and self.quantization_backend is None:
                    self._unmerged = weight
                merged = weight + self.get_delta_weight(adapter).to(weight.dtype)
                if safe_merge and not torch.isfinite(merged).all():
                    raise ValueError(f"NaNs detected in the merged weights of {self.delta(adapter).name} ({adapter})")
                self.set_base_weight(merged)
                self.merged_adapters.append(adapter)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take merged adapters out of the base weight again, which is then bitwise what it was."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        if self._unmerged is not None:
            self.set_base_weight(self._unmerged.to(self.get_base_weight()))
            self._unmerged = None
            self.merged_adapters.clear()
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            weight = self.get_base_weight()
            self.set_base_weight(weight - self.get_delta_weight(adapter).to(weight.dtype))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def __repr__(self) -> str:
        return "increlora." + super().__repr__()


def in_out_features(base: nn.Module, name: str) -> tuple[int, int]:
    """(in, out) of a linear map. Raises ConfigError for any other module."""
    if not isinstance(base, nn.Linear | Conv1D):
        raise ConfigError(
            f"{name} of type {type(base).__name__} cannot be adapted: name nn.Linear or Conv1D modules in "
            f"`target_modules`"
        )
    in_features, out_features = _get_in_out_features(base)
    assert in_features is not None and out_features is not None
    return in_features, out_features

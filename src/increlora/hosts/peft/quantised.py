"""Quantised base layers: whose backend reads them, what merging into them loses, and how to undo it exactly.

peft's backends give the weight in floating point and quantise what is written back. That second rounding is a loss, of
ΔW above all, so it is measured; and since subtracting ΔW would round a third time, the weight of before is kept.
"""

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from peft.utils.quantization_utils import (
    ForwardOnlyQuantizationBackend,
    QuantizationBackend,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from torch import Tensor, nn

from ...errors import ExportError

REMEDY = "export the adapter and serve it beside the base, or merge it into the unquantised base by `export_merged`"


def backend_of(base: nn.Module, model: nn.Module) -> QuantizationBackend | None:
    """peft's access to the weight of a quantised layer of `model`; None for any other layer."""
    try:
        return resolve_quantization_backend(base, **get_quantization_kwargs(model))
    except ValueError:  # torchao's tensors without transformers' config, which alone says how to quantise again
        return ForwardOnlyQuantizationBackend("torchao, by `quantize_` instead of transformers' TorchAoConfig,")


def is_quantised(base: nn.Module) -> bool:
    return backend_of(base, base) is not None


def working_dtype(base: nn.Module) -> torch.dtype:
    """What parameters beside this layer are made in: what it computes in; where it does not say, torch's default."""
    default = torch.get_default_dtype()
    stored = getattr(getattr(base, "weight", None), "dtype", default)
    dtype: torch.dtype = getattr(base, "compute_dtype", None) or stored
    fit_for_parameters = dtype.is_floating_point and dtype.itemsize > 1  # neither packed integers nor float8
    return dtype if fit_for_parameters else default


class Before(Protocol):
    """The base of an adapter layer as it was before a merge."""

    def restore(self, layer: Any) -> None: ...


def remember(layer: Any) -> Before:
    """The base of an adapter layer as it is."""
    if layer.quantization_backend is None:
        return FloatBefore(layer.get_base_weight())
    return QuantisedBefore(layer.get_base_layer())


@dataclass(frozen=True)
class FloatBefore:
    """A weight in floating point, which merging replaces by another tensor."""

    weight: Tensor

    def restore(self, layer: Any) -> None:
        layer.set_base_weight(self.weight.to(layer.get_base_weight()))


class QuantisedBefore:
    """A quantised layer.

    The weight's own attributes are copied, too: the backends let go of some, and change others, when they replace it.
    """

    def __init__(self, base: nn.Module) -> None:
        self.base = base
        self.weight = base._parameters.get("weight")  # None: the backend replaces the layer as a whole
        self.attributes = dict(vars(self.weight)) if self.weight is not None else {}
        self.state = copy.copy(getattr(base, "state", None))

    def restore(self, layer: Any) -> None:
        if self.weight is None:
            layer.base_layer = self.base
        else:
            vars(self.weight).update(self.attributes)
            self.base.weight = self.weight
        if self.state is not None:
            self.base.state = self.state


def rounding(written: Tensor, merged: Tensor, change: Tensor) -> float:
    """‖written − merged‖ / ‖change‖ in the Frobenius norm: what quantising again has cost, as a share of the change,
    which is not zero."""
    return float((written.float() - merged.float()).norm() / change.float().norm())


def check_mergeable(layers: Mapping[str, Any]) -> None:
    """Raise ExportError, before any weight is changed, if the weight of an adapter layer cannot be written."""
    for name, layer in layers.items():
        backend = layer.quantization_backend
        if backend is not None and not backend.supports_merge:
            raise ExportError(
                f"{name} is quantised ({backend.backend_name}): its weight cannot be read and written; {REMEDY}"
            )


def warn_of_rounding(layers: Mapping[str, Any], stacklevel: int) -> None:
    """Say, once for all layers, what quantising again has cost: in the worst of them and in the middle."""
    lost = {name: max(layer.merge_errors.values()) for name, layer in layers.items() if layer.merge_errors}
    if not lost:
        return
    worst, values = max(lost, key=lambda name: lost[name]), sorted(lost.values())
    how = ", ".join(sorted({layers[name].quantization_backend.backend_name for name in lost}))
    warnings.warn(
        f"merged into quantised weights ({how}), which rounds them again: the error is {lost[worst]:.1%} of ‖ΔW‖ in "
        f"{worst}, {values[len(values) // 2]:.1%} in the middle of {len(values)} modules; to lose nothing, {REMEDY}",
        stacklevel=stacklevel,
    )

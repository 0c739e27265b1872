"""Quantised base layers: which backend reads them, what merging into them loses, and how to undo it exactly.

peft's backends give the weight in floating point and quantise what is written back. That second rounding is a loss, of
ΔW above all, so it is measured. Subtracting ΔW would round a third time, so the original weight is kept for `unmerge`.
"""

import copy
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

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
    """peft's access to the weight of a quantised layer of `model`; None for a weight that can be added to."""
    dtype = stored_dtype(base)
    if not is_quantised(base) and dtype is not None and not is_plain(dtype):  # packed, in a way peft does not know
        return ForwardOnlyQuantizationBackend(f"{type(base).__name__}, {dtype}")
    try:
        return resolve_quantization_backend(base, **get_quantization_kwargs(model))
    except ValueError:  # torchao's tensors without transformers' config, which alone says how to quantise again
        return ForwardOnlyQuantizationBackend("torchao, by `quantize_` instead of transformers' TorchAoConfig")


def is_quantised(base: nn.Module) -> bool:
    """Is it a linear layer of a quantisation that peft knows?"""
    try:
        return resolve_quantization_backend(base) is not None
    except ValueError:  # torchao's
        return True


def stored_dtype(base: nn.Module) -> torch.dtype | None:
    return getattr(getattr(base, "weight", None), "dtype", None)


def is_plain(dtype: torch.dtype) -> bool:
    """Neither packed integers nor float8, which torch cannot add to."""
    return dtype.is_complex or (dtype.is_floating_point and dtype.itemsize > 1)


def working_dtype(base: nn.Module) -> torch.dtype:
    """What parameters beside this layer are made in: what it computes in; where it does not say, torch's default."""
    dtype: torch.dtype | None = getattr(base, "compute_dtype", None) or stored_dtype(base)
    return dtype if dtype is not None and is_plain(dtype) else torch.get_default_dtype()


def keep_layout(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights anew at their first evaluation on a CPU that multiplies in bfloat16:
    a layer so packed passes no gradient on, and peft would read its numbers in the wrong order."""
    layers: Iterable[Any] = model.modules()
    for module in layers:
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.state_dict()  # unpacks what has been packed already
            module.support_avx512bf16_for_cpu = False


class SavedBase:
    """The base of an adapter layer before a merge, for `unmerge` to restore. Merging replaces a weight in floating
    point by another parameter, since others may be tied to it. Of a quantised weight the attributes are copied, too:
    the backends drop or change some of them."""

    def __init__(self, layer: Any) -> None:
        self.base = layer.get_base_layer()
        self.weight = self.base._parameters.get("weight")  # None: the backend replaces the layer as a whole
        self.attributes = dict(vars(self.weight)) if self.weight is not None else {}
        self.state = copy.copy(getattr(self.base, "state", None))

    def restore(self, layer: Any) -> None:
        if layer.quantization_backend is None:
            self.weight.data = self.weight.data.to(layer.get_base_weight())  # the model may have moved meanwhile
            layer.get_base_layer().weight = self.weight
            return
        if self.weight is None:
            layer.base_layer = self.base
        else:
            vars(self.weight).update(self.attributes)
            self.base.weight = self.weight
        if self.state is not None:
            self.base.state = self.state


class Rounding(NamedTuple):
    """What quantising again did to a change of a weight.

    Attributes:
        error: ‖written − merged‖ / ‖change‖ in the Frobenius norm.
        retained: ⟨written − original, change⟩ / ‖change‖²: 1 where errors are noise around the change, 0 where it was
            too small for the grid and the weight did not change.
    """

    error: float
    retained: float


def rounding(written: Tensor, merged: Tensor, change: Tensor) -> Rounding:
    """Compare what was written with what should have been written; nothing is lost of a change that is zero."""
    if not change.any():
        return Rounding(0.0, 1.0)
    error, change = written.double() - merged.double(), change.double()
    size = change.norm()
    return Rounding(float(error.norm() / size), float(1 + (error * change).sum() / size**2))


def check_mergeable(layers: Mapping[str, Any]) -> None:
    """Raise ExportError, before any weight is changed, if the weight of an adapter layer cannot be written."""
    for name, layer in layers.items():
        backend = layer.quantization_backend
        if backend is not None and not backend.supports_merge:
            raise ExportError(
                f"{name} is quantised ({backend.backend_name}): its weight cannot be read and written; {REMEDY}"
            )


def warn_of_rounding(layers: Mapping[str, Any], stacklevel: int) -> None:
    """Warn once for all layers of what quantising again has lost: in the worst of them, and in the median."""
    found = {name: max(layer.merge_errors.values()) for name, layer in layers.items() if layer.merge_errors}
    if not found:
        return
    worst, errors = max(found, key=lambda name: found[name]), sorted(one.error for one in found.values())
    poorest = min(found, key=lambda name: found[name].retained)
    how = ", ".join(sorted({layers[name].quantization_backend.backend_name for name in found}))
    warnings.warn(
        f"merging rounded quantised weights ({how}) again: the error is {found[worst].error:.1%} of ‖ΔW‖ in {worst}, "
        f"its median over {len(errors)} modules {errors[len(errors) // 2]:.1%}; {poorest} keeps "
        f"{found[poorest].retained:.1%} of its ΔW; to lose nothing, {REMEDY}",
        stacklevel=stacklevel,
    )

"""Probes of what becomes of ΔW: merged, exported, swapped."""

import contextlib
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor, nn

from increlora.errors import ExportError
from increlora.export.lora import export_lora, is_exact

from .outcome import Disagreement, check, different, same
from .subjects import STEPS, Subject, deltas, layers, llama, output

APPROXIMATE = "approximate, and refused without `tolerance`"


def merge(subject: Subject) -> None:
    """`merge_adapter`, `unmerge_adapter` and `merge_and_unload` keep the function of a trained model."""
    model = subject.trained()
    expected, base = output(model), base_weights(model)
    different(expected, output(llama()), "training")
    model.merge_adapter()
    same(output(model), expected, "output after merging")
    changed = [name for name, weight in base_weights(model).items() if not torch.equal(weight, base[name])]
    check(bool(changed), "merging changed no weight")
    model.unmerge_adapter()
    for name, weight in base_weights(model).items():
        same(weight, base[name], f"weight of {name} after unmerging")
    plain = model.merge_and_unload()
    check(not layers(plain), "adapter layers are left after merge_and_unload")
    same(output(plain), expected, "output after merge_and_unload")


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.get_base_weight().detach().clone() for name, layer in layers(model).items()}


def export(subject: Subject) -> str | None:
    """`export_lora` writes plain LoRA with the same function; a note says what it can only approximate."""
    if not exports_exactly(subject):
        return APPROXIMATE
    inexact = [subject.changes(variant) for variant in subject.variants() if not exports_exactly(variant)]
    return f"{APPROXIMATE}, with {' or '.join(inexact)}" if inexact else None


def exports_exactly(subject: Subject) -> bool:
    """Checks the numbers either way: of an approximation it is the error that must be as said."""
    model = subject.trained()
    with tempfile.TemporaryDirectory() as folder:
        lora = Path(folder, "lora")
        if is_exact(model):
            loaded = PeftModel.from_pretrained(llama(), export_lora(model, lora))
            same(output(loaded), output(model), "output of the exported adapter", 1e-6)
            return True
        with contextlib.suppress(ExportError):
            export_lora(model, lora)
            raise Disagreement("an inexact export was not refused")
        errors = export_lora(model, lora, tolerance=1.0).errors
        loaded = PeftModel.from_pretrained(llama(), lora).get_base_model()
    for name, delta in deltas(model).items():
        found = loaded.get_submodule(name).get_delta_weight("default")
        off, said = float((found - delta).norm() / delta.norm()), errors.get(name, 0.0)
        check(abs(off - said) < 1e-4, f"{name} is off by {off:.4f}, said was {said:.4f}")
    return False


def hotswap(subject: Subject) -> None:
    """The export of one adapter replaces that of another in a live model, by peft's `hotswap_adapter`."""
    first, second = subject.trained(), subject.trained(first=STEPS)
    different(output(first), output(second), "training on other data")
    with tempfile.TemporaryDirectory() as folder:
        export_lora(first, Path(folder, "first"))
        export_lora(second, Path(folder, "second"))
        model = PeftModel.from_pretrained(llama(), Path(folder, "first"))
        same(output(model), output(first), "output before swapping", 1e-6)
        hotswap_adapter(model, str(Path(folder, "second")), adapter_name="default")
    same(output(model), output(second), "output after swapping", 1e-6)

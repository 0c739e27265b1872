"""An adapter of ours, exported every way there is, computes the same in stock peft."""

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn

from increlora import export_lora
from tests.hosts.tiny import BUILDERS, logits


def assert_exports_compute_the_same(
    model: PeftModel, kind: str, native: Path, ranks: dict[str, int], build: Callable[[], nn.Module] | None = None
) -> None:
    """From the live model and from its folder `native`, in both layouts, merged and not, to 1e-6; with these ranks.
    build: makes the base, where it is none of BUILDERS."""
    expected, build = logits(model, kind), build or BUILDERS[kind]
    for layout in ("uniform", "pattern"):
        for name, source in (("live", model), ("folder", native)):
            written = export_lora(source, native.parent / f"{layout}-{name}", layout)
            assert dict(written.ranks) == ranks
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "fan_in_fan_out")
                stock = PeftModel.from_pretrained(build(), written)
            torch.testing.assert_close(logits(stock, kind), expected, rtol=0, atol=1e-6)
            torch.testing.assert_close(logits(stock.merge_and_unload(), kind), expected, rtol=0, atol=1e-6)

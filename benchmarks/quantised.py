"""What merging an adapter into a quantised base loses: `.venv/bin/python benchmarks/quantised.py runs/demo`

For a run of a classifier. Its adapter is put on the base in each format, and merged into it. A row says, for the middle
and the worst module, how far the merged ΔW is from the trained one (as a share of ‖ΔW‖) and how much of it is left in
its own direction; and how far the last hidden states are from those of the adapter beside the same base (as a share of
what the adapter changes). 4 bits are nf4. torchao's row appears where it is installed.
"""

import statistics
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import typer
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig, TorchAoConfig

import increlora  # noqa: F401 (it makes our methods known to peft)
from increlora.hosts.peft.layer import AdapterLayer
from increlora.workbench.tasks.backbone import resolve_backbone

HEAD = ["classifier"]  # of the adapter, not of the base


def bits(**options: Any) -> Any:
    return BitsAndBytesConfig(llm_int8_skip_modules=HEAD, bnb_4bit_quant_type="nf4", **options)


def formats() -> dict[str, Any]:
    """Name → what transformers needs to know."""
    found: dict[str, Any] = {
        "bitsandbytes, 8 bits": bits(load_in_8bit=True),
        "bitsandbytes, 4 bits": bits(load_in_4bit=True),
        "bitsandbytes, 4 bits, double": bits(load_in_4bit=True, bnb_4bit_use_double_quant=True),
    }
    if find_spec("torchao"):
        from torchao.quantization import Int8WeightOnlyConfig

        found["torchao, int8"] = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=HEAD)
    return found


@torch.no_grad()
def states(model: nn.Module) -> Tensor:
    """What the head sees."""
    ids = torch.arange(1000, 1512).view(16, 32)
    return model.eval()(input_ids=ids, output_hidden_states=True).hidden_states[-1].float()


def main(run: Path) -> None:
    print("| base | error, middle | error, worst | kept, middle | kept, least | hidden states |\n|" + " --- |" * 6)
    for name, config in formats().items():
        base = AutoModelForSequenceClassification.from_pretrained(
            resolve_backbone(), num_labels=2, quantization_config=config
        )
        model = PeftModel.from_pretrained(base, run / "adapter")
        beside = states(model)
        with model.disable_adapter():
            without = states(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says what the table says
            model.merge_adapter()
        merged = states(model)
        found = [one for m in model.modules() if isinstance(m, AdapterLayer) for one in m.merge_errors.values()]
        errors, kept = [one.error for one in found], [one.retained for one in found]
        share = float((merged - beside).norm() / (beside - without).norm())
        row = statistics.median(errors), max(errors), statistics.median(kept), min(kept), share
        print(" | ".join([f"| {name}", *(f"{value:.1%}" for value in row)]), "|", flush=True)


if __name__ == "__main__":
    typer.run(main)

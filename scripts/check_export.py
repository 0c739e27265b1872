"""Does the demo's export equal its native adapter in stock peft? `.venv/bin/python scripts/check_export.py runs/demo`

Each adapter is loaded in a process of its own; those with plain LoRA never import increlora. Prints the largest
difference of the logits, merged ones included, and fails above 1e-5.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

LOGITS = """
import sys, torch
if sys.argv[2] == "native":
    import increlora
from peft import PeftModel
from transformers import AutoModelForSequenceClassification
torch.manual_seed(0)
base = AutoModelForSequenceClassification.from_pretrained(sys.argv[4], num_labels=2)
model, ids = PeftModel.from_pretrained(base, sys.argv[1]).eval(), torch.arange(1000, 1064).view(2, 32)
with torch.no_grad():
    logits = model(input_ids=ids).logits, model.merge_and_unload()(input_ids=ids).logits
assert sys.argv[2] == "native" or "increlora" not in sys.modules
torch.save(torch.stack(logits), sys.argv[3])
"""


def main(run: Path) -> float:
    from increlora import export_lora
    from increlora.tasks.backbone import resolve_backbone

    base = str(resolve_backbone())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export_lora(str(run / "adapter"), folder / "pattern", layout="pattern")
        adapters = {"native": run / "adapter", "uniform": run / "lora", "pattern": folder / "pattern"}
        found = {}
        for kind, path in adapters.items():
            command = [sys.executable, "-W", "ignore", "-c", LOGITS, str(path), kind, str(folder / kind) + ".pt", base]
            subprocess.run(command, check=True, capture_output=True)
            found[kind] = torch.load(folder / f"{kind}.pt")
    native = found["native"][0]
    return max((logits - native).abs().max().item() for logits in found.values())


if __name__ == "__main__":
    worst = main(Path(sys.argv[1]))
    print(f"largest difference of the logits: {worst:.1e}")
    sys.exit(worst > 1e-5)

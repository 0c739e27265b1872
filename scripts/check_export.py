"""Does everything that leaves a run equal its native adapter? `.venv/bin/python scripts/check_export.py runs/demo`

Each form is loaded in a process of its own, which never imports increlora unless the form is the native one: both
layouts as adapters and merged by peft, and the merged model. Prints the largest difference of the logits, and fails
above 1e-5. For runs of classifiers.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

LOGITS = """
import sys, torch
kind, folder, base, answer = sys.argv[1:]
if kind == "native":
    import increlora
from peft import PeftModel
from transformers import AutoModelForSequenceClassification as Auto
torch.manual_seed(0)
ids = torch.arange(1000, 1064).view(2, 32)
if kind == "merged":
    forms = [Auto.from_pretrained(folder).eval()]
else:
    forms = [PeftModel.from_pretrained(Auto.from_pretrained(base, num_labels=2), folder).eval()]
with torch.no_grad():
    logits = [model(input_ids=ids).logits for model in forms]
    logits += [model.merge_and_unload()(input_ids=ids).logits for model in forms if kind != "merged"]
assert kind == "native" or "increlora" not in sys.modules
torch.save(logits, answer)
"""


def logits(kind: str, folder: Path, base: str, scratch: Path) -> list[torch.Tensor]:
    answer = scratch / f"{kind}.pt"
    command = [sys.executable, "-W", "ignore", "-c", LOGITS, kind, str(folder), base, str(answer)]
    subprocess.run(command, check=True, capture_output=True)
    return torch.load(answer)


def main(run: Path) -> float:
    from increlora import export_lora, export_merged
    from increlora.workbench.tasks.backbone import load_classifier, resolve_backbone

    base = str(resolve_backbone())
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        export_lora(run, scratch / "pattern", layout="pattern")
        export_merged(run, scratch / "merged", base=load_classifier(base, 2, seed=1)[0])
        forms = {"native": run / "adapter", "uniform": run / "lora"}
        forms |= {kind: scratch / kind for kind in ("pattern", "merged")}
        found = {kind: logits(kind, folder, base, scratch) for kind, folder in forms.items()}
    native = found["native"][0]
    return max((answer - native).abs().max().item() for answers in found.values() for answer in answers)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder that `increlora train` wrote")
    worst = main(parser.parse_args().run)
    print(f"largest difference of the logits: {worst:.1e}")
    sys.exit(worst > 1e-5)

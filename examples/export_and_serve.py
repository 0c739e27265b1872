"""From a trained adapter to a plain LoRA adapter, its check, and the commands that serve it.

Run:
    python examples/trl_sft.py                  # writes runs/sft
    python examples/export_and_serve.py --adapter runs/sft --prompt "def area(width, height)"
"""

import argparse
import json
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from increlora import check_export, export_lora


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, default=Path("runs/sft"), help="folder of a causal model's adapter")
    parser.add_argument("--out", type=Path, default=Path("runs/sft-lora"), help="folder for the plain LoRA adapter")
    parser.add_argument("--prompt", default="def area(width, height)")
    options = parser.parse_args()

    export_lora(options.adapter, options.out)
    for finding in check_export(options.out).findings:  # of all engines; an error would be one that cannot serve it
        print(f"{finding.level}: {finding}")

    config = json.loads((options.out / "adapter_config.json").read_text())
    name = config["base_model_name_or_path"]
    tokenizer = AutoTokenizer.from_pretrained(name)
    prompt = tokenizer(f"{options.prompt}\n", return_tensors="pt", return_token_type_ids=False)

    def load(adapter: Path) -> PeftModel:
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(name), adapter).eval()

    native, exported = load(options.adapter), load(options.out)
    with torch.no_grad():
        difference = (native(**prompt).logits - exported(**prompt).logits).abs().max()
    print(f"largest difference of logits, native against export: {difference:.1e}")
    answer = exported.generate(**prompt, max_new_tokens=20, do_sample=False)
    print(tokenizer.decode(answer[0], skip_special_tokens=True))
    limit = next(size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= config["r"])  # what vLLM accepts
    print(f"vllm serve {name} --enable-lora --max-lora-rank {limit} --lora-modules tuned={options.out}")


if __name__ == "__main__":
    main()

"""IncreLoRA in trl's DPOTrainer: prefer a function's own summary to that of another function.

Run:
    python examples/trl_dpo.py                       # a small random model, nothing is downloaded
    python examples/trl_dpo.py --adapter runs/sft    # goes on from the adapter of examples/trl_sft.py
    python examples/trl_dpo.py --model Qwen/Qwen3-0.6B --steps 500
"""

import argparse
from itertools import pairwise

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from small_llama import small_causal
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from increlora import IncreLoraConfig, rank_summary
from increlora.workbench.tasks.stdlib_docs import load_pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name on the hub, or a folder; default: a small one made on the spot")
    parser.add_argument("--adapter", help="folder of an adapter to go on from; its start is then the reference")
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps")
    parser.add_argument("--max-length", type=int, default=256, help="tokens per example")
    parser.add_argument("--out", default="runs/dpo", help="folder for the adapter")
    options = parser.parse_args()

    trained = options.adapter and PeftConfig.from_pretrained(options.adapter)
    name = options.model or (trained.base_model_name_or_path if trained else small_causal("runs/small-llama"))
    model, config = AutoModelForCausalLM.from_pretrained(name), None
    if trained:
        model = PeftModel.from_pretrained(model, options.adapter, is_trainable=True)
    else:
        config = IncreLoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    pairs, _ = load_pairs()
    rows = [
        {"prompt": f"{one.signature}\n", "chosen": one.summary, "rejected": other.summary}
        for one, other in pairwise(p for p in pairs if p.label == 1)
    ]

    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=options.out,
            max_steps=options.steps,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            max_length=options.max_length,
            bf16=torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            logging_steps=10,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=config,
    )
    trainer.train()
    print(rank_summary(trainer.model))
    trainer.model.save_pretrained(options.out, selected_adapters=["default"])  # without the reference


if __name__ == "__main__":
    main()

"""IncreLoRA in trl's SFTTrainer: give it our config as `peft_config`.

Run:
    python examples/trl_sft.py                                       # a small random model, nothing is downloaded
    python examples/trl_sft.py --model Qwen/Qwen3-0.6B --steps 500
"""

import argparse

import torch
from datasets import Dataset
from small_llama import small_causal
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from increlora import IncreLoraConfig, rank_summary
from increlora.workbench.tasks.stdlib_docs import load_pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name on the hub, or a folder; default: a small one made on the spot")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps")
    parser.add_argument("--max-length", type=int, default=256, help="tokens per example")
    parser.add_argument("--out", default="runs/sft", help="folder for the adapter")
    options = parser.parse_args()

    name = options.model or small_causal("runs/small-llama")
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    pairs, _ = load_pairs()
    rows = [{"prompt": f"{p.signature}\n", "completion": p.summary} for p in pairs if p.label == 1]

    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(name),
        args=SFTConfig(
            output_dir=options.out,
            max_steps=options.steps,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            max_length=options.max_length,
            completion_only_loss=True,
            bf16=torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            logging_steps=10,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=IncreLoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    print(rank_summary(trainer.model))
    trainer.save_model(options.out)


if __name__ == "__main__":
    main()

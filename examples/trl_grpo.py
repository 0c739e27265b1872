"""IncreLoRA in trl's GRPOTrainer: answers are rewarded for being made of letters.

Run:
    python examples/trl_grpo.py                      # a small random model, nothing is downloaded
    python examples/trl_grpo.py --model Qwen/Qwen3-0.6B --steps 500
"""

import argparse

import torch
from datasets import Dataset
from small_llama import small_causal
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from increlora import IncreLoraConfig, rank_summary
from increlora.workbench.tasks.stdlib_docs import load_pairs


def letters(completions: list[str], **kwargs) -> list[float]:
    """Share of each answer's characters that are small letters."""
    return [sum("a" <= c <= "z" for c in text) / max(1, len(text)) for text in completions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name on the hub, or a folder; default: a small one made on the spot")
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps")
    parser.add_argument("--out", default="runs/grpo", help="folder for the adapter")
    options = parser.parse_args()

    name = options.model or small_causal("runs/small-llama")
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    pairs, _ = load_pairs()

    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(name),
        reward_funcs=letters,
        args=GRPOConfig(
            output_dir=options.out,
            max_steps=options.steps,
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=16,
            beta=0.02,  # the reference is the model without its adapter
            learning_rate=3e-3,
            bf16=torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            logging_steps=10,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=Dataset.from_list([{"prompt": f"{p.signature}\n"} for p in pairs if p.label == 1]),
        processing_class=tokenizer,
        peft_config=IncreLoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    print(rank_summary(trainer.model))
    trainer.save_model(options.out)


if __name__ == "__main__":
    main()

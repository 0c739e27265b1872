"""What the pages take for granted: a base model, arguments, data. All that a page may use without making it is here."""

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import DPOConfig, SFTConfig

from tests.examples.tiny import save_llama
from tests.hosts.bases import build_bert, build_llama

STEPS = 20


class Interrupt(TrainerCallback):
    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = True


def rows() -> Tensor:
    return torch.randint(3, 64, (32, 8), generator=torch.Generator().manual_seed(0))


def batches(count: int) -> list[dict[str, Tensor]]:
    return [{"input_ids": part, "labels": part} for part in rows().repeat(count, 1).split(4)[:count]]


def arguments(kind: type = TrainingArguments, **options: Any) -> Any:
    return kind(
        output_dir="out", max_steps=STEPS, per_device_train_batch_size=4, use_cpu=True, report_to="none",
        dataloader_pin_memory=False, disable_tqdm=True, logging_strategy="no",
        **{"save_strategy": "no"} | options,
    )  # fmt: skip


def language_model() -> dict[str, Any]:
    """For most pages: a causal model and token ids."""
    data = [{"input_ids": row, "labels": row} for row in rows().tolist()]
    return {
        "base": build_llama(), "fresh_base": build_llama, "args": arguments(), "data": Dataset.from_list(data),
        "batches": batches, "Trainer": Trainer,
    }  # fmt: skip


def classifier() -> dict[str, Any]:
    data = [{"input_ids": row, "labels": i % 2} for i, row in enumerate(rows().tolist())]
    return language_model() | {"base": build_bert(), "fresh_base": build_bert, "data": Dataset.from_list(data)}


def resuming() -> dict[str, Any]:
    return language_model() | {
        "args": arguments(save_strategy="steps", save_steps=STEPS // 2), "interrupt": Interrupt(),
    }  # fmt: skip


def fine_tuning() -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pairs = [{"prompt": f"{i} + 1 = ", "completion": str(i + 1)} for i in range(32)]
    return {
        "base": AutoModelForCausalLM.from_pretrained(save_llama("model")),
        "tokenizer": AutoTokenizer.from_pretrained("model"), "data": Dataset.from_list(pairs),
        "args": arguments(SFTConfig, bf16=False),
    }  # fmt: skip


def preferences() -> dict[str, Any]:
    rows = [{"prompt": f"{i} + 1 = ", "chosen": str(i + 1), "rejected": str(i)} for i in range(32)]
    return fine_tuning() | {
        "args": arguments(DPOConfig, bf16=False, gradient_checkpointing=False), "data": Dataset.from_list(rows),
        "fresh_base": build_llama,
    }  # fmt: skip


STAND_INS = {
    "docs/howto/frameworks.md": preferences,
    "docs/howto/trainer.md": classifier, "docs/howto/resume.md": resuming, "docs/howto/sft.md": fine_tuning,
}  # fmt: skip

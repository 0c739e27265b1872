"""DPO and GRPO of trl: growth under a reference pass, the copied reference adapter, merging at every step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from examples.small_llama import byte_tokenizer
from increlora import IncreLoraConfig, rank_summary
from increlora.runtime import controllers_of
from tests.hosts.bases import LLAMA, seeded
from tests.hosts.tiny import grow

STEPS = 10
MODULES = 6
ROWS = Dataset.from_list([{"prompt": f"{i} ", "chosen": "aa" * (i % 3 + 1), "rejected": "zz"} for i in range(24)])
COMMON = {
    "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_strategy": "no",
    "report_to": "none", "dataloader_pin_memory": False, "use_cpu": True, "gradient_checkpointing": False,
}  # fmt: skip

disable_progress_bar()


def base() -> nn.Module:
    shape = {"vocab_size": len(byte_tokenizer()), "max_position_embeddings": 64}
    return seeded(lambda: LlamaForCausalLM(LlamaConfig(**LLAMA.to_dict() | shape)))


def config() -> IncreLoraConfig:
    modules = ["q_proj", "v_proj", "down_proj"]
    return IncreLoraConfig(r=3, target_modules=modules, warmup_steps=1, interval_steps=1, top_h=2)


def half_grown() -> PeftModel:
    """As supervised fine-tuning left it: with ranks, and with budget to spare."""
    model = grow(get_peft_model(base(), config()), "llama", steps=4, total_steps=40)
    assert MODULES < rank_summary(model).active < 3 * MODULES
    return model


def dpo(model: nn.Module, folder: Path, **options: Any) -> DPOTrainer:
    chosen = {"peft_config": None if isinstance(model, PeftModel) else config()}
    arguments = DPOConfig(output_dir=str(folder), max_length=32, **COMMON | options)
    return DPOTrainer(model=model, args=arguments, train_dataset=ROWS, processing_class=byte_tokenizer(), **chosen)


def grpo(model: nn.Module, folder: Path, **options: Any) -> GRPOTrainer:
    chosen = {"peft_config": None if isinstance(model, PeftModel) else config()}
    arguments = GRPOConfig(
        output_dir=str(folder), num_generations=2, max_completion_length=4, beta=0.1, **COMMON | options
    )
    return GRPOTrainer(
        model=model, args=arguments, train_dataset=ROWS.select_columns(["prompt"]), processing_class=byte_tokenizer(),
        reward_funcs=lambda completions, **kwargs: [float(sum(map(ord, text)) % 7) for text in completions], **chosen,
    )  # fmt: skip


def tensors(model: nn.Module, part: str) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if part in name}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and len(a) > 0 and all(torch.equal(a[name], b[name]) for name in a)


def assert_spent(model: nn.Module) -> None:
    assert rank_summary(model, "default").active == 3 * MODULES
    assert len({m.active for m in rank_summary(model, "default").modules}) > 1


@pytest.mark.parametrize("make", (dpo, grpo))
def test_a_fresh_adapter_grows_against_the_base_model(make: Any, tmp_path: Path) -> None:
    model = base()
    trainer = make(model, tmp_path)
    before = tensors(trainer.model, "base_layer")
    trainer.train()
    assert_spent(trainer.model)
    assert "ref" not in trainer.model.peft_config and same(tensors(trainer.model, "base_layer"), before)


@pytest.mark.parametrize("make", (dpo, grpo))
def test_a_trained_adapter_grows_on_against_a_copy_of_itself(make: Any, tmp_path: Path) -> None:
    model = half_grown()
    start = rank_summary(model)
    trainer = make(model, tmp_path)
    assert rank_summary(model, "ref") == rank_summary(model, "default") == start
    ref, own = tensors(model, ".ref."), tensors(model, ".default.")
    assert all(torch.equal(p, own[name.replace(".ref.", ".default.")]) for name, p in ref.items())
    trainer.train()
    assert_spent(model)
    assert rank_summary(model, "ref") == start and same(tensors(model, ".ref."), ref)
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".ref." in name)
    driver, idle = controllers_of(model)
    assert driver.events and not idle.events and idle.step == 0
    trainer.save_model(str(tmp_path / "saved"))
    again = PeftModel.from_pretrained(base(), tmp_path / "saved")
    assert rank_summary(again) == rank_summary(PeftModel.from_pretrained(base(), tmp_path / "saved", "x"), "x")
    assert rank_summary(again).active == 3 * MODULES


@pytest.mark.parametrize("start", (base, half_grown))
def test_the_reference_pass_disturbs_no_score(start: Any, tmp_path: Path) -> None:
    """With the reference computed before training, steps have no other forward pass than the one that is trained."""
    models = []
    for precomputed in (False, True):
        trainer = dpo(start(), tmp_path / str(precomputed), precompute_ref_log_probs=precomputed)
        trainer.train()
        models.append(trainer.model)
    assert rank_summary(models[0], "default") == rank_summary(models[1], "default")
    for name, p in tensors(models[0], ".default.").items():
        torch.testing.assert_close(models[1].get_parameter(name).detach(), p, rtol=0, atol=2e-3)
    first, second = ([(e.step, e.module) for e in controllers_of(m)[0].events] for m in models)
    assert first == second and first


class MergedGeneration(TrainerCallback):
    """What GRPO does with vLLM: merge, hand the weights over, unmerge; every step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, *, model: PeftModel, **kwargs: Any) -> None:
        model.merge_adapter()
        with torch.no_grad():
            model(input_ids=torch.arange(4)[None])
        model.unmerge_adapter()


def test_merging_at_every_step_changes_nothing(tmp_path: Path) -> None:
    plain = grpo(base(), tmp_path / "plain")
    plain.train()
    merging = grpo(base(), tmp_path / "merging")  # seeds torch anew, so that the same answers are drawn
    merging.add_callback(MergedGeneration())
    before = tensors(merging.model, "base_layer")
    merging.train()
    assert same(tensors(merging.model, "base_layer"), before)
    assert same(tensors(merging.model, "lora_"), tensors(plain.model, "lora_"))
    assert_spent(merging.model)

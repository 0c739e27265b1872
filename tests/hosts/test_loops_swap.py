"""The two-line swap in every training loop: no callback, no call of ours in the user's code, and the budget is met."""

import warnings

import pytest
import torch
from accelerate import Accelerator
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from increlora import IncreLoraConfig

from .loops import (
    BASES,
    BATCH,
    LENGTH,
    STEPS,
    TARGETS,
    VOCABULARY,
    StopAt,
    adapted,
    assert_spent,
    batches,
    controller_of,
    loss_of,
    rows,
    trainable,
    trainer_of,
)  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", bos_token="<s>")


def config(base: str, **options) -> IncreLoraConfig:
    return IncreLoraConfig(r=2, target_modules=TARGETS[base], **options)


def with_trainer(base: str, folder) -> nn.Module:
    model = adapted(base)
    trainer_of(model, folder).train()
    return model


def sft_trainer(model: nn.Module, folder, **options) -> SFTTrainer:
    arguments = SFTConfig(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=1e-2, use_cpu=True,
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        bf16=False, gradient_checkpointing=False, max_length=LENGTH, dataset_num_proc=None,
    )  # fmt: skip
    return SFTTrainer(
        model=model, args=arguments, train_dataset=rows().select_columns(["input_ids"]), processing_class=tokenizer(),
        **options,
    )  # fmt: skip


def with_sft(base: str, folder) -> nn.Module:
    trainer = sft_trainer(BASES[base](), folder, peft_config=config(base))
    trainer.train()
    return trainer.model


def with_sft_on_a_peft_model(base: str, folder) -> nn.Module:
    model = adapted(base)
    sft_trainer(model, folder).train()
    return model


def with_plain_loop(base: str, folder) -> nn.Module:
    model = adapted(base, total_steps=STEPS)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    model.train()
    for ids in batches(STEPS):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def with_accelerate(base: str, folder) -> nn.Module:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = adapted(base, total_steps=STEPS)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (STEPS + 1))
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    for ids in batches(2 * STEPS):
        with accelerator.accumulate(model):
            accelerator.backward(model(input_ids=ids, labels=ids).loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return accelerator.unwrap_model(model)


LOOPS = [with_trainer, with_sft, with_sft_on_a_peft_model, with_plain_loop, with_accelerate]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_the_swap_is_all_it_takes(loop, base, tmp_path):
    before = loss_of(BASES[base]())
    model = loop(base, tmp_path).eval()
    assert loss_of(model) < before
    assert_spent(model)
    controller = controller_of(model)
    assert controller.step == controller.run.steps == STEPS
    assert {event.kind for event in controller.events} >= {"birth", "finish"}


def test_training_again_with_the_same_trainer_goes_on(tmp_path):
    """The same Trainer keeps its optimizer between calls: three runs on what is there."""
    model = adapted(interval_steps=2, warmup_steps=2)
    trainer = trainer_of(model, tmp_path, max_steps=20)
    controller = controller_of(model)
    trainer.train()
    ranks = dict(controller.ranks)
    assert_spent(model)
    for _ in range(2):
        before = controller.deltas[0].lora_A0.detach().clone()
        trainer.train()
        assert controller.ranks == ranks and controller.step == 20
        assert not torch.equal(controller.deltas[0].lora_A0, before)


@pytest.mark.parametrize("again", ["same trainer", "new trainer"])
def test_training_again_in_mid_growth_spends_the_rest(again, tmp_path):
    model = adapted(interval_steps=2, warmup_steps=2, top_h=1)
    trainer = trainer_of(model, tmp_path, max_steps=20, callbacks=[StopAt(9)])
    controller = controller_of(model)
    trainer.train()
    used = sum(controller.ranks.values())
    assert 8 < used < 16
    if again == "new trainer":
        del trainer
        trainer = trainer_of(model, tmp_path, max_steps=20)
    else:
        trainer.remove_callback(StopAt)
    born = next(d for d in controller.deltas if d.rank > 1)
    before = born.lora_B1.detach().clone()
    trainer.train()
    assert_spent(model)
    assert not torch.equal(born.lora_B1, before), "a rank born in the first run must go on learning in the second"
    assert controller.run.steps == controller.step == 20


def test_training_again_in_a_plain_loop_with_a_new_optimizer():
    model = adapted(interval_steps=2, warmup_steps=2, top_h=2, total_steps=20)
    controller = controller_of(model)
    for stop in (7, 20):
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        for ids in batches(stop):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert controller.step == stop
        assert all(max(delta.state.born) < stop for delta in controller.deltas)
        if stop == 7:
            assert sum(controller.ranks.values()) == 12
    assert_spent(model)


def test_a_finished_adapter_trains_on_in_a_new_loop_without_growing():
    model = with_plain_loop("gpt2", None)
    controller = controller_of(model)
    ranks, before = dict(controller.ranks), controller.deltas[0].lora_A0.detach().clone()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    for ids in batches(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert controller.ranks == ranks and not torch.equal(controller.deltas[0].lora_A0, before)
    assert not any(rule.wants for rule in controller.rules)


def test_nobody_warns(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", ResourceWarning)  # of anybody's files, wherever the collector happens to run
        with_trainer("gpt2", tmp_path)
    assert [str(w.message) for w in caught if "increlora" in w.filename] == []

"""Runs that end before their schedule: whatever leaves the library is told with its ranks and its budget."""

import warnings
from pathlib import Path

import pytest
from peft import PeftModel, get_peft_model
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

from increlora import AdaLoraConfig, IncreLoraConfig, SoraConfig, export_lora, export_merged, rank_summary
from increlora.export.allocation import allocation_to_lora_config
from tests.hosts.test_undriven import OPTIONS, TOKENS, llama, train

ROWS = [{"input_ids": row, "labels": row} for row in TOKENS]
CONFIGS = pytest.mark.parametrize("config_cls", [IncreLoraConfig, AdaLoraConfig, SoraConfig])


def trainer_of(model: PeftModel, folder: Path, steps: int, callbacks=None, **options) -> Trainer:
    """The worst checkpoint is taken for the best, which is the first one."""
    arguments = TrainingArguments(
        str(folder), max_steps=steps, report_to="none", disable_tqdm=True, dataloader_pin_memory=False, eval_steps=2,
        eval_strategy="steps", save_steps=2, learning_rate=0.01, metric_for_best_model="loss", greater_is_better=True,
        use_cpu=True, **options,
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=ROWS, eval_dataset=ROWS, callbacks=callbacks)


def check_told(model: PeftModel, folder: Path) -> None:
    """Saving, exports and merging warn; looking does not."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ranks = rank_summary(model).active
        model.merge_adapter()
        model.unmerge_adapter()
    assert ranks != 56
    said = (
        f"has {ranks} ranks and a budget of 56: after .* steps .*train on from here, take a checkpoint of a later step"
    )
    ways = {
        "native": lambda: model.save_pretrained(folder / "native"),
        "lora": lambda: export_lora(model, folder / "lora"),
        "of a folder": lambda: export_lora(folder / "native", folder / "again"),
        "allocation": lambda: allocation_to_lora_config(model),
        "merged": lambda: export_merged(model, folder / "merged"),
        "in place": lambda: model.merge_and_unload(),
    }
    for way in ways.values():
        with pytest.warns(UserWarning, match=said):
            way()
    reloaded = PeftModel.from_pretrained(llama(), folder / "native")
    with pytest.warns(UserWarning, match=said):
        reloaded.save_pretrained(folder / "copy")


@CONFIGS
def test_a_best_checkpoint_from_mid_schedule(config_cls, tmp_path: Path) -> None:
    model = get_peft_model(llama(), config_cls(**OPTIONS))
    trainer = trainer_of(model, tmp_path, 30, load_best_model_at_end=True)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("-2")
    with pytest.warns(UserWarning, match="a budget of 56"):
        trainer.save_model(tmp_path / "saved")
    check_told(model, tmp_path)


@CONFIGS
def test_early_stopping(config_cls, tmp_path: Path) -> None:
    model = get_peft_model(llama(), config_cls(**OPTIONS))
    trainer = trainer_of(model, tmp_path, 30, [EarlyStoppingCallback(1)], load_best_model_at_end=False)
    trainer.train()
    assert trainer.state.global_step == 4
    with pytest.warns(UserWarning, match="a budget of 56: after 4 steps"):
        model.save_pretrained(tmp_path / "native")


@CONFIGS
def test_a_loop_that_is_shorter_than_its_schedule_or_fails(config_cls, tmp_path: Path) -> None:
    model = get_peft_model(llama(), config_cls(**OPTIONS))
    train(model, 4)
    with pytest.warns(UserWarning, match="a budget of 56: after 4 steps"):
        export_lora(model, tmp_path / "lora")


@CONFIGS
def test_max_steps_of_the_trainer_are_the_length_of_the_run(config_cls, tmp_path: Path) -> None:
    model = get_peft_model(llama(), config_cls(**OPTIONS))
    trainer_of(model, tmp_path, 12).train()  # a warning would be an error
    model.save_pretrained(tmp_path / "native")
    export_lora(model, tmp_path / "lora")
    allocation_to_lora_config(model)
    model.merge_and_unload()

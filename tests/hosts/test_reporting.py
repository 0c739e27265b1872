"""Scalars for the Trainer's `report_to`: they reach the loggers, and only for models with an adapter of ours."""

import pytest
from peft import LoraConfig, get_peft_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

from increlora import PlainLoraConfig, rank_summary

from .loops import adapted, tiny_gpt2, trainer_of

ADDED = {"rank/mean", "rank/active_parameters", "budget/used"}


class Listener(TrainerCallback):
    """A logger like those of `report_to`."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, *, logs, **kwargs):
        self.logs.append(dict(logs))


def logged(model, folder, **options):
    listener = Listener()
    chosen = {"max_steps": 6, "logging_strategy": "steps", "logging_steps": 1} | options
    trainer = trainer_of(model, folder, callbacks=[listener], **chosen)
    trainer.train()
    trainer.evaluate()
    return listener.logs


def growing():
    return adapted(warmup_steps=1, interval_steps=1, top_h=3)


def test_tensorboard_files_hold_the_ranks(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    model = growing()
    logged(model, tmp_path, report_to=["tensorboard"])
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    ranks = rank_summary(model)
    last = {name: [event.value for event in events.Scalars(f"train/{name}")] for name in ADDED}
    assert all(len(values) == 6 for values in last.values())
    assert last["rank/mean"][0] < last["rank/mean"][-1] == pytest.approx(ranks.active / len(ranks.modules))
    assert last["rank/active_parameters"][-1] == ranks.parameters
    assert last["budget/used"][-1] == pytest.approx(ranks.active / ranks.budget_ranks)


def test_rows_of_training_alone_carry_them(tmp_path):
    rows = logged(growing(), tmp_path)
    assert [row.keys() >= ADDED for row in rows] == ["loss" in row for row in rows]
    assert sum("loss" in row for row in rows) == 6 and any("eval_loss" in row for row in rows)


def test_a_fixed_rank_is_logged_too(tmp_path):
    rows = logged(get_peft_model(tiny_gpt2(), PlainLoraConfig(r=2, target_modules=["c_fc"])), tmp_path)
    assert {(row["rank/mean"], row["budget/used"]) for row in rows if "loss" in row} == {(2.0, 1.0)}


def test_a_budget_of_parameters(tmp_path):
    model = adapted(warmup_steps=1, interval_steps=1, top_h=3, total_parameters=900)
    rows = [row for row in logged(model, tmp_path) if "loss" in row]
    ranks = rank_summary(model)
    assert rows[-1]["budget/used"] == pytest.approx(ranks.parameters / 900) and ranks.parameters > 0


def test_other_models_are_left_alone(tmp_path):
    growing()  # the callback is among the Trainer's defaults now
    rows = logged(get_peft_model(tiny_gpt2(), LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True)), tmp_path)
    assert rows and not any(row.keys() & ADDED for row in rows)

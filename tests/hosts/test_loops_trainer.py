"""The Hugging Face Trainer: whatever its options, the same decisions; stopped and resumed, the same bits."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from increlora.deltas import Status
from increlora.hosts.transformers import IncreLoraCallback
from increlora.methods.increlora_paper import IncreLoraPaper
from increlora.runtime.taps import Watcher

from .loops import (
    BATCH,
    StopAt,
    adapted,
    assert_same,
    assert_spent,
    controller_of,
    rows,
    state_of,
    trainable,
    trainer_of,
)  # fmt: skip

SCHEDULE = {"warmup_steps": 4, "interval_steps": 3, "top_h": 3, "orthogonality": 0.1}  # events at 6, 9 and 12
POSITIONS = [3, 7, 14, 18]  # before the first event, after the first, at the end of growth, long after


# -- stop and resume ---------------------------------------------------------------------------------------------------


def run(folder, *, stop: int = 20, resume: str | None = None, model: nn.Module | None = None, **options) -> nn.Module:
    model = model if model is not None else adapted(**SCHEDULE)
    settings = {"max_steps": 20, "save_strategy": "steps", "save_steps": 1, "save_total_limit": None, "seed": 3}
    trainer = trainer_of(model, folder, callbacks=[StopAt(stop)], **settings | options)
    trainer.train(resume_from_checkpoint=resume)
    return model


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> tuple[Path, dict]:
    """A straight run that keeps its checkpoint of every step, and how it ended."""
    folder = tmp_path_factory.mktemp("straight")
    model = run(folder)
    assert_spent(model)
    return folder, state_of(model)


@pytest.mark.parametrize("position", POSITIONS)
def test_resumed_equals_straight(straight, position, tmp_path):
    folder, expected = straight
    model = run(tmp_path, resume=str(folder / f"checkpoint-{position}"), save_strategy="no")
    assert_same(state_of(model), expected)


def test_resuming_in_the_same_process_over_a_finished_model(straight, tmp_path):
    """A notebook: the same model goes back to an early checkpoint, and blocks trained since then start anew."""
    folder, expected = straight
    model = run(tmp_path, save_strategy="no", seed=4, learning_rate=3e-2)
    run(tmp_path, resume=str(folder / "checkpoint-3"), save_strategy="no", model=model)
    assert_same(state_of(model), expected)


def test_resuming_with_the_same_trainer(straight, tmp_path):
    folder, expected = straight
    model = adapted(**SCHEDULE)
    trainer = trainer_of(model, tmp_path, max_steps=20, seed=3, callbacks=[StopAt(11)])
    trainer.train()
    trainer.remove_callback(StopAt)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-7"))
    assert_same(state_of(model), expected)


def test_a_new_run_on_a_loaded_checkpoint_moves_every_rank(straight, tmp_path):
    """Not a resume: what was born at step 6 of the other run belongs to this one from its first step on."""
    folder, _ = straight
    model = adapted(**SCHEDULE)
    model.load_adapter(str(folder / "checkpoint-14"), "default", is_trainable=True)
    born = [d for d in controller_of(model).deltas if d.rank > 1]
    before = [d.lora_A1.detach().clone() for d in born]
    run(tmp_path, model=model, stop=2, save_strategy="no")
    assert born and not any(torch.equal(d.lora_A1, a) for d, a in zip(born, before))


@pytest.mark.parametrize("options", [{"optim": "adamw_torch"}, {"optim": "sgd"}, {"gradient_accumulation_steps": 2}])
def test_resumed_equals_straight_with_other_options(options, tmp_path):
    straight = run(tmp_path / "a", save_steps=8, **options)
    resumed = run(tmp_path / "b", resume=str(tmp_path / "a/checkpoint-8"), save_strategy="no", **options)
    assert_same(state_of(resumed), state_of(straight))


def test_resumed_equals_straight_for_the_published_method(tmp_path):
    """Penalty before clipping, restarted clocks, a reserve that is kept after the end."""
    paper = {"r": 2, "warmup_steps": 4, "interval_steps": 3, "top_h": 3, "birth_warmup": 3}
    models = [adapted(**vars(IncreLoraPaper.paper(**paper))) for _ in range(2)]
    run(tmp_path / "a", model=models[0], save_steps=8)
    run(tmp_path / "b", model=models[1], resume=str(tmp_path / "a/checkpoint-8"), save_strategy="no")
    assert_same(state_of(models[1]), state_of(models[0]))


def test_best_model_at_the_end_brings_back_its_ranks(tmp_path):
    """The best checkpoint lies in mid-growth (the loss gets worse afterwards): ranks, states, config follow it."""
    model = adapted(**SCHEDULE)
    best: dict = {}

    class Worse(StopAt):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 8:
                best.update(state_of(model))
            if state.global_step == 9:
                model.base_model.model.transformer.ln_f.weight.data.mul_(100)  # sure of itself, and wrong

    trainer = trainer_of(
        model, tmp_path, max_steps=16, callbacks=[Worse(0)], save_strategy="steps", save_steps=4, eval_strategy="steps",
        eval_steps=4, load_best_model_at_end=True, metric_for_best_model="eval_loss",
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step == 8
    assert_same(state_of(model), best)
    controller = controller_of(model)
    assert 8 < sum(controller.ranks.values()) < 16
    assert model.peft_config["default"].ranks == controller.ranks
    for delta in controller.deltas:  # what was born after the best step is as if it had never been
        for i in delta.indices(Status.DORMANT):
            assert torch.equal(delta.block(i)["B"], delta.draw("B", i))
    trainer_of(model, tmp_path, max_steps=16).train()
    assert_spent(model)


# -- options -----------------------------------------------------------------------------------------------------------


def recorded(folder, *, model: nn.Module | None = None, **options) -> tuple[nn.Module, Counter]:
    """A recorded run of 10 steps in float64, and how often each module was scored per step."""
    model = model if model is not None else adapted(warmup_steps=2, interval_steps=2, top_h=3, orthogonality=0.0)
    if not options.get("bf16"):
        model = model.double()
    controller = controller_of(model)
    controller.recording = True
    calls: Counter = Counter()
    collect = Watcher.see_gradients

    def counted(self, *args):
        calls[controller.step, self.index] += 1
        return collect(self, *args)

    Watcher.see_gradients = counted
    try:
        trainer_of(model, folder, **{"max_steps": 10} | options).train()
    finally:
        Watcher.see_gradients = collect
    return model, calls


def scores(model: nn.Module) -> torch.Tensor:
    """(steps, modules); NaN where no score was taken."""
    taken = [[m["score"] for m in r["modules"].values()] for r in controller_of(model).records]
    return torch.tensor([[float("nan") if s is None else s for s in row] for row in taken], dtype=torch.float64)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> nn.Module:
    model, calls = recorded(tmp_path_factory.mktemp("plain"))
    assert_spent(model)
    assert set(calls.values()) == {1}
    assert scores(model).isfinite().any(1).sum() == len({step for step, _ in calls}) >= 6
    return model


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_score(plain, reentrant, tmp_path):
    model, calls = recorded(
        tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant}
    )
    assert set(calls.values()) == {1}, "one call per module and backward pass"
    torch.testing.assert_close(scores(model), scores(plain), rtol=1e-9, atol=0, equal_nan=True)
    assert controller_of(model).ranks == controller_of(plain).ranks


@pytest.mark.parametrize("accumulation", [2, 4])
def test_gradient_accumulation_of_equal_micro_batches_changes_nothing(plain, accumulation, tmp_path):
    """`exact`: the score of the step's whole batch, however it is cut."""
    exact = {"warmup_steps": 2, "interval_steps": 2, "top_h": 3, "orthogonality": 0.0, "score_accumulation": "exact"}
    options = {"per_device_train_batch_size": BATCH // accumulation, "gradient_accumulation_steps": accumulation}
    model, calls = recorded(tmp_path, model=adapted(**exact), **options)
    assert set(calls.values()) == {accumulation}
    torch.testing.assert_close(scores(model), scores(plain), rtol=1e-9, atol=0, equal_nan=True)
    assert controller_of(model).ranks == controller_of(plain).ranks


@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True},
        {"optim": "adamw_torch"},
        {"lr_scheduler_type": "cosine", "warmup_steps": 2},
        {"lr_scheduler_type": "constant"},
        {"max_grad_norm": 0.01},
        {"max_grad_norm": 0.0},
        {"gradient_accumulation_steps": 4},
        {"bf16": True, "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    ],
    ids=str,
)
def test_the_budget_is_met_under_any_option(options, tmp_path):
    model, _ = recorded(tmp_path, **options)
    assert_spent(model)
    assert [r["step"] for r in controller_of(model).records] == list(range(10))
    assert all(p.isfinite().all() for p in trainable(model))


def test_bf16_scores_are_the_float64_scores_to_bf16_precision(plain, tmp_path):
    first = [s[s.isfinite().all(1)][0] for s in (scores(recorded(tmp_path, bf16=True)[0]), scores(plain))]
    torch.testing.assert_close(*first, rtol=0.05, atol=0)


def test_clipping_changes_no_score_of_the_first_step(plain, tmp_path):
    """Scores are taken inside the backward pass, before the Trainer clips."""
    clipped = scores(recorded(tmp_path, max_grad_norm=1e-3)[0])
    assert torch.equal(clipped[0], scores(plain)[0]) and not torch.equal(clipped[5], scores(plain)[5])


# -- the callback ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["after_clipping", "before_clipping"])
def test_a_callback_added_twice_changes_nothing(place, tmp_path):
    ends = []
    for extra in ([], [IncreLoraCallback()]):
        model = adapted(**SCHEDULE, penalty_place=place)
        trainer = trainer_of(model, tmp_path, max_steps=13, callbacks=extra)
        assert sum(isinstance(c, IncreLoraCallback) for c in trainer.callback_handler.callbacks) == 1 + len(extra)
        for _ in range(2):
            trainer.train()
        ends.append(state_of(model))
    assert_same(*ends)


def test_without_the_callback_the_config_says_how_long_the_run_is(tmp_path):
    options = {"warmup_steps": 0.2, "interval_steps": 0.1, "top_h": 3}
    model = adapted(**options, total_steps=20)
    trainer = trainer_of(model, tmp_path, max_steps=20)
    trainer.remove_callback(IncreLoraCallback)
    assert not any(isinstance(c, IncreLoraCallback) for c in trainer.callback_handler.callbacks)
    trainer.train()
    with_callback = adapted(**options)
    trainer_of(with_callback, tmp_path, max_steps=20).train()
    assert_same(state_of(model), state_of(with_callback))


def test_the_callback_leaves_other_models_alone(tmp_path):
    from .loops import tiny_gpt2

    trainer = trainer_of(tiny_gpt2(), tmp_path, max_steps=2)
    assert any(isinstance(c, IncreLoraCallback) for c in trainer.callback_handler.callbacks)
    assert trainer.train().global_step == 2


# -- the penalty -------------------------------------------------------------------------------------------------------


def first_step(folder, **options) -> tuple[float, dict[str, torch.Tensor]]:
    """Reported loss and live parameters after one SGD step with learning rate 1 (so that it shows every gradient)."""
    config = {"orthogonality": 0.5, "warmup_steps": 1, "interval_steps": 1} | options.pop("config", {})
    model = adapted(**config, total_ranks=9).double()
    settings = {
        "max_steps": 3, "learning_rate": 1.0, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
        "logging_strategy": "steps", "logging_steps": 1,
    }  # fmt: skip
    trainer = trainer_of(model, folder, callbacks=[StopAt(1)], **settings | options)
    trainer.train()
    return trainer.state.log_history[0]["loss"], state_of(model)["live"]


def test_the_penalty_is_not_in_the_reported_loss(tmp_path):
    with_penalty = first_step(tmp_path)
    without = first_step(tmp_path, config={"orthogonality": 0.0})
    assert with_penalty[0] == without[0]
    assert all(not torch.equal(v, without[1][n]) for n, v in with_penalty[1].items() if ".A0" in n)


def test_the_penalty_is_not_in_the_evaluation_loss(tmp_path):
    losses = []
    for weight in (0.0, 0.5):
        trainer = trainer_of(adapted(orthogonality=weight), tmp_path)
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("place", ["after_clipping", "before_clipping"])
@pytest.mark.parametrize("accumulation", [2, 4])
def test_the_penalty_does_not_depend_on_accumulation(place, accumulation, tmp_path):
    config = {"penalty_place": place}
    whole = first_step(tmp_path, config=config)
    cut = first_step(
        tmp_path, config=config, per_device_train_batch_size=BATCH // accumulation,
        gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    torch.testing.assert_close(cut[1], whole[1], rtol=1e-9, atol=1e-12)


def test_clipping_sees_the_penalty_only_before_it(tmp_path):
    """Clipped to nothing, the model still feels a penalty that comes afterwards."""
    start = state_of(adapted(orthogonality=0.5, warmup_steps=1, interval_steps=1, total_ranks=9).double())["live"]
    for place, moves in (("after_clipping", True), ("before_clipping", False)):
        _, end = first_step(tmp_path, config={"penalty_place": place}, max_grad_norm=1e-12)
        moved = {n for n, v in end.items() if n in start and not torch.allclose(v, start[n], rtol=0, atol=1e-6)}
        assert any(".A0" in n for n in moved) == moves


def test_rows_are_what_they_seem():
    assert len(rows()) % BATCH == 0, "whole batches only, or accumulation would weigh them differently"

"""The harness of the benchmarks, and what of speed does not depend on the machine: operations, bytes kept."""

import math

import pytest
import torch

from benchmarks.speed import measure, targets
from benchmarks.speed.measure import Setting, Times, calls, in_turn, ratio, saved_bytes, summary
from benchmarks.speed.subjects import RANK, SUBJECTS
from benchmarks.speed.workloads import bert
from increlora import rank_summary
from tests.reference.official_increlora import adapted

TINY = Setting("tiny", batch=2, length=4, steps=20, threads=1)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(measure.WORKLOADS, "tiny", bert(2, 16, 2))


@pytest.mark.parametrize("name", SUBJECTS)
def test_every_subject_trains_its_whole_run(name: str) -> None:
    found = in_turn([name], TINY)[name]
    assert len(found.seconds) == len(found.phases) == TINY.steps and min(found.seconds) > 0
    if name.startswith(("IncreLoRA", "AdaLoRA", "SoRA")) and "published" not in name:
        assert found.phases[-1] == targets.AFTER and "event" in found.phases


def test_whose_steps_are_alike_makes_a_shorter_run_of_its_own() -> None:
    found = in_turn(["IncreLoRA, published", "IncreLoRA"], TINY, every=5)
    assert found["IncreLoRA, published"].steps == [0, 5, 10, 15] and len(found["IncreLoRA"].steps) == TINY.steps
    ours, theirs = found["IncreLoRA"].beside(found["IncreLoRA, published"])
    assert len(ours) == len(theirs) == 4


def test_the_published_code_and_ours_end_with_the_same_budget() -> None:
    ends = {name: measure.started(name, TINY) for name in ("IncreLoRA", "IncreLoRA, published")}
    for session in ends.values():
        for _ in range(TINY.steps):
            session.step()
    assert rank_summary(ends["IncreLoRA"].model).active == 12 * RANK
    published = sum(m.ranknum.item() for m in adapted(ends["IncreLoRA, published"].model).values())
    assert 12 * RANK <= published < 12 * RANK + 12  # it adds four ranks to three modules at a time, and may overshoot


def test_a_comparison_leaves_the_threads_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    in_turn(["floor"], TINY)
    assert chosen == [1, 2]


def test_settled_ranks_are_final_and_the_batch_is_the_one_asked_for() -> None:
    session = measure.settled("IncreLoRA", TINY)
    assert rank_summary(session.model).active == 12 * RANK
    assert session.batch["input_ids"].shape == (TINY.batch, TINY.length)


def test_our_lora_takes_fewer_operations_than_pefts_and_keeps_no_more() -> None:
    ours, theirs = (calls(name, TINY) for name in ("LoRA", "peft LoRA"))
    assert ours < theirs
    ours, theirs = (saved_bytes(name, TINY) for name in ("LoRA", "peft LoRA"))
    assert ours <= theirs


def test_the_capacity_is_kept_nowhere() -> None:
    """Compute follows the active rank: a step has the same operations whatever could still grow."""
    small, large = (calls(f"IncreLoRA, capacity {n}", TINY) for n in (8, 64))
    assert small == large


def test_ratios_are_of_medians_and_spreads_of_pairs() -> None:
    found = ratio([1.0, 2.0, 9.0, 2.0], [2.0, 2.0, 3.0, 4.0])
    assert found["ratio"] == 2.0 / 2.5 and found["low"] < found["ratio"] < found["high"]


def test_phases_are_summed_up_apart() -> None:
    found = summary({"one": Times([1.0, 3.0, 5.0], ["scored", "event", "scored"], [0, 1, 2], [0.5, 0.1, 0.7])})["one"]
    assert found["scored"]["median"] == 3.0 and found["event"]["steps"] == 1 and found["all"]["sum"] == 9.0
    assert found["scored"]["optimizer"] == 0.6 and found["all"]["optimizer"] == 0.5


def test_the_default_schedule_scores_a_window_before_each_of_ten_events() -> None:
    window = targets.IncreLora().score_window
    assert window is not None
    assert targets.scored_steps(10_000) == 10 * window
    assert targets.scored_steps(500) <= 10 * window


def test_targets_are_met_on_the_right_side() -> None:
    by_name = {target.what: target for target in targets.TARGETS}
    dense = by_name["published IncreLoRA (dense ΔW) ÷ ours, same schedule"]
    assert dense.met({"ratio": 1.9}) and not dense.met({"ratio": 1.7})
    assert all(math.isfinite(target.bound) for target in targets.TARGETS)

"""DistributedDataParallel, two processes: the same decisions everywhere, and the result of one process."""

import math

import pytest
import torch

from tests.distributed.ddp_worker import ACCUMULATION, CLIP, SETTINGS
from tests.distributed.launch import launch
from tests.distributed.toy_run import MODULES, STEPS, batches_of, paper_config, run, toy_model

pytestmark = pytest.mark.distributed
EVENTS = 6


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    return launch("tests.distributed.ddp_worker", tmp_path_factory.mktemp("ddp"))


def alone(name: str, batches, replay=None):
    model = toy_model(paper_config()) if name in CLIP else toy_model()
    return run(model, batches, replay=replay, clip=CLIP.get(name))


@pytest.mark.parametrize("name", SETTINGS)
def test_every_process_grants_the_same_and_meets_the_budget(processes, name):
    first, second = (p[name] for p in processes)
    assert len(first["grants"]) == EVENTS
    assert first["grants"] == second["grants"] and first["ranks"] == second["ranks"]
    assert sum(first["ranks"].values()) == 3 * MODULES
    assert len(set(first["ranks"].values())) > 1  # a uniform outcome would prove nothing


@pytest.mark.parametrize("name", SETTINGS)
def test_processes_hold_the_same_bits_after_every_step(processes, name):
    assert all(p[name]["equal"] == [True] * STEPS for p in processes)
    assert processes[0][name]["losses"] != processes[1][name]["losses"]  # they did see different data


@pytest.mark.parametrize("name", SETTINGS)
def test_idle_blocks_never_move_and_own_no_state(processes, name):
    assert [p[name]["disturbed"] for p in processes] == [[], []]


@pytest.mark.parametrize("name", SETTINGS)
def test_equals_one_process_given_the_same_grants(processes, name):
    theirs = processes[0][name]
    ours = alone(name, batches_of(accumulation=ACCUMULATION.get(name, 1)), replay=theirs["grants"])
    assert ours.ranks == theirs["ranks"]
    torch.testing.assert_close(theirs["parameters"], ours.parameters, rtol=1e-10, atol=1e-12)


def test_a_score_is_the_mean_over_processes(processes):
    halves = [alone("plain", batches_of(process)[:1]).scores[0] for process in (0, 1)]
    mean = [sum(pair) / 2 for pair in zip(*halves)]
    assert max(abs(own / both - 1) for own, both in zip(halves[0], mean)) > 0.01
    for process in processes:
        torch.testing.assert_close(process["plain"]["scores"][0], mean, rtol=1e-12, atol=0)


def test_the_signed_score_is_that_of_the_whole_batch(processes):
    """It is taken from gradients that DDP has averaged already, so one process decides the same unasked."""
    whole = run(toy_model(score="signed"), batches_of())
    for process in processes:
        assert process["signed"]["grants"] == whole.grants
        torch.testing.assert_close(process["signed"]["scores"][0], whole.scores[0], rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(process["signed"]["parameters"], whole.parameters, rtol=1e-10, atol=1e-12)


def test_the_exact_score_agrees_on_both_processes(processes):
    first, second = (p["exact"] for p in processes)
    assert first["grants"] == second["grants"] and all(first["equal"])
    assert sum(first["ranks"].values()) == 3 * MODULES
    # one micro-batch and one use per step: the same numbers as the mean over micro-batches
    torch.testing.assert_close(first["scores"][0], processes[0]["plain"]["scores"][0], rtol=1e-12, atol=0)


def test_a_batch_that_is_not_finite_is_left_out_everywhere(processes):
    first, second = (p["poisoned"] for p in processes)
    assert first["skipped"] == second["skipped"] == 1
    assert first["grants"] == second["grants"] and all(first["equal"])
    assert all(t.isfinite().all() for t in first["parameters"].values())


def test_a_process_without_a_score_has_no_vote(processes):
    for process in processes:
        assert process["averages"][:2] == [2.0, 2.0] and math.isnan(process["averages"][2])


def test_uneven_inputs_under_join_are_refused_at_the_first_forward_pass(processes):
    """A process without data would take no part in the decisions of the others, which would wait for it."""
    for process in processes:
        assert process["join"]["steps"] == 0
        assert "DriveError: blocks.0.up: under DDP's join()" in process["join"]["error"]
        assert "throw_on_early_termination=True" in process["join"]["error"]


def test_a_join_that_ends_together_is_as_good_as_none(processes):
    for process in processes:
        assert process["join, early end"]["steps"] == 4 and process["join, early end"]["equal"]
        assert process["join, early end"]["error"].startswith("RuntimeError: ")


def test_fixed_ranks_may_join(processes):
    assert [p["join, fixed ranks"]["steps"] for p in processes] == [4, 6]
    assert all(p["join, fixed ranks"]["equal"] and not p["join, fixed ranks"]["error"] for p in processes)


# -- what would happen otherwise: the tests above must be able to fail -------------------------------------------------


def test_without_the_zero_gate_ddp_refuses(processes):
    assert all("Expected to have finished reduction" in p["no gate"] for p in processes)


def test_with_own_scores_the_processes_drift_apart(processes):
    first, second = (p["own scores"] for p in processes)
    assert first["grants"] != second["grants"]
    assert not all(first["equal"])

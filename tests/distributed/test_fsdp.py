"""FSDP2, two processes, every parameter sharded: decisions and result of one process; torch's own checkpoints."""

import pytest
import torch

from tests.distributed.fsdp_worker import CASES, CLIP, SAVED, llama_batches, train_llama
from tests.distributed.launch import launch
from tests.distributed.llama import BUDGET, STEPS, adapted_llama, logits
from tests.distributed.toy_run import MODULES, batches_of, run, toy_model

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    return launch("tests.distributed.fsdp_worker", tmp_path_factory.mktemp("fsdp"))


@pytest.mark.parametrize("name", CASES)
def test_every_process_grants_the_same_and_meets_the_budget(processes, name):
    first, second = (p[name] for p in processes)
    assert first["grants"] == second["grants"] and first["ranks"] == second["ranks"]
    assert sum(first["ranks"].values()) == 3 * MODULES
    assert len(set(first["ranks"].values())) > 1
    assert first["losses"] != second["losses"]


@pytest.mark.parametrize("name", CASES)
def test_idle_blocks_never_move_and_own_no_state(processes, name):
    assert [p[name]["disturbed"] for p in processes] == [[], []]


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process_given_the_same_grants(processes, name):
    """Penalty, birth learning rates, clipping and weight decay included: all of them read sharded tensors."""
    theirs = processes[0][name]
    ours = run(toy_model(**CASES[name]), batches_of(), replay=theirs["grants"], clip=CLIP.get(name))
    torch.testing.assert_close(theirs["parameters"], ours.parameters, rtol=1e-10, atol=1e-12)


def test_the_signed_score_is_that_of_the_whole_batch(processes):
    whole = run(toy_model(**CASES["signed score"]), batches_of())
    assert processes[0]["signed score"]["grants"] == whole.grants
    torch.testing.assert_close(processes[0]["signed score"]["scores"], whole.scores, rtol=1e-9, atol=1e-13)


def test_scores_are_means_over_processes(processes):
    """Of the two halves of a batch, each scored by a process of its own; `exact` keeps its inputs until the step, where
    the factors are sharded."""
    for name in ("plain", "exact score"):
        halves = [run(toy_model(**CASES[name]), batches_of(process)[:1]).scores[0] for process in (0, 1)]
        mean = [sum(pair) / 2 for pair in zip(*halves)]
        torch.testing.assert_close(processes[1][name]["scores"][0], mean, rtol=1e-12, atol=0)


def test_one_bad_shard_is_bad_for_all(processes):
    assert [p["finite"] for p in processes] == [False, False]


# -- torch's distributed checkpoint ------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", SAVED)
def test_loading_does_not_disturb_the_controller(processes, step):
    """torch's loader makes a step with learning rate 0 and gradients everywhere, to have states to load into. It is no
    step of ours, and tensors that have not moved have no state, neither after that step nor once values are there."""
    for process in processes:
        found, saved = process["checkpoint"]["resumed"][step], process["checkpoint"]["owners"][step]
        assert found["before"] == found["after"] and found["before"][0] == step + 1
        assert sum(found["before"][1].values()) > MODULES  # block states came with the model's state
        assert any(found["before"][2])  # and so did the averages of the scores
        assert not found["driven"]
        assert found["invented"] == saved == found["owners"]


@pytest.mark.parametrize("step", SAVED)
def test_the_resumed_run_equals_the_straight_one_bitwise(processes, step):
    """Load the model's state first, then ask for the optimizer's: before that nobody knows which tensors have one.
    And load it with `strict=False`: torch otherwise wants a state for every tensor with requires_grad."""
    for process in processes:
        straight, resumed = process["checkpoint"]["straight"], process["checkpoint"]["resumed"][step]
        assert resumed["grants"] and straight["grants"][-len(resumed["grants"]) :] == resumed["grants"]
        assert resumed["losses"] == straight["losses"][step + 1 :]
        torch.testing.assert_close(resumed["parameters"], straight["parameters"], rtol=0, atol=0)
        assert resumed["disturbed"] == []


# -- a language model --------------------------------------------------------------------------------------------------


def test_llama_grows_to_its_budget_and_learns(processes):
    first, second = (p["llama"] for p in processes)
    assert first["grants"] == second["grants"] and sum(first["ranks"].values()) == BUDGET
    assert first["disturbed"] == second["disturbed"] == []
    assert len(first["losses"]) == STEPS


def test_llama_equals_one_process_given_the_same_grants(processes):
    theirs = processes[0]["llama"]
    ours = train_llama(adapted_llama(total_steps=STEPS), llama_batches(), replay=theirs["grants"])
    torch.testing.assert_close(theirs["parameters"], ours.parameters, rtol=1e-4, atol=1e-5)
    both = torch.tensor([p["llama"]["losses"] for p in processes]).mean(0)
    torch.testing.assert_close(both, torch.tensor(ours.losses), rtol=1e-5, atol=0)


def test_the_whole_state_dict_loads_into_one_process(processes):
    model = adapted_llama()
    untrained = logits(model)
    missing, unexpected = model.load_state_dict(processes[0]["llama"]["state_dict"], strict=False)
    assert missing == unexpected == []
    torch.testing.assert_close(logits(model), processes[0]["llama"]["logits"], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(logits(model), untrained, atol=1e-3)

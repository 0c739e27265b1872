"""torchrun, two processes, the Hugging Face Trainer as a user calls it: a small Llama, its checkpoint, its adapter."""

import pytest
import torch
from peft import PeftModel

from tests.distributed.launch import launch
from tests.distributed.llama import BUDGET, llama, logits
from tests.distributed.trainer_worker import SAVED

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("trainer")


@pytest.fixture(scope="module")
def processes(folder):
    return launch("tests.distributed.trainer_worker", folder)


def test_the_budget_is_met_and_the_processes_agree(processes):
    first, second = (p["straight"] for p in processes)
    assert first["budget"] == sum(first["ranks"].values()) == BUDGET
    assert first["ranks"] == second["ranks"] and len(set(first["ranks"].values())) > 1
    assert first["events"] == second["events"] and first["averages"] == second["averages"]
    assert first["equal"] and second["equal"]


def test_the_saved_adapter_loads_in_one_process(processes, folder):
    model = PeftModel.from_pretrained(llama(), folder / "straight" / "adapter")
    torch.testing.assert_close(logits(model), processes[0]["straight"]["logits"], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(logits(llama()), processes[0]["straight"]["logits"], atol=1e-3)


def test_the_resumed_run_equals_the_straight_one_bitwise(processes):
    for process in processes:
        straight, resumed = process["straight"], process["resumed"]
        late = [event for event in straight["events"] if event[0] >= SAVED]
        assert late and resumed["events"] == late
        assert resumed["ranks"] == straight["ranks"] and resumed["averages"] == straight["averages"]
        torch.testing.assert_close(resumed["parameters"], straight["parameters"], rtol=0, atol=0)


def test_the_resumed_run_reports_the_same_losses(processes):
    straight, resumed = (processes[0][name]["losses"] for name in ("straight", "resumed"))
    assert len(straight) == 2 * SAVED
    assert resumed == straight  # the trainer's state carries those before the checkpoint

"""LoRA-Mini in two processes: what one process with the whole batch trains, around frozen factors that stay."""

import pytest
import torch

from tests.distributed.launch import launch
from tests.distributed.lora_mini_worker import batches_of, optimizer_of, outcome, toy_model, train

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    return launch("tests.distributed.lora_mini_worker", tmp_path_factory.mktemp("lora_mini"))


@pytest.mark.parametrize("run", ["ddp", "ddp, nothing broadcast", "fsdp", "resumed"])
def test_two_processes_train_what_one_trains(processes, run):
    model = toy_model()
    start = outcome(model)
    train(model, batches_of(None), optimizer_of(model))
    expected = outcome(model)
    for process in processes:
        torch.testing.assert_close(process[run], expected, rtol=1e-8, atol=1e-10)
        for name, value in start.items():
            moves = name.endswith(("lora_A0", "lora_B0"))
            assert torch.equal(process[run][name], value) != moves
    torch.testing.assert_close(processes[0][run], processes[1][run], rtol=0, atol=0)


def test_a_sharded_run_resumes_bitwise(processes):
    for process in processes:
        torch.testing.assert_close(process["resumed"], process["fsdp"], rtol=0, atol=0)

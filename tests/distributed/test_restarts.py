"""Restarts in two processes: the same rounds everywhere, those of one process that sees the whole batch."""

import pytest
import torch

from tests.distributed.launch import launch
from tests.distributed.restarts_worker import CASES, batches_of, optimizer_of, toy_model, train

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    return launch("tests.distributed.restarts_worker", tmp_path_factory.mktemp("restarts"))


@pytest.mark.parametrize("name", CASES)
def test_every_process_restarts_with_what_one_process_has_learnt(processes, name):
    model = toy_model(**CASES[name])
    expected = train(model, batches_of(None), optimizer_of(model))
    assert {len(past) for past in expected["past"].values()} == {2}
    for process in processes:
        for run in ("ddp", "fsdp"):
            torch.testing.assert_close(process[f"{run} {name}"], expected, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(process[f"resumed {name}"], process[f"fsdp {name}"], rtol=0, atol=0)
    torch.testing.assert_close(processes[0], processes[1], rtol=0, atol=0)

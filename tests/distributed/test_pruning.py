"""Pruning in two processes: the same cuts everywhere, those of one process, and a bitwise resume of a sharded run."""

import pytest
import torch

from tests.distributed.launch import launch
from tests.distributed.pruning_worker import METHODS, SAVED, batches_of, optimizer_of, outcome, toy_model, train

pytestmark = pytest.mark.distributed
every_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    return launch("tests.distributed.pruning_worker", tmp_path_factory.mktemp("pruning"))


@every_method
@pytest.mark.parametrize("kind", ["ddp", "ddp, recomputed", "fsdp"])
def test_every_process_keeps_what_one_process_keeps(processes, method, kind):
    model = toy_model(method)
    train(model, batches_of(None), optimizer_of(model))
    alone = outcome(model)
    first, second = (process[method][kind] for process in processes)
    assert first["events"] == second["events"] == alone["events"]
    assert first["kept"] == second["kept"] == alone["kept"]
    assert len({sum(kept) for kept in alone["kept"].values()}) > 1  # a uniform outcome would prove nothing
    assert sum(map(sum, alone["kept"].values())) == 12
    for process in (first, second):
        torch.testing.assert_close(process["parameters"], alone["parameters"], rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(process["statistics"], alone["statistics"], rtol=1e-6, atol=1e-14)


@every_method
@pytest.mark.parametrize("part", ["parameters", "statistics", "kept"])
def test_a_sharded_run_resumes_bitwise(processes, method, part):
    for process in (found[method] for found in processes):
        torch.testing.assert_close(process["resumed"][part], process["fsdp"][part], rtol=0, atol=0)
        later = [event for event in process["fsdp"]["events"] if event[0] > SAVED]
        assert later and process["resumed"]["events"] == later

"""Pruning of entries in two processes (P7): the same zeros everywhere, those of one process that sees the whole batch,
and a bitwise resume of a sharded run."""

import pytest
import torch

from tests.distributed.entries_worker import CASES, SAVED, batches_of, optimizer_of, outcome, toy_model, train
from tests.distributed.launch import launch

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    return launch("tests.distributed.entries_worker", tmp_path_factory.mktemp("entries"))


@pytest.fixture(scope="module")
def alone():
    found = {}
    for name, options in CASES.items():
        model = toy_model(**options)
        found[name] = outcome(model, train(model, batches_of(None), optimizer_of(model)))
    return found


@pytest.mark.parametrize("run", ["ddp default", "ddp held", "fsdp default", "fsdp held", "accumulated default"])
def test_p7_every_process_zeroes_what_one_process_zeroes(processes, alone, run):
    expected = alone[run.split()[1]]
    assert {int(row.sum()) for row in expected["zeros"]} > {0}
    for process in processes:
        found = process[run]
        assert torch.equal(found["zeros"], expected["zeros"])
        torch.testing.assert_close(found["parameters"], expected["parameters"], rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(found["statistics"], expected["statistics"], rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(processes[0][run], processes[1][run], rtol=0, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_a_sharded_run_resumes_bitwise(processes, name):
    for process in processes:
        straight, resumed = process[f"fsdp {name}"], process[f"resumed {name}"]
        assert torch.equal(resumed["zeros"], straight["zeros"][SAVED + 1 :])
        for part in ("parameters", "statistics"):
            torch.testing.assert_close(resumed[part], straight[part], rtol=0, atol=0)


def test_a_module_that_one_process_uses_counts_for_both_and_one_that_none_uses_for_neither(processes):
    expected = [0.9 * 3.0 + 0.1 * 4.0] * 4 + [1.0] + [5.0] * 4 + [1.0]
    for process in processes:
        assert process["uneven"].tolist() == pytest.approx(expected, rel=1e-12)

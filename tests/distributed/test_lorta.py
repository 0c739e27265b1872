"""LoRTA in two processes: parameters that all modules share stay the same everywhere, as one process has them."""

import pytest
import torch

from tests.distributed.launch import launch
from tests.distributed.lorta_worker import ACCUMULATION, SETTINGS, SHARDED, factors, model_of, train

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    return launch("tests.distributed.lorta_worker", tmp_path_factory.mktemp("lorta"))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")  # since 5.23
@pytest.mark.parametrize("name", [*SETTINGS, *SHARDED])
def test_processes_hold_the_same_bits_and_what_one_process_finds(processes, name):
    first, second = (p[name] for p in processes)
    assert all(torch.equal(first[n], second[n]) for n in first)
    alone, model = model_of(name), model_of(name)
    expected = train(model, model, None, ACCUMULATION.get(name, 1))
    torch.testing.assert_close(first, expected, rtol=1e-9, atol=1e-11)
    assert not any(torch.equal(expected[n], start) for n, start in factors(alone).items())


def test_reentrant_checkpointing_is_refused(processes):
    for process in processes:
        assert "use_reentrant': False" in process["refused"]


def test_unguarded_the_processes_would_drift_apart(processes):
    """The reason for the refusal: nothing else would have said a word."""
    first, second = (p["unguarded"] for p in processes)
    assert any(not torch.equal(first[n], second[n]) for n in first)

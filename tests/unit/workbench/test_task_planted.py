"""Task `planted`: the plant is what it says, and the figures are exact."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from increlora import PlainLoraConfig
from increlora.errors import TaskError
from increlora.workbench.tasks import load_model, load_task
from increlora.workbench.tasks.planted import (
    LAYERS,
    PlantedNet,
    TaskOptions,
    plant,
    planted_ranks,
    planted_task,
    squared_error,
)


@pytest.fixture(scope="module")
def task():
    return planted_task(None, TaskOptions(seed=3))


def student(seed, **settings):
    config = PlainLoraConfig(target_modules=["mix", "up", "down"], **settings)
    return get_peft_model(PlantedNet(seed), config)


def test_the_plant_has_the_ranks_it_says_and_nothing_else_differs():
    base, teacher, ranks = PlantedNet(3), plant(PlantedNet(3), planted_ranks(3), 3), planted_ranks(3)
    for name, rank in ranks.items():
        difference = teacher.get_submodule(name).weight - base.get_submodule(name).weight
        assert int((torch.linalg.svdvals(difference) > 1e-4).sum()) == rank
    assert torch.equal(teacher.head.weight, base.head.weight)


def test_the_budget_is_two_ranks_per_module_in_ranks_and_in_parameters():
    for seed in range(5):
        ranks, net = planted_ranks(seed), PlantedNet(0)
        costs = {n: m.in_features + m.out_features for n in ranks for m in [net.get_submodule(n)]}
        assert sum(ranks.values()) == 2 * len(ranks) == 2 * 3 * LAYERS
        assert sum(ranks[n] * costs[n] for n in ranks) == 2 * sum(costs.values())
    assert planted_ranks(0) != planted_ranks(1) and planted_ranks(0) == planted_ranks(0)


def test_excess_loss_is_one_untrained_and_zero_for_the_teacher(task):
    untouched = student(3, r=2)
    assert task.evaluate(untouched)["excess_loss"] == pytest.approx(1.0, abs=1e-6)
    batches = [task.collate(list(task.validation))]
    assert squared_error(plant(PlantedNet(3), planted_ranks(3), 3), batches) < 1e-10


def test_recovery_counts_the_ranks_that_are_where_the_plant_is(task):
    ranks = planted_ranks(3)
    planted = {name: rank for name, rank in ranks.items() if rank}
    uniform = sum(min(2, rank) for rank in ranks.values()) / 36
    assert task.evaluate(student(3, r=2))["recovery"] == pytest.approx(uniform)
    config = PlainLoraConfig(r=1, rank_pattern=planted, target_modules=list(planted))
    assert task.evaluate(get_peft_model(PlantedNet(3), config))["recovery"] == 1.0


def test_seeds_decide_net_plant_and_data_and_validation_inputs_are_fixed():
    same, other = planted_task(None, TaskOptions(seed=3)), planted_task(None, TaskOptions(seed=4))
    again = planted_task(None, TaskOptions(seed=3))
    assert torch.equal(same.train[0]["labels"], again.train[0]["labels"])
    assert not torch.equal(same.train[0]["x"], other.train[0]["x"])
    assert torch.equal(same.validation[0]["x"], other.validation[0]["x"])


def test_it_takes_neither_model_nor_data(tmp_path):
    with pytest.raises(TaskError, match="leave it out"):
        load_task("planted", None, data=tmp_path)
    with pytest.raises(TaskError, match="leave it out"):
        load_model("planted", "some/model", 0)


@pytest.mark.slow
def test_the_study_prints_a_row_per_allocation(tmp_path, capsys):
    path = Path(__file__).parents[3] / "benchmarks" / "planted.py"
    spec = importlib.util.spec_from_file_location("planted_study", path)
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    for only in ("uniform", "oracle"):
        study.main(seeds=1, epochs=0.1, out=tmp_path, only=only)
    rows = [line for line in capsys.readouterr().out.splitlines() if "(oracle)" in line or "(LoRA)" in line]
    assert len(rows) == 2 and "0.42 (0.42 – 0.42)" in rows[0] and "1.00 (1.00 – 1.00)" in rows[1]
    study.main(seeds=1, epochs=0.1, out=tmp_path, only="uniform", set_=["lora_alpha=16"])
    assert "| uniform (LoRA) lora_alpha=16 | " in capsys.readouterr().out
    state = json.loads((tmp_path / "uniform--LoRA--lora-alpha-16-0" / "run.json").read_text())
    assert state["run_info"]["train_config"]["options"] == {"lora_alpha": 16}
    finished = {path.name for path in tmp_path.iterdir()}
    study.main(seeds=1, epochs=0.1, out=tmp_path, only="uniform")  # what is there is not trained again
    assert {path.name for path in tmp_path.iterdir()} == finished

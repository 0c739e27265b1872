"""Copies of models, live configs, and what users read of an adapter: its ranks, its parameters, its type."""

import copy
import dataclasses
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model

from increlora import IncreLoraConfig, PlainLoraConfig, PriLoraConfig, attach, rank_summary
from increlora.errors import ConfigError, DriveError
from increlora.hosts.peft.handle import described_states
from tests.hosts.test_peft_models import deltas, fresh, same_outputs
from tests.hosts.tiny import BUILDERS, adapter_only, grow, growing, inputs_for

# -- copies and configs --------------------------------------------------------------------------------------------


def test_a_copy_computes_but_does_not_train_until_it_is_attached(models) -> None:
    model = copy.deepcopy(models["mlp"])
    assert same_outputs(model, models["mlp"], "mlp")
    with pytest.raises(DriveError, match=r"is a copy.*increlora\.attach"):
        model.train()(**inputs_for("mlp")).sum().backward()
    model.zero_grad()
    original = rank_summary(models["mlp"])
    grow(model, "mlp", steps=7)
    assert rank_summary(model).active > original.active
    assert rank_summary(models["mlp"]) == original


def test_a_pickled_model_computes_and_can_be_attached(models) -> None:
    model = pickle.loads(pickle.dumps(models["mlp"]))
    assert same_outputs(model, models["mlp"], "mlp")
    optimizer = torch.optim.AdamW(adapter_only(model), lr=0.05)
    controller = attach(model, optimizer, total_steps=40)
    assert controller.ranks == models["mlp"].peft_config["default"].ranks


CONFIGS = [
    growing(target_modules=["up"], capacity_pattern={"up": 4}, total_ranks=3),
    IncreLoraConfig.paper(2, target_modules=["up"], lora_dropout=0.1, task_type="CAUSAL_LM"),
    PlainLoraConfig(r=3, target_modules=["up"], modules_to_save=["head"]),
    PriLoraConfig(r=3, first_r=1.5, interval_steps=0.1, target_modules=["up"]),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: str(c.peft_type))
def test_configs_survive_pickle_copy_and_json(config, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    loaded = [pickle.loads(pickle.dumps(config)), copy.deepcopy(config), PeftConfig.from_pretrained(tmp_path)]
    for other in loaded:
        assert type(other) is type(config)
        assert other.to_dict() == config.to_dict()
        assert other.settings() == config.settings()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == config.peft_type.value


def test_one_config_object_for_two_models_starts_anew() -> None:
    config = growing(target_modules=["up", "down"], top_h=1)
    first = grow(get_peft_model(BUILDERS["mlp"](), config), "mlp")
    ranks = rank_summary(first)
    second = get_peft_model(BUILDERS["mlp"](), config)
    assert {m.active for m in rank_summary(second).modules} == {1}
    assert same_outputs(second, BUILDERS["mlp"](), "mlp")
    assert rank_summary(first) == ranks


def test_the_live_config_carries_the_current_ranks(models, folders) -> None:
    for kind, model in models.items():
        expected = {m.module: m.active for m in rank_summary(model).modules}
        assert model.peft_config["default"].ranks == expected
        assert json.loads((folders[kind] / "adapter_config.json").read_text())["ranks"] == expected


# -- what users read -----------------------------------------------------------------------------------------------


def test_rank_summary_tells_active_reserve_capacity_and_budget(models) -> None:
    summary = rank_summary(models["mlp"])
    assert [(m.module, m.reserve, m.capacity, m.cost) for m in summary.modules] == [
        ("up", 1, 8, 20),
        ("down", 1, 8, 20),
    ]
    assert (summary.active, summary.reserve, summary.capacity) == (4, 2, 16)
    assert (summary.budget_ranks, summary.budget_parameters, summary.parameters) == (6, 120, 80)
    grown = {m.module: m.active for m in summary.modules}
    assert str(summary).splitlines() == [
        f"up: {grown['up']} active, 1 reserve, 8 capacity",
        f"down: {grown['down']} active, 1 reserve, 8 capacity",
        "active: 4 of 6 ranks, 80 of 120 parameters | reserve: 2 ranks | capacity: 16 ranks, 320 parameters",
    ]


def test_rank_summary_of_a_budget_in_parameters_and_of_plain_lora() -> None:
    by_parameters = rank_summary(fresh("mlp", total_parameters=100))
    assert (by_parameters.budget_ranks, by_parameters.budget_parameters) == (None, 100)
    assert "active: 2 ranks, 40 of 100 parameters" in str(by_parameters)
    lora = rank_summary(get_peft_model(BUILDERS["mlp"](), PlainLoraConfig(r=3, target_modules=["up"])))
    assert (
        lora.total == "active: 3 of 3 ranks, 60 of 60 parameters | reserve: 0 ranks | capacity: 3 ranks, 60 parameters"
    )


def test_rank_summary_names_the_adapters_there_are(models) -> None:
    with pytest.raises(ConfigError, match=r"no increlora adapter named 'x' in this model; it has \['default'\]"):
        rank_summary(models["mlp"], "x")
    with pytest.raises(ConfigError, match="it has none"):
        rank_summary(BUILDERS["mlp"]())


def test_print_trainable_parameters_tells_active_and_capacity_apart(models, capsys) -> None:
    models["mlp"].print_trainable_parameters()
    first, second = capsys.readouterr().out.strip().splitlines()
    trainable = sum(p.numel() for p in adapter_only(models["mlp"]))
    assert first.startswith(f"trainable params: {trainable:,d} ||")
    assert second == rank_summary(models["mlp"]).total


def test_print_trainable_parameters_of_other_methods_is_pefts_own(capsys) -> None:
    from peft import LoraConfig

    get_peft_model(BUILDERS["mlp"](), LoraConfig(target_modules=["up"])).print_trainable_parameters()
    assert len(capsys.readouterr().out.strip().splitlines()) == 1


def test_registering_again_changes_nothing() -> None:
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    from increlora.hosts.peft.register import patch_peft, register_methods

    before, method, read = list(PeftType), PeftModel.print_trainable_parameters, PeftConfig.from_json_file
    register_methods(), patch_peft()
    assert list(PeftType) == before
    assert PeftModel.print_trainable_parameters is method and PeftConfig.from_json_file == read
    assert PeftType("INCRELORA_LORA") is PeftType["INCRELORA_LORA"] is PeftType.INCRELORA_LORA
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.INCRELORA_LORA].__name__ == "AdapterModel"
    assert pickle.loads(pickle.dumps(PeftType.INCRELORA_LORA)) is PeftType.INCRELORA_LORA


def test_model_status_knows_the_type(models) -> None:
    status = models["llama"].get_model_status()
    assert status.peft_types == {"default": "INCRELORA_INCRELORA"}
    assert status.num_adapter_layers == 14


def test_a_live_config_with_another_rank_makes_a_fresh_adapter(models) -> None:
    model = copy.deepcopy(models["mlp"])
    config = model.peft_config["default"]
    grown = rank_summary(model, "default")
    model.add_adapter("same", config)
    assert [m.active for m in rank_summary(model, "same").modules] == [m.active for m in grown.modules]
    model.add_adapter("wider", dataclasses.replace(config, r=5, capacity=12, grow_by=2))
    assert {m.active for m in rank_summary(model, "wider").modules} == {1}


@pytest.mark.parametrize(("rank", "taken"), [(2, False), (3, True)])
def test_as_many_blocks_of_other_sizes_are_other_blocks(models, rank: int, taken: bool) -> None:
    """The states of blocks of one rank, of which two are active, mean rank 3 where the second block has two."""
    model = copy.deepcopy(models["mlp"])
    model.add_adapter("wider", dataclasses.replace(model.peft_config["default"], r=5, capacity=7, grow_by=2))
    (delta, *_) = deltas(model, "wider")
    assert delta.sizes == [1, 2, 2, 1, 1]
    live = SimpleNamespace(blocks={delta.name: [2, 2, 1, 0, 0]}, ranks={delta.name: rank})
    assert described_states(live, delta.name, delta) == ([2, 2, 1, 0, 0] if taken else None)

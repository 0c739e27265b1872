"""LoRTA on real architectures: files, resuming, and that the model owns every factor once."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from increlora import LortaConfig, rank_summary
from increlora.errors import CheckpointError, ConfigError
from increlora.export.adapters import read_adapter
from tests.hosts.test_lorta import BUILDERS, KINDS, NAMES, adapted, bank, grouped, trained
from tests.hosts.tiny import logits
from tests.hosts.training import deltas, interrupted, train

# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_t8_t10_a_file_has_every_factor_once_and_loads(kind: str, tmp_path: Path) -> None:
    model = trained(kind)
    model.save_pretrained(tmp_path)
    assert sorted(load_file(tmp_path / "adapter_model.safetensors")) == NAMES
    for options in ({}, {"is_trainable": True}, {"low_cpu_mem_usage": True}, {"adapter_name": "other"}):
        loaded = PeftModel.from_pretrained(BUILDERS[kind](), tmp_path, **options)
        assert torch.equal(logits(loaded, kind), logits(model, kind))
        assert not any(p.is_meta for p in loaded.parameters())
        assert rank_summary(loaded).parameters == rank_summary(model).parameters


def test_t10_a_missing_factor_is_an_error(tmp_path: Path) -> None:
    """Trap 4.11: the published adapter does not load at all, and says nothing."""
    trained().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    whole = load_file(path)
    for key in whole:
        rest = {k: t for k, t in whole.items() if k != key}
        model, entry = adapted(), key.rpartition(".")[2]
        before = logits(model, "bert")
        with pytest.raises(CheckpointError, match=f"shared_factors.{entry}: expected .* found nothing"):
            set_peft_model_state_dict(model, rest)
        assert torch.equal(logits(model, "bert"), before)
        save_file(rest, path, metadata={"format": "pt"})
        for read in (read_adapter, lambda folder: PeftModel.from_pretrained(BUILDERS["bert"](), folder)):
            with pytest.raises(CheckpointError, match=f"{entry}: expected"):
                read(tmp_path)
    with pytest.raises(CheckpointError, match="shared_factors"):
        set_peft_model_state_dict(adapted(), {})


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    trained("llama").save_pretrained(tmp_path)
    with pytest.raises((CheckpointError, ConfigError)):
        PeftModel.from_pretrained(grouped(), tmp_path)


def test_the_rank_of_the_file_counts(tmp_path: Path) -> None:
    model = trained(r=2)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"r": 5}))
    loaded = PeftModel.from_pretrained(BUILDERS["bert"](), tmp_path)
    assert {d.rank for d in deltas(loaded)} == {2} and torch.equal(logits(loaded, "bert"), logits(model, "bert"))


@pytest.mark.parametrize("stop", [1, 9])
def test_a_run_resumes_as_the_trainer_does(stop: int, tmp_path: Path) -> None:
    straight, first, second = interrupted(lambda: adapted(lora_dropout=0.1), stop, tmp_path)
    assert torch.equal(logits(second, "bert"), logits(straight, "bert"))


# -- one owner ---------------------------------------------------------------------------------------------------------


def test_copies_share_among_themselves_alone() -> None:
    model = trained("grouped")
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(copied, "grouped"), logits(model, "grouped"))
        assert all(d.bank is bank(copied) is not bank(model) for d in deltas(copied))
        before = logits(model, "grouped")
        train(copied, "grouped", stop=2)
        assert torch.equal(logits(model, "grouped"), before) and not torch.equal(logits(copied, "grouped"), before)


def test_moving_and_casting_the_model_moves_the_factors() -> None:
    model = trained().double().to("cpu")
    assert all(p.dtype == torch.float64 for d in deltas(model) for p in d.bank.parameters())
    assert deltas(model)[0].weight().dtype == torch.float64 and list(dict(model.named_parameters())) == list(
        dict(adapted().named_parameters())
    )


def test_adapters_have_factors_each_their_own(tmp_path: Path) -> None:
    """4.10."""
    model, alone = trained(), trained(r=5, seed=7, target_modules=["query", "value", "attention.output.dense"])
    expected = {"default": logits(model, "bert"), "second": logits(alone, "bert")}
    alone.save_pretrained(tmp_path / "alone")
    model.load_adapter(tmp_path / "alone", "second")
    model.save_pretrained(tmp_path / "both")
    again = PeftModel.from_pretrained(BUILDERS["bert"](), tmp_path / "both")
    again.load_adapter(tmp_path / "both" / "second", "second")
    for each in (model, again):
        for name in ("second", "default", "second"):
            each.set_adapter(name)
            assert torch.equal(logits(each, "bert"), expected[name])
        assert {name: bank(each, name).rank for name in expected} == {"default": 3, "second": 5}
        assert [n for n, p in each.named_parameters() if p.requires_grad and ".second." not in n] == []
    with pytest.warns(UserWarning, match="Adapter second was active"):
        model.delete_adapter("second")
    assert torch.equal(logits(model, "bert"), expected["default"])
    assert not [n for n, _ in model.named_parameters() if "second" in n]
    model.delete_adapter("default")
    assert not [n for n in model.state_dict() if "lora" in n or "shared" in n]


def test_disabled_it_adds_nothing() -> None:
    model, base = trained(), logits(BUILDERS["bert"](), "bert")
    with model.disable_adapter():
        assert torch.equal(logits(model, "bert"), base)
    assert not torch.equal(logits(model, "bert"), base)


def test_a_model_with_injected_adapters_trains() -> None:
    base = inject_adapter_in_model(LortaConfig(r=2, target_modules="all-linear", seed=1), BUILDERS["bert"]())
    assert sum(1 for n, _ in base.named_parameters() if "lora_" in n) == 5
    wrapped = get_peft_model(BUILDERS["bert"](), LortaConfig(r=2, target_modules="all-linear", seed=1))
    for model in (base, wrapped):
        train(model, stop=4)
    assert torch.equal(logits(base, "bert"), logits(wrapped, "bert"))

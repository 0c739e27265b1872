"""transformers' own doors, with adapters of ours: the trained function, or an error that names another door."""

import copy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM

from increlora import IncreLoraConfig, export_lora, rank_summary
from increlora.errors import CheckpointError, IncreLoraError
from tests.catalogue import CATALOGUE
from tests.hosts.test_undriven import OPTIONS, TOKENS, adamw, llama, step


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    llama().save_pretrained(folder)
    return folder


def trained(base: Path, row, folder: Path) -> PeftModel:
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), row.config())
    optimizer = adamw(model)
    for _ in range(10):
        step(model, optimizer)
    model.eval().save_pretrained(folder)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(TOKENS).logits


@pytest.mark.parametrize("row", CATALOGUE, ids=str)
def test_both_doors_give_the_trained_function(row, base: Path, tmp_path: Path) -> None:
    wanted = logits(trained(base, row, tmp_path))
    assert not torch.equal(wanted, logits(llama().eval()))
    loaded = llama()
    info = loaded.load_adapter(tmp_path)
    assert torch.equal(logits(loaded), wanted) and not loaded.training and not info.missing_keys
    assert not any(p.requires_grad for name, p in loaded.named_parameters() if "lora_" in name)
    assert loaded.active_adapters() == ["default"] and loaded.peft_config["default"].inference_mode
    whole, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert torch.equal(logits(whole), wanted) and not info["missing_keys"]
    loaded.disable_adapters()
    assert torch.equal(logits(loaded), logits(llama().eval()))
    loaded.enable_adapters()
    loaded.delete_adapter("default")
    assert torch.equal(logits(loaded), logits(llama().eval()))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # as with LoRA
def test_names_subfolders_and_several_adapters(base: Path, tmp_path: Path) -> None:
    one = CATALOGUE[0]
    first = logits(trained(base, one, tmp_path / "inner/one"))
    second = logits(trained(base, one, tmp_path / "two"))
    model = llama()
    model.load_adapter(str(tmp_path / "inner"), adapter_name="one", adapter_kwargs={"subfolder": "one"})
    model.load_adapter(str(tmp_path / "two"), "two")
    model.set_adapter("two")
    assert torch.equal(logits(model), second)
    model.set_adapter("one")
    assert torch.equal(logits(model), first)
    with pytest.raises(ValueError, match="already exists"):
        model.load_adapter(tmp_path / "two", "two")


def begun(folder: Path) -> tuple[PeftModel, torch.optim.Optimizer]:
    """A run after five of its 30 steps, saved."""
    model = get_peft_model(llama(), IncreLoraConfig(**OPTIONS))
    optimizer = adamw(model)
    for _ in range(5):
        step(model, optimizer)
    with pytest.warns(UserWarning, match="a budget of 56"):
        model.save_pretrained(folder)
    return model, optimizer


def test_an_adapter_loaded_to_be_trained_is_driven(base: Path, tmp_path: Path) -> None:
    model, optimizer = begun(tmp_path)
    going_on = llama()
    going_on.load_adapter(tmp_path, is_trainable=True)
    second = adamw(going_on)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(25):
        step(model, optimizer)
        step(going_on, second)
    assert rank_summary(going_on) == rank_summary(model) and rank_summary(model).active == 56
    assert torch.equal(logits(going_on), logits(model))


def test_a_reloaded_model_gives_its_state_dict_to_the_one_that_trains(base: Path, tmp_path: Path) -> None:
    """As sentence-transformers resumes, and fetches its best model: `load_state_dict`, strictly."""
    model, optimizer = begun(tmp_path)
    wanted, ranks = logits(model), rank_summary(model)
    inner = model.get_base_model()
    for _ in range(20):
        step(model, optimizer)
    reloaded = llama()
    reloaded.load_adapter(tmp_path)
    inner.load_state_dict(reloaded.state_dict())
    assert torch.equal(logits(model), wanted) and rank_summary(model) == ranks
    for _ in range(25):
        step(model, optimizer)
    assert rank_summary(model).active == 56


def test_what_cannot_be_loaded_this_way_says_how_it_can(base: Path, tmp_path: Path) -> None:
    row = CATALOGUE[1]
    trained(base, row, tmp_path / "native")
    remedy = "PeftModel.from_pretrained.*increlora.export_lora"
    with pytest.raises(IncreLoraError, match=remedy):  # its modules have other names
        AutoModel.from_pretrained(tmp_path / "native")
    damaged = tmp_path / "damaged"
    shutil.copytree(tmp_path / "native", damaged)
    (damaged / "adapter_model.safetensors").write_bytes(b"x")
    model = llama()
    with pytest.raises(CheckpointError, match=f"damaged.*{remedy}"):
        model.load_adapter(damaged)
    with pytest.raises(CheckpointError, match=remedy):
        model.load_adapter(peft_config=row.config(), adapter_state_dict={})
    assert torch.equal(logits(model.eval()), logits(llama().eval()))


def test_other_adapters_go_through_as_ever(base: Path, tmp_path: Path) -> None:
    export_lora(trained(base, CATALOGUE[1], tmp_path / "native"), tmp_path / "lora")
    loaded, plain = llama(), llama()
    loaded.load_adapter(tmp_path / "lora")
    assert torch.equal(logits(loaded), logits(PeftModel.from_pretrained(plain, tmp_path / "lora")))
    with pytest.raises((ValueError, OSError)):
        llama().load_adapter(tmp_path / "nothing")
    model = llama()
    model.load_adapter(peft_config=LoraConfig(target_modules=["q_proj"]), adapter_state_dict={})
    assert "default" in model.peft_config


def test_without_the_library_the_door_is_shut(base: Path, tmp_path: Path) -> None:
    trained(base, CATALOGUE[1], tmp_path)
    code = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode and "INCRELORA_INCRELORA" in done.stderr

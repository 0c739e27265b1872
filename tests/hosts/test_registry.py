"""One list of methods: configs, peft's tables and an adapter folder without its model follow from it."""

import json
import pickle
from pathlib import Path

import pytest
from peft import PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

import increlora
from increlora import PlainLoraConfig, export_lora
from increlora.errors import CheckpointError
from increlora.hosts.peft import CONFIGS
from increlora.registry import METHODS
from tests.hosts.tiny import Mlp, seeded


def test_every_method_has_a_config_that_peft_knows() -> None:
    assert [config.settings_cls for config in CONFIGS.values()] == list(METHODS.values())
    for name, config_cls in CONFIGS.items():
        assert getattr(increlora, config_cls.__name__) is config_cls
        assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[name]] is config_cls
        config = config_cls(target_modules=["up"])
        assert config.peft_type == name and pickle.loads(pickle.dumps(config)) == config


def test_config_classes_are_found_by_name_and_completed() -> None:
    names = {config_cls.__name__ for config_cls in CONFIGS.values()}
    assert names <= set(increlora.__all__) and names <= set(dir(increlora)) and "export_lora" in dir(increlora)
    with pytest.raises(AttributeError, match="'increlora' has no attribute 'LoraConfig'"):
        increlora.LoraConfig  # noqa: B018


def test_a_preset_takes_options_of_the_method_and_of_lora() -> None:
    for config_cls in CONFIGS.values():
        if hasattr(config_cls.paper_cls, "paper"):
            config = config_cls.paper(4, seed=7, target_modules=["up"], inference_mode=True)
            assert config.settings() == config_cls.paper_cls.paper(4, seed=7)
            assert config.inference_mode and config.target_modules == {"up"}
            assert config_cls.paper(target_modules=["up"]).r == config_cls.paper_cls.paper().r


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = get_peft_model(seeded(Mlp), PlainLoraConfig(r=2, target_modules=["up", "down"]))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_config_says_the_shape_of_every_module(folder: Path) -> None:
    written = json.loads((folder / "adapter_config.json").read_text())
    base = seeded(Mlp)
    assert written["shapes"] == {name: list(base.get_submodule(name).weight.shape[::-1]) for name in ("up", "down")}
    assert written["parameters"] == 2 * sum(map(sum, written["shapes"].values()))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({}, "has no `shapes`"),
        ({"up": [8], "down": [12, 8]}, r"shapes of up: \[8\], expected \[in, out\]"),
        ({"up": [10**9, 12], "down": [12, 8]}, r"shapes of up: \[1000000000, 12\], expected \[in, out\]"),
        ({"up": [8, 10**6], "down": [12, 8]}, r"up: shapes \(8, 1000000\), expected those of lora_A0 \(2, 8\)"),
        ({"up": [8, True], "down": [12, 8]}, "shapes of up"),
        ({"up": [8, 12]}, "'down' is missing in the model"),
        ({"up": [9, 12], "down": [12, 8]}, r"up.lora_A0: expected \(2, 9\), found \(2, 8\)"),
    ],
)
def test_shapes_that_are_missing_or_wrong_are_refused(folder: Path, tmp_path: Path, shapes, message) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"shapes": shapes}))
    with pytest.raises(CheckpointError, match=message):
        export_lora(folder, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    PeftModel.from_pretrained(seeded(Mlp), folder)  # with its model nobody needs to be told

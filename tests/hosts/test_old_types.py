"""Adapter folders that name their type as it was before the prefix INCRELORA_, or have the switches of the published
code beside the other options: every door still opens them.

peft may come to have methods of these names. A folder is ours if its config says so, and peft's otherwise.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, PeftType, get_peft_model
from typer.testing import CliRunner

from increlora import check_export, export_lora
from increlora.errors import CheckpointError
from increlora.export.adapters import read_adapter
from increlora.hosts.peft.config import CONFIGS
from increlora.hosts.peft.old import DEFAULT_SWITCHES, translated
from increlora.workbench.cli.app import app
from tests.hosts.loops import StopAt, adapted, assert_same, state_of, trainer_of
from tests.hosts.tiny import BUILDERS, grow, logits
from tests.switches import departing

OLD = {
    "INCRELORA": "INCRELORA_INCRELORA", "PLAINLORA": "INCRELORA_LORA", "SORA": "INCRELORA_SORA",
    "PRILORA": "INCRELORA_PRILORA", "MELORA": "INCRELORA_MELORA", "MORA": "INCRELORA_MORA",
    "LORTA": "INCRELORA_LORTA", "LORA_MINI": "INCRELORA_LORA_MINI",
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "MELORA": {"minis": 2}, "LORA_MINI": {"inner_in": 4, "inner_out": 4}, "MORA": {"operator": "sharing"},
}  # fmt: skip


def aged(folder: Path) -> Path:
    """The folder, its type by its old name."""
    path = folder / "adapter_config.json"
    raw = json.loads(path.read_text())
    (old,) = (old for old, new in OLD.items() if new == raw["peft_type"])
    path.write_text(json.dumps(raw | {"peft_type": old}))
    return folder


def adapter(old: str) -> PeftModel:
    options = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "seed": 1}
    return get_peft_model(BUILDERS["llama"](), CONFIGS[OLD[old]](**options, **OWN.get(old, {}))).eval()


@pytest.mark.parametrize("old", OLD)
def test_an_old_folder_loads_and_is_saved_by_its_new_name(old: str, tmp_path: Path) -> None:
    model = adapter(old)
    model.save_pretrained(tmp_path / "old")
    expected = logits(model, "llama")
    aged(tmp_path / "old")
    for cls in (PeftConfig, CONFIGS[OLD[old]]):
        config = cls.from_pretrained(str(tmp_path / "old"))
        assert type(config) is CONFIGS[OLD[old]] and config.peft_type is PeftType[OLD[old]]
    loaded = PeftModel.from_pretrained(BUILDERS["llama"](), tmp_path / "old").eval()
    assert torch.equal(logits(loaded, "llama"), expected)
    loaded.load_adapter(str(tmp_path / "old"), "second")
    loaded.set_adapter("second")
    assert torch.equal(logits(loaded, "llama"), expected)
    assert read_adapter(tmp_path / "old").kind == OLD[old]
    loaded.save_pretrained(tmp_path / "new", selected_adapters=["default"])
    assert json.loads((tmp_path / "new" / "adapter_config.json").read_text())["peft_type"] == OLD[old]


SWITCHED: list[tuple[str, dict[str, Any]]] = [
    ("INCRELORA_INCRELORA", {"scaling": "active_rank", "scale_epsilon": 1e-5}),
    ("INCRELORA_INCRELORA", {"reserve": "trained", "newborn": "published"}),
    ("INCRELORA_INCRELORA", {"score_accumulation": "last"}),
    ("INCRELORA_ADALORA", {"scaling": "initial_rank", "selection": "published", "init_r": 5}),
    ("INCRELORA_SORA", {"scaling": "initial_rank", "init_r": 5}),
    ("INCRELORA_SORA", {"operator": "published"}),
]


def with_switches_beside_the_options(folder: Path) -> Path:
    """The folder as it was written when the switches of the published code were options like all others."""
    path = folder / "adapter_config.json"
    raw = json.loads(path.read_text())
    published = raw.pop("published")
    path.write_text(json.dumps(raw | DEFAULT_SWITCHES[CONFIGS[raw["peft_type"]].method_name] | published))
    return folder


@pytest.mark.parametrize(("kind", "options"), SWITCHED)
def test_a_folder_with_switches_of_the_published_code_computes_the_same(
    kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    shared = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "seed": 1}
    model = get_peft_model(BUILDERS["llama"](), departing(CONFIGS[kind], **shared, **options))
    grow(model, "llama", steps=4, total_steps=12)
    model.eval().save_pretrained(tmp_path / "old")
    expected, settings = logits(model, "llama"), model.peft_config["default"].settings()
    config = CONFIGS[kind].from_pretrained(str(with_switches_beside_the_options(tmp_path / "old")))
    assert config.settings() == settings and config.published == model.peft_config["default"].published
    loaded = PeftModel.from_pretrained(BUILDERS["llama"](), tmp_path / "old").eval()
    assert torch.equal(logits(loaded, "llama"), expected)
    export_lora(tmp_path / "old", tmp_path / "lora")
    exported = PeftModel.from_pretrained(BUILDERS["llama"](), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(exported, "llama"), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("old", ["INCRELORA", "SORA"])
def test_a_folder_whose_switches_are_off_is_the_method_itself(old: str, tmp_path: Path) -> None:
    model = adapter(old)
    model.save_pretrained(tmp_path)
    aged(with_switches_beside_the_options(tmp_path))
    config = PeftConfig.from_pretrained(str(tmp_path))
    assert config.published == {} and config.settings() == model.peft_config["default"].settings()
    loaded = PeftModel.from_pretrained(BUILDERS["llama"](), tmp_path).eval()
    assert torch.equal(logits(loaded, "llama"), logits(model, "llama"))


def test_exports_checks_and_the_command_line_read_an_old_folder(tmp_path: Path) -> None:
    model = adapter("SORA")
    model.save_pretrained(tmp_path / "old")
    export_lora(aged(tmp_path / "old"), tmp_path / "lora")
    exported = PeftModel.from_pretrained(BUILDERS["llama"](), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(exported, "llama"), logits(model, "llama"), rtol=1e-5, atol=1e-6)
    assert "INCRELORA_SORA is known after `import increlora`" in str(check_export(tmp_path / "old", engine="peft"))
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "old")])
    assert shown.exit_code == 0 and "INCRELORA_SORA, native" in shown.output


def test_transformers_own_loaders_read_an_old_folder(tmp_path: Path) -> None:
    model = adapter("PLAINLORA")
    model.get_base_model().save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.peft_config["default"].task_type = "CAUSAL_LM"
    model.save_pretrained(tmp_path / "old")
    loaded = AutoPeftModelForCausalLM.from_pretrained(aged(tmp_path / "old"))
    assert loaded.peft_config["default"].peft_type == "INCRELORA_LORA"


def test_the_trainer_resumes_from_an_old_checkpoint(tmp_path: Path) -> None:
    options = {"max_steps": 12, "save_strategy": "steps", "save_steps": 1, "save_total_limit": None, "seed": 3}
    schedule = {"warmup_steps": 2, "interval_steps": 3, "top_h": 3}
    straight, resumed = adapted(**schedule), adapted(**schedule)
    trainer_of(straight, tmp_path / "straight", **options).train()
    trainer_of(adapted(**schedule), tmp_path / "first", callbacks=[StopAt(7)], **options).train()
    checkpoint = aged(tmp_path / "first" / "checkpoint-7")
    trainer_of(resumed, tmp_path / "second", **options).train(resume_from_checkpoint=str(checkpoint))
    assert_same(state_of(resumed), state_of(straight))


@pytest.mark.parametrize("raw", [
    {"peft_type": "MORA", "r": 8, "ranks": {}}, {"peft_type": "LORA", "r": 8}, {"r": 8},
])  # fmt: skip
def test_what_is_not_ours_stays_as_it_is(raw: dict[str, Any]) -> None:
    assert translated(raw) == raw


@pytest.mark.parametrize("kind", ["LORA", "MORA2", ["MORA"], None, 3])
def test_ours_with_a_type_that_is_none_of_ours_is_refused(kind: Any) -> None:
    with pytest.raises(CheckpointError, match="is no method of increlora here"):
        translated({"peft_type": kind, "increlora_version": "0.1", "r": 8})


# A peft that has a method MORA of its own: its config, its model, its place in peft's tables.
PEFT_WITH_MORA = """
import sys, warnings
from dataclasses import dataclass
from peft import LoraConfig, LoraModel, PeftConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method
from torch import nn

member = str.__new__(PeftType, "MORA")
member._name_ = member._value_ = "MORA"
PeftType._member_names_.append("MORA")
PeftType._member_map_["MORA"] = PeftType._value2member_map_["MORA"] = member

@dataclass
class TheirConfig(LoraConfig):
    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType("MORA")

class TheirModel(LoraModel):
    pass

register_peft_method(name="mora", config_cls=TheirConfig, model_cls=TheirModel, prefix="lora_")

warnings.simplefilter("error")
import increlora

base = lambda: nn.Sequential(nn.Linear(8, 8))
theirs, ours = sys.argv[1:]
get_peft_model(base(), TheirConfig(target_modules=["0"])).save_pretrained(theirs)
assert type(PeftConfig.from_pretrained(theirs)) is TheirConfig
loaded = PeftModel.from_pretrained(base(), theirs)
assert type(loaded.base_model) is TheirModel and loaded.peft_type is PeftType("MORA")
assert PEFT_TYPE_TO_CONFIG_MAPPING["MORA"] is TheirConfig and PEFT_TYPE_TO_TUNER_MAPPING["MORA"] is TheirModel

assert type(PeftConfig.from_pretrained(ours)) is increlora.MoraConfig
loaded = PeftModel.from_pretrained(base(), ours)
assert loaded.peft_type == "INCRELORA_MORA" and type(loaded.base_model) is not TheirModel
assert len(increlora.rank_summary(loaded).modules) == 1
"""


def test_peft_may_have_a_method_of_an_old_name(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(8, 8))
    model = get_peft_model(net, CONFIGS["INCRELORA_MORA"](r=2, target_modules=["0"]))
    model.save_pretrained(tmp_path / "ours")
    folders = [str(tmp_path / "theirs"), str(aged(tmp_path / "ours"))]
    found = subprocess.run([sys.executable, "-c", PEFT_WITH_MORA, *folders], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr

"""Our plugins inside axolotl and ms-swift, as far as these install beside us: their own plugin interface and loader,
out of the published wheels (see fetch.py), with stand-ins for what else these modules import."""

import ast
import importlib
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.optim import AdamW
from transformers import Trainer, TrainingArguments

from increlora import rank_summary
from increlora.errors import ConfigError
from tests.hosts.tiny import BUILDERS, inputs_for, logits
from tests.integrations.fetch import PACKAGES, wheel

ROOTS = ("axolotl", "swift", "increlora.integrations")


def stand_in(name: str, **contents: Any) -> None:
    """A module of this name, for what the wheel would import and cannot have here."""
    sys.modules[name] = module = ModuleType(name)
    vars(module).update(contents)


@pytest.fixture
def published() -> Iterator[Callable[[str], Path]]:
    """package → its wheel, importable during the test."""
    found: list[Path] = []

    def add(package: str) -> Path:
        path = wheel(package)
        if path is None:
            pytest.skip(f"{package} is not there: python -m tests.integrations.fetch")
        found.append(path)
        sys.path.insert(0, str(path))
        return path

    yield add
    for path in found:
        sys.path.remove(str(path))
    for name in [n for n in sys.modules if n.startswith(ROOTS)]:
        del sys.modules[name]


class Settings(dict):
    """What axolotl hands to plugins: a table whose missing entries are None."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)


@pytest.fixture
def axolotl(published) -> ModuleType:
    """axolotl's loader of adapters, with our plugin registered."""
    path = published(PACKAGES[0])
    pytest.importorskip("bitsandbytes", reason="axolotl's loader imports bitsandbytes")
    logger = SimpleNamespace(info=print, debug=print, warning=print)
    stand_in("axolotl.utils", __path__=[])
    stand_in("axolotl.utils.dict", DictDefault=Settings)
    stand_in("axolotl.utils.logging", get_logger=lambda name: logger)
    stand_in("axolotl.loaders", __path__=[f"{path}/axolotl/loaders"])
    stand_in("axolotl.loaders.utils", get_linear_embedding_layers=None)
    stand_in("axolotl.telemetry.errors", send_errors=lambda f: f)
    from axolotl.integrations.base import PluginManager

    PluginManager.get_instance().register("increlora.integrations.axolotl.IncreLoraPlugin")
    return importlib.import_module("axolotl.loaders.adapter")


def settings(adapter: str = "increlora", **changes: Any) -> Settings:
    chosen = {"adapter": adapter, "lora_r": 3, "lora_alpha": 6, "lora_dropout": 0.0, "lora_target_linear": True}
    return Settings(chosen | changes)


def assert_grows_to_the_budget(model: PeftModel, folder: Path) -> None:
    batch = {name: value[0] for name, value in inputs_for("llama").items()}
    batch |= {"labels": batch["input_ids"]}
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=16, per_device_train_batch_size=2, report_to="none", save_strategy="no",
        dataloader_pin_memory=False, use_cpu=True,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=[batch] * 32).train()
    summary = rank_summary(model)
    assert summary.active == summary.budget_ranks == 3 * len(summary.modules)


def test_axolotl_makes_an_adapter_that_its_trainer_grows(axolotl, tmp_path: Path) -> None:
    model, config = axolotl.load_adapter(BUILDERS["llama"](), settings(increlora={"grow_by": 1}), "increlora")
    assert (config.r, config.lora_alpha, config.grow_by, config.task_type) == (3, 6, 1, "CAUSAL_LM")
    assert len(rank_summary(model).modules) == 14
    assert_grows_to_the_budget(model, tmp_path)
    model.save_pretrained(tmp_path / "adapter")
    again, _ = axolotl.load_adapter(
        BUILDERS["llama"](), settings(lora_model_dir=str(tmp_path / "adapter")), "increlora", inference=True
    )
    assert torch.equal(logits(again, "llama"), logits(model, "llama")) and not any(
        p.requires_grad for p in again.parameters()
    )


def test_axolotl_knows_all_our_adapters_and_leaves_the_others_alone(axolotl) -> None:
    from axolotl.integrations.base import PluginManager

    manager = PluginManager.get_instance()
    from increlora.integrations.settings import ADAPTERS

    assert set(manager.adapter_capabilities()) == set(ADAPTERS) >= {"increlora", "increlora_sora", "increlora_adalora"}
    (plugin,) = manager.plugins.values()
    assert plugin.load_adapter(BUILDERS["llama"](), settings("qlora")) is None
    module, _, name = plugin.get_input_args().rpartition(".")
    block = getattr(importlib.import_module(module), name)
    assert block(increlora={"top_h": 4}).increlora == {"top_h": 4} and block().increlora is None
    for adapter in set(ADAPTERS) - {"increlora_mora"}:
        chosen = settings(adapter, peft_use_rslora=True)
        none, config = plugin.load_adapter(BUILDERS["llama"](), chosen, config_only=True)
        assert none is None and type(config) is ADAPTERS[adapter] and config.use_rslora


@pytest.mark.parametrize(("changes", "message"), [
    ({"peft_use_dora": True}, "use_dora"),
    ({"lora_target_modules": ["q_proj"]}, "leave out lora_target_modules"),
    ({"increlora": ["top_h"]}, "give a table"),
    ({"increlora": {"top_hh": 4}}, "did you mean 'top_h'"),
])  # fmt: skip
def test_what_axolotl_asks_and_we_cannot_do_is_refused(axolotl, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        axolotl.load_adapter(BUILDERS["llama"](), settings(**changes), "increlora")


@pytest.fixture
def swift(published) -> ModuleType:
    """ms-swift's package of tuners, with ours."""
    path = published(PACKAGES[1])
    stand_in("swift", __path__=[f"{path}/swift"])
    stand_in("swift.model", ModelKeys=object)
    stand_in("swift.utils", find_all_linears=None, deep_getattr=getattr, get_logger=lambda: None,
             get_multimodal_target_regex=None)  # fmt: skip
    stand_in("swift.pipelines", __path__=[])
    stand_in("swift.pipelines.train", __path__=[])
    stand_in("swift.pipelines.train.tuner", get_target_modules=lambda args, model: args.target_modules,
             get_modules_to_save=lambda args, model, task_type: args.modules_to_save)  # fmt: skip
    importlib.import_module("increlora.integrations.ms_swift")
    return importlib.import_module("swift.tuner_plugin")


def arguments(**changes: Any) -> SimpleNamespace:
    chosen = {
        "lora_rank": 3, "lora_alpha": 32.0, "lora_dropout": 0.05, "use_rslora": False, "use_dora": False,
        "init_weights": True, "target_modules": ["q_proj", "v_proj"], "target_parameters": None, "modules_to_save": [],
        "task_type": "causal_lm",
    }  # fmt: skip
    return SimpleNamespace(**chosen | changes)


def test_ms_swift_makes_saves_and_loads_our_adapters(swift, tmp_path: Path) -> None:
    from increlora.integrations.ms_swift import register

    register("increlora", grow_by=1)
    tuner = swift.tuners_map["increlora"]
    model = tuner.prepare_model(arguments(), BUILDERS["llama"]())
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.grow_by) == (3, 32.0, 0.05, 1)
    assert_grows_to_the_budget(model, tmp_path)
    tuner.save_pretrained(model, str(tmp_path / "adapter"), state_dict=None, safe_serialization=True)
    again = tuner.from_pretrained(BUILDERS["llama"](), str(tmp_path / "adapter"), is_trainable=True)
    model.eval(), again.eval()
    assert torch.equal(logits(again, "llama"), logits(model, "llama"))
    AdamW([p for p in again.parameters() if p.requires_grad])


def test_ms_swift_knows_all_our_adapters_beside_its_own(swift) -> None:
    from increlora.integrations.settings import ADAPTERS

    assert set(swift.tuners_map) == set(ADAPTERS) | {"ia3", "lora_llm", "dummy"}
    for name in ("increlora_sora", "increlora_mora", "increlora_adalora"):
        model = swift.tuners_map[name].prepare_model(arguments(), BUILDERS["llama"]())
        assert model.peft_config["default"].peft_type.value.lower() == name
    with pytest.raises(ConfigError, match="use_dora"):
        swift.tuners_map["increlora"].prepare_model(arguments(use_dora=True), BUILDERS["llama"]())


def test_ms_swift_has_what_the_plugin_asks_of_it(published) -> None:
    """The parts that had stand-ins above."""
    path = published(PACKAGES[1])
    found: dict[str, list[str]] = {}
    with zipfile.ZipFile(path) as archive:
        for name in ("pipelines/train/tuner.py", "arguments/tuner_args.py"):
            for node in ast.walk(ast.parse(archive.read(f"swift/{name}"))):
                if isinstance(node, ast.FunctionDef):
                    found[node.name] = [arg.arg for arg in node.args.args]
                elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    found[node.target.id] = []
    assert found["get_target_modules"] == ["args", "model"]
    assert found["get_modules_to_save"] == ["args", "model", "task_type"]
    assert set(vars(arguments())) - {"task_type"} <= set(found)

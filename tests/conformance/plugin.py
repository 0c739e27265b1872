"""A pytest plugin that points peft's own test suite at our config classes.

peft's tests are parametrised by lists at the head of their modules. pytest holds the list objects, so other rows in
them before collection redirect a whole module, and no test is touched.
"""

import copy
import functools
import importlib
import json
import re
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import peft

from increlora.hosts.peft import checkpoint

from .bases import BERT, GPT2, LLAMA, T5, make_bases
from .cases import CLASSES, Selection, lora_rows, options_of

CUSTOM = "test_custom_models"
BASES = {  # the list of base models in each of the other modules, and what we put there
    "test_decoder_models": ("PEFT_DECODER_MODELS_TO_TEST", [LLAMA, GPT2]),
    "test_encoder_decoder_models": ("PEFT_ENCODER_DECODER_MODELS_TO_TEST", [T5]),
    "test_feature_extraction_models": ("PEFT_FEATURE_EXTRACTION_MODELS_TO_TEST", [BERT]),
    "test_seq_classifier": ("PEFT_SEQ_CLS_MODELS_TO_TEST", [BERT]),
}
MODULES = (CUSTOM, *BASES)
OURS = re.compile(rf"(?<![A-Za-z])(?:{'|'.join(CLASSES)})(?![A-Za-z])")


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--outcomes", type=Path, help="write the outcome of every test, and what was left out, to a file")
    parser.addoption("--matching", default="", help="run only tests whose id this regular expression finds")


def pytest_configure(config: Any) -> None:
    config.pluginmanager.register(Referee())  # which calls its pytest_configure, too


class Referee:
    """Redirects, selects and takes notes."""

    def __init__(self) -> None:
        self.selection = Selection()
        self.outcomes: dict[str, tuple[str, str]] = {}

    def pytest_configure(self, config: Any) -> None:
        stub_diffusers()
        peft.PeftModel.add_adapter = with_another_seed(peft.PeftModel.add_adapter)
        if not hasattr(config, "workerinput"):  # of xdist: the first process has made them
            make_bases(Path.cwd())
        for name in {Path(argument.partition("::")[0]).stem for argument in config.args} & set(MODULES):
            suite = importlib.import_module(f"tests.{name}")
            self.redirect_custom(suite) if name == CUSTOM else self.redirect(suite, *BASES[name])
            adapt(suite)
        for name in ("testing_common", "testing_utils"):
            adapt(importlib.import_module(f"tests.{name}"))

    def redirect_custom(self, suite: Any) -> None:
        base = functools.cache(suite.MockTransformerWrapper.from_pretrained)
        options = self.selection.options
        suite.TEST_CASES[:] = [
            (name, model, ours, chosen)
            for ours in CLASSES.values() for name, model, _, kwargs in lora_rows(suite.TEST_CASES)
            if (chosen := options(ours, kwargs, [base(model)]))
        ]  # fmt: skip
        suite.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES[:] = [
            (name, tuner, ours, first, second)
            for ours in CLASSES.values()
            for name, tuner, _, *both in lora_rows(suite.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES)
            for first, second in [[options(ours, kwargs, [suite.MLP()]) for kwargs in both]]
            if first and second
        ]
        suite.MIXED_ADAPTER_TEST_CASES[:] = [
            (f"{name} {ours.__name__}", ours(**first), ours(**second))
            for ours in CLASSES.values() for name, *both in lora_rows(suite.MIXED_ADAPTER_TEST_CASES)
            for first, second in [[options(ours, kwargs, [suite.MLP()]) for kwargs in map(options_of, both)]]
            if first and second
        ]  # fmt: skip
        bare, deep = {"target_modules": ["layers.0.lin0"]}, suite.DeepMLP(size=256)
        takes = self.selection.takes
        suite.ALL_PEFT_CONFIG_CLASSES[:] = [ours for ours in CLASSES.values() if takes(ours, bare, [deep])]

    def redirect(self, suite: Any, models: str, ids: list[str]) -> None:
        tester = next(c for c in vars(suite).values() if getattr(c, "transformers_class", None) is not None)
        bases = [tester.transformers_class.from_pretrained(name) for name in ids]
        getattr(suite, models)[:] = ids
        suite.ALL_CONFIGS[:] = [
            (ours, chosen)
            for ours in CLASSES.values() for _, kwargs in lora_rows(suite.ALL_CONFIGS)
            if (chosen := self.selection.options(ours, kwargs, bases))
        ]  # fmt: skip

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        """Tests of one LoRA case or class only: what peft tests about its own classes stays peft's."""
        wanted = re.compile(config.getoption("--matching"))
        chosen = [item for item in items if OURS.search(item.nodeid) and wanted.search(item.nodeid)]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
        items[:] = chosen

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or not report.passed:
            crash = getattr(report.longrepr, "reprcrash", None)
            message = crash.message if crash else str(report.longrepr or "")
            self.outcomes[report.nodeid] = report.outcome, message.partition("\n")[0]

    def pytest_sessionfinish(self, session: Any) -> None:
        path = session.config.getoption("--outcomes")
        if path and not hasattr(session.config, "workerinput"):  # workers report to the first process
            path.write_text(json.dumps({"outcomes": self.outcomes, "left_out": self.selection.left_out}, indent=1))


# -- what has to be adapted ----------------------------------------------------------------------------------------


def with_another_seed(add_adapter: Any) -> Any:
    """`PeftModel.add_adapter` for tests that make two adapters from one config and want them to differ: ours start
    from the seed in the config, and torch's global one is unheard."""

    @functools.wraps(add_adapter)
    def add(self: Any, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any) -> Any:
        seeds = {other.seed for other in self.peft_config.values() if type(other) in CLASSES.values()}
        if type(peft_config) in CLASSES.values() and peft_config.seed in seeds:
            peft_config = copy.copy(peft_config)
            peft_config.seed = max(seeds) + 1
        return add_adapter(self, adapter_name, peft_config, *args, **kwargs)

    return add


def adapt(module: Any) -> None:
    """Let peft's helpers take our configs for LoRA's, and compare what a checkpoint holds."""
    for name, replacement in (("LoraConfig", LoraLike), ("get_state_dict", get_state_dict)):
        if hasattr(module, name):
            setattr(module, name, replacement)


def get_state_dict(model: Any, unwrap_compiled: bool = True) -> dict[str, Any]:
    """Without what an adapter loaded for inference leaves out: dormant blocks, and the records of a run."""
    model = getattr(model, "_orig_mod", model) if unwrap_compiled else model
    state = model.state_dict()
    for adapter in getattr(model, "peft_config", ()):
        state = checkpoint.compact(model, adapter, state)
    return {key: value for key, value in state.items() if not key.endswith("_extra_state")}


class AsLora(type(peft.LoraConfig)):  # type: ignore[misc]
    """Helpers ask `config_cls == LoraConfig` for an option's name or a skip: what holds of LoRA's holds of ours."""

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is peft.LoraConfig or other in CLASSES.values()

    def __hash__(cls) -> int:
        return hash(peft.LoraConfig)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, peft.LoraConfig)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, peft.LoraConfig)


LoraLike = AsLora("LoraConfig", (peft.LoraConfig,), {"__module__": __name__})


def stub_diffusers() -> None:
    """testing_common imports one class of it, for tests that are not run here."""
    stub = types.ModuleType("diffusers")
    stub.__spec__ = ModuleSpec("diffusers", None)
    stub.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # type: ignore[attr-defined]
    sys.modules.setdefault("diffusers", stub)

"""What static tools, `help` and editors see of the config classes, which are made at import."""

import importlib.util
import inspect
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import increlora
from increlora.hosts.peft.config import CONFIGS, OURS
from increlora.hosts.peft.options import SHARED, WRITTEN

ROOT = Path(__file__).resolve().parents[2]
every_config = pytest.mark.parametrize("config_cls", CONFIGS.values(), ids=lambda c: c.__name__)

RIGHT = """
from typing import assert_type
from increlora import IncreLoraConfig, PlainLoraConfig, attach

config = IncreLoraConfig(r=8, target_modules="all-linear", warmup_steps=0.1, task_type="CAUSAL_LM")
assert_type(config.top_h, int | None)
assert_type(IncreLoraConfig.paper(2, top_h=4, target_modules=["query"]), IncreLoraConfig)
PlainLoraConfig(rank_pattern={"query": 3}).save_pretrained("folder")
"""
WRONG = """
from increlora import IncreLoraConfig, LoraConfig, SoraConfig

IncreLoraConfig(r=8, nonsense=3)
IncreLoraConfig(r="eight")
SoraConfig(use_dora=True)
IncreLoraConfig.paper(2, nonsense=3)
"""
ALONE = """
[mypy]
python_version = 3.11
[mypy-torch.*,peft.*,transformers.*,increlora.*]
follow_imports = skip
[mypy-increlora]
follow_imports = normal
"""  # the stub alone: following the rest takes a minute


@pytest.fixture(scope="module")
def generator() -> Any:
    spec = importlib.util.spec_from_file_location("stub", ROOT / "scripts" / "stub.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_stub_is_fresh(generator) -> None:
    assert generator.STUB.read_text() == generator.stub(), "run `make stub`"


def mypy(source: str, folder: Path) -> list[str]:
    """Lines of mypy's errors."""
    (folder / "user.py").write_text(source)
    (folder / "mypy.ini").write_text(ALONE)
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--no-error-summary", "user.py"]
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={"MYPYPATH": str(ROOT / "src")})
    assert not found.stderr
    return [line for line in found.stdout.splitlines() if ": error: " in line]


def test_mypy_knows_every_option(tmp_path: Path) -> None:
    assert mypy(RIGHT, tmp_path) == []
    expected = [
        'user.py:2: error: Module "increlora" has no attribute "LoraConfig"',
        'user.py:4: error: Unexpected keyword argument "nonsense"',
        'user.py:5: error: Argument "r" to "IncreLoraConfig" has incompatible type "str"; expected "int"',
        'user.py:6: error: Unexpected keyword argument "use_dora"',
        'user.py:7: error: Unexpected keyword argument "nonsense" for "paper"',
    ]
    found = mypy(WRONG, tmp_path)
    assert len(found) == len(expected) and all(line.startswith(e) for line, e in zip(found, expected, strict=True))


@every_config
def test_signature_and_help_tell_every_option(config_cls) -> None:
    shown = inspect.signature(config_cls).parameters
    own = [f.name for f in fields(config_cls.settings_cls)]
    assert list(shown) == [*own, *SHARED]
    assert not set(shown) & (OURS | WRITTEN)
    entries = [line.partition(": ")[0] for line in inspect.getdoc(config_cls).replace("   ", "\n").splitlines()]
    told = {name.strip() for entry in entries for name in entry.split(",")}
    assert set(shown) <= told, set(shown) - told
    config = config_cls()
    for name, option in shown.items():
        assert getattr(config, name) == option.default, name


@every_config
def test_a_config_class_is_where_its_users_find_it(config_cls) -> None:
    assert getattr(increlora, config_cls.__name__) is config_cls and config_cls.__module__ == "increlora"
    if hasattr(config_cls, "paper"):
        assert inspect.getdoc(config_cls.paper).startswith(inspect.getdoc(config_cls.paper_cls.paper))


@every_config
def test_signature_and_help_of_the_preset_tell_its_options_and_switches(config_cls) -> None:
    if not hasattr(config_cls, "paper"):
        return
    shown = inspect.signature(config_cls.paper).parameters
    every = [f.name for f in fields(config_cls.paper_cls)]
    assert list(shown) == [*every, *SHARED] and set(config_cls.switches) < set(every)
    entries = [line.partition(": ")[0] for line in inspect.getdoc(config_cls.paper).replace("   ", "\n").splitlines()]
    told = {name.strip() for entry in entries for name in entry.split(",")}
    assert set(config_cls.switches) <= told, set(config_cls.switches) - told
    values = vars(config_cls.paper().settings())
    assert {name: shown[name].default for name in every} == values

"""Every example runs as a script would, in this process, on a tiny model and a small library to read."""

import json
import runpy
import socket
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from increlora import rank_summary
from increlora.workbench.tasks import stdlib_docs
from tests.examples.tiny import save_bert

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS = 16  # enough for the default schedule: ten events from the second step on


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(autouse=True)
def small_library(monkeypatch):
    """A few files of the standard library are quicker to read than all."""
    root = Path(sysconfig.get_path("stdlib"), "asyncio")
    monkeypatch.setattr(stdlib_docs.sysconfig, "get_path", lambda name: str(root))


def run(name, *words, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    monkeypatch.syspath_prepend(EXAMPLES)
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def loaded(bert, out):
    base = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    return rank_summary(PeftModel.from_pretrained(base, out))


def assert_spent(summary):
    """The budget is used to the last rank, and not everywhere alike."""
    assert summary.active == summary.budget_ranks == 8 * len(summary.modules)
    assert len({m.active for m in summary.modules}) > 1


@pytest.mark.parametrize("name", ("trainer.py", "plain_loop.py", "accelerate_loop.py", "lightning_module.py"))
def test_one_process(name, bert, tmp_path, monkeypatch, capsys):
    if name == "lightning_module.py":
        pytest.importorskip("pytorch_lightning", reason="needs pip install pytorch-lightning")
    run(name, "--model", bert, "--steps", STEPS, "--out", tmp_path, monkeypatch=monkeypatch)
    assert_spent(loaded(bert, tmp_path))
    assert "accuracy" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:Grad strides do not match bucket view strides")  # DDP, of gradients of one column
@pytest.mark.parametrize("name", ("ddp.py", "fsdp2.py"))
def test_a_process_group_of_one(name, bert, tmp_path, monkeypatch, capsys):
    """The real thing, but for the number of processes: tests/distributed has two."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    group = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    for key, value in group.items():
        monkeypatch.setenv(key, str(value))
    try:
        run(name, "--model", bert, "--steps", STEPS, "--out", tmp_path, monkeypatch=monkeypatch)
        assert not dist.is_initialized()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    assert_spent(loaded(bert, tmp_path))


def test_an_interrupted_run_goes_on(bert, tmp_path, monkeypatch, capsys):
    run("resume.py", "--model", bert, "--steps", STEPS, "--out", tmp_path, monkeypatch=monkeypatch)
    interrupted, continued = (line for line in capsys.readouterr().out.splitlines() if "active:" in line)
    budget = loaded(bert, tmp_path / f"checkpoint-{STEPS}").budget_ranks
    assert f"active: {budget} of {budget}" in continued and f"active: {budget} of" not in interrupted


def test_the_small_model_is_the_same_each_time_and_reads_every_text(tmp_path):
    example = runpy.run_path(str(EXAMPLES / "small_llama.py"))
    before = torch.get_rng_state()
    one, two = (example["small_causal"](tmp_path / folder) for folder in ("one", "two"))
    assert torch.equal(torch.get_rng_state(), before)
    weights = Path(one, "model.safetensors")
    assert weights.read_bytes() == Path(two, "model.safetensors").read_bytes()
    weights.write_bytes(b"trained")
    assert example["small_causal"](one) == one and weights.read_bytes() == b"trained"
    tokenizer = AutoTokenizer.from_pretrained(one)
    assert tokenizer.decode(tokenizer("é → f(x)\n").input_ids) == "é → f(x)\n"


def loaded_causal(out):
    base = AutoModelForCausalLM.from_pretrained("runs/small-llama")
    return rank_summary(PeftModel.from_pretrained(base, out))


def test_sft_then_export_and_dpo_from_there(tmp_path, monkeypatch, capsys):
    """As on a fresh clone: no model is named, so a small one is made."""
    monkeypatch.chdir(tmp_path)
    native, lora = Path("runs/sft"), Path("runs/sft-lora")
    run("trl_sft.py", "--steps", STEPS, "--max-length", 48, monkeypatch=monkeypatch)
    assert_spent(loaded_causal(native))
    capsys.readouterr()
    run("export_and_serve.py", "--prompt", "def f(x)", monkeypatch=monkeypatch)
    shown = capsys.readouterr().out
    difference = float(shown.partition("export: ")[2].split()[0])
    assert difference < 1e-5 and f"tuned={lora}" in shown
    run("trl_dpo.py", "--adapter", native, "--steps", 2, "--max-length", 32, monkeypatch=monkeypatch)
    assert loaded_causal("runs/dpo").modules == loaded_causal(native).modules
    assert not Path("runs/dpo/ref").exists()
    assert json.loads((lora / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert any(tensor.any() for key, tensor in load_file(lora / "adapter_model.safetensors").items() if "lora_B" in key)


@pytest.mark.parametrize("words", (("trl_dpo.py", "--max-length", 48), ("trl_grpo.py",)), ids=lambda words: words[0])
def test_trl_from_nothing(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(*words, "--steps", STEPS, "--out", "adapter", monkeypatch=monkeypatch)
    assert_spent(loaded_causal("adapter"))


def test_no_example_is_left_out():
    text = Path(__file__).read_text()
    assert all(f'"{path.name}"' in text for path in EXAMPLES.glob("*.py"))

"""peft's method_comparison with our methods: an experiment folder, its loop, its result.

The loop is that of method_comparison/MetaMathQA/run.py in the order that matters: gradients cleared first, all of the
model's parameters in the optimizer, clipping, step, scheduler; `update_and_allocate` for peft's AdaLoRA alone;
evaluation by generation in between; any exception becomes a cancelled run.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig as PeftAdaLoraConfig
from peft import PeftConfig, get_peft_model
from transformers import get_cosine_schedule_with_warmup

from increlora import IncreLoraConfig, rank_summary
from tests.catalogue import METHODS
from tests.hosts.tiny import BUILDERS

STEPS = 10
IDS = torch.randint(3, 64, (4, 8), generator=torch.Generator().manual_seed(0))


def experiment(folder: Path, config: Any) -> Path:
    """experiments/<method>/<name>, as run.py wants it."""
    place = folder / "experiments" / str(config.peft_type.value).lower() / "llama-tiny"
    config.save_pretrained(place)
    return place


@dataclass
class Outcome:
    """What the result says that depends on our code."""

    status: str
    error: str
    rows: list[dict[str, Any]]
    peft_config: dict[str, Any]
    file_size: int
    trainable: int
    model: Any


def run(place: Path) -> Outcome:
    config = PeftConfig.from_pretrained(place)
    torch.manual_seed(0)
    model = get_peft_model(BUILDERS["llama"](), config, autocast_adapter_dtype=True)
    status, error, rows = train(model, is_adalora=isinstance(config, PeftAdaLoraConfig))
    written = json.loads(json.dumps({k: list(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}))
    model.save_pretrained(place.parent / "saved")
    size = (place.parent / "saved/adapter_model.safetensors").stat().st_size
    return Outcome(status, error, rows, written, size, model.get_nb_trainable_parameters()[0], model)


def train(model: Any, *, is_adalora: bool) -> tuple[str, str, list[dict[str, Any]]]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    scheduler = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=1, num_training_steps=STEPS)
    losses, rows = [], []
    model.train()
    try:
        for step in range(1, STEPS + 1):
            optimizer.zero_grad()
            loss = model(input_ids=IDS, labels=IDS, num_items_in_batch=IDS.numel()).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            if is_adalora:
                model.base_model.update_and_allocate(step)
            losses.append(loss.item())
            if step % 5 == 0:
                rows.append({"step": step, "valid accuracy": accuracy(model), "train loss": sum(losses[-5:]) / 5})
    except Exception as error:
        return "canceled", str(error), rows
    rows.append({"step": step, "test accuracy": accuracy(model), "train loss": sum(losses[-5:]) / 5})
    return "success", "", rows


@torch.inference_mode()
def accuracy(model: Any) -> float:
    model.eval()
    made = model.generate(input_ids=IDS[:, :4], max_new_tokens=4, do_sample=False)
    model.train()
    return float((made[:, 4:] == IDS[:, 4 : made.shape[1]]).float().mean())


@pytest.mark.parametrize("method", METHODS)
def test_an_experiment_folder_of_every_method(method: str, tmp_path: Path) -> None:
    place = experiment(tmp_path, METHODS[method].config(task_type="CAUSAL_LM"))
    result = run(place)
    assert (result.status, result.error) == ("success", "")
    first, second, last = result.rows
    assert last["train loss"] < first["train loss"] and second["step"] == last["step"] == STEPS
    given = json.loads((place / "adapter_config.json").read_text())
    assert result.peft_config["peft_type"] == given["peft_type"] and result.peft_config["r"] == given["r"]
    summary = rank_summary(result.model)
    assert sum(result.peft_config["ranks"].values()) == summary.active  # the live config is what it writes down
    assert result.peft_config["parameters"] == summary.parameters <= result.trainable  # theirs counts capacity
    if METHODS[method].moving:
        assert summary.active == summary.budget_ranks


def test_a_run_of_unknown_length_is_cancelled_with_the_remedy(tmp_path: Path) -> None:
    result = run(
        experiment(tmp_path, IncreLoraConfig(r=3, warmup_steps=0.1, target_modules=METHODS["increlora"].targets))
    )
    assert result.status == "canceled" and "total_steps" in result.error

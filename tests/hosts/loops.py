"""Tiny causal models, their data, and the training loops of the tests beside this file."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from increlora import IncreLoraConfig
from increlora.deltas import Status
from increlora.runtime import Controller, controllers_of
from tests.switches import departing

torch.set_num_threads(1)  # these models are too small to share between threads

STORIES = Path(__file__).parents[2].parent / "shared/models/stories260k"
VOCABULARY, LENGTH, BATCH, STEPS = 64, 12, 4, 24
TARGETS = {"gpt2": ["c_attn", "c_proj", "c_fc"], "llama": "all-linear"}


def tiny_gpt2() -> GPT2LMHeadModel:
    """Two layers, eight Conv1D modules, random weights; always the same."""
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(config)


def tiny_llama() -> LlamaForCausalLM:
    """The pretrained stories260k where it is present, else a Llama of two layers with random weights."""
    if STORIES.exists():
        model = LlamaForCausalLM.from_pretrained(STORIES)
        model.model.layers = model.model.layers[:2]
        model.config.num_hidden_layers, model.config.use_cache = 2, False
        return model
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=LENGTH, use_cache=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


BASES = {"gpt2": tiny_gpt2, "llama": tiny_llama}


def adapted(base: str = "gpt2", **options: Any) -> nn.Module:
    """A base with IncreLoRA of average rank 2 around it."""
    return get_peft_model(
        BASES[base](), departing(IncreLoraConfig, **{"r": 2, "target_modules": TARGETS[base]} | options)
    )


def sequences(count: int = 32) -> Tensor:
    """(count, LENGTH) token ids that count upwards by 1, 2 or 3 from somewhere: easy to learn."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(3, VOCABULARY, (count, 1), generator=generator)
    stride = torch.randint(1, 4, (count, 1), generator=generator)
    return (start + stride * torch.arange(LENGTH)) % (VOCABULARY - 3) + 3


def rows(count: int = 32) -> Dataset:
    ids = sequences(count).tolist()
    return Dataset.from_list([{"input_ids": row, "labels": row, "attention_mask": [1] * LENGTH} for row in ids])


def batches(steps: int, size: int = BATCH) -> Iterator[Tensor]:
    """`steps` batches of ids, over and over the same rows."""
    ids = sequences()
    for step in range(steps):
        yield ids[torch.arange(step * size, (step + 1) * size) % len(ids)]


@torch.no_grad()
def loss_of(model: nn.Module) -> float:
    """Mean loss over all rows."""
    ids = sequences()
    return float(model(input_ids=ids, labels=ids).loss)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def controller_of(model: nn.Module) -> Controller:
    (controller,) = controllers_of(model)
    return controller


def arguments(folder: Any, **options: Any) -> TrainingArguments:
    """STEPS steps on the CPU, nothing written but what is asked for."""
    chosen = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": BATCH, "learning_rate": 1e-2,
        "use_cpu": True, "report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True,
        "dataloader_pin_memory": False,
    } | options  # fmt: skip
    return TrainingArguments(**chosen)


def trainer_of(model: nn.Module, folder: Any, *, callbacks: Any = None, **options: Any) -> Trainer:
    return Trainer(
        model=model, args=arguments(folder, **options), train_dataset=rows(), eval_dataset=rows(8), callbacks=callbacks
    )


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything a resumed run must share with the straight one: live parameters, block states, averages, ranks."""
    controller = controller_of(model)
    live = {
        f"{name}.{letter}{i}": p.detach().clone()
        for name, delta in zip(controller.names, controller.deltas)
        for i in delta.indices(Status.ACTIVE, Status.RESERVE)
        for letter, p in delta.block(i).items()
    }
    return {
        "live": live,
        "status": {n: list(map(int, d.state.status)) for n, d in zip(controller.names, controller.deltas)},
        "born": {n: (list(d.state.born), list(d.state.reserved)) for n, d in zip(controller.names, controller.deltas)},
        "averages": [values.clone() for values in controller.rules[0].statistics()],
        "step": controller.step,
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Bitwise equality of two `state_of`."""
    for part in ("step", "status", "born"):
        assert found[part] == expected[part]
    assert found["live"].keys() == expected["live"].keys()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def assert_spent(model: nn.Module) -> None:
    """The budget is used exactly, and not everywhere alike."""
    controller = controller_of(model)
    assert sum(controller.ranks.values()) == controller.method.budget.ranks
    assert len(set(controller.ranks.values())) >= 2


class StopAt(TrainerCallback):
    """Interrupts a run after a step, as a crash would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step

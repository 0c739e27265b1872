"""What peft's AdaLoRA is known to get wrong in loops, losses and adapters, shown to be right in ours. The page of the
method lists all its known defects and the test for each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import Trainer

from increlora import AdaLoraConfig, rank_summary
from increlora.decide.penalties import orthogonality
from increlora.runtime import controllers_of
from increlora.runtime.penalty import components
from tests.hosts.bases import BUILDERS, Mlp, inputs_for, seeded
from tests.hosts.loops import BATCH, StopAt, arguments, controller_of, rows, tiny_gpt2, trainable
from tests.switches import departing

STEPS, WEIGHT = 12, 0.5
SCHEDULE = {"r": 2, "warmup_steps": 1, "interval_steps": 3, "settle_steps": 5, "total_steps": STEPS}


def train(model: nn.Module, kind: str, *, steps: int = STEPS) -> None:
    """A loop that has never heard of AdaLoRA."""
    optimizer = AdamW(trainable(model), lr=0.05)
    for step in range(steps):
        output = model(**inputs_for(kind))
        output = output if isinstance(output, Tensor) else output.logits
        target = torch.randn(output.shape, generator=torch.Generator().manual_seed(step))
        nn.functional.mse_loss(output, target).backward()
        optimizer.step()
        optimizer.zero_grad()


# -- the penalty, whatever becomes of the loss -------------------------------------------------------------------------


def moved_by_the_penalty(
    folder: Path, *, place: str = "after_clipping", loss: Callable[..., Tensor] | None = None,
    output: type | None = None, **options: Any,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """How much less A and B of all modules are after the Trainer's first step (SGD, learning rate 1) with the penalty
    than without; and the gradient of the penalty by autograd."""
    ends, expected = [], []
    for weight in (0.0, WEIGHT):
        config = departing(AdaLoraConfig, r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True,
                           orthogonality=weight, penalty_place=place, start="published")  # fmt: skip
        model = get_peft_model(tiny_gpt2(), config).double()
        model.register_forward_hook(lambda module, args, out: out if output is None else output(out.items()))
        deltas = controller_of(model).deltas
        parts = [p for delta in deltas for p in (delta.lora_A0, delta.lora_B0)]
        if weight:
            expected = torch.autograd.grad(weight * orthogonality(components(deltas)), parts)
        settings = arguments(folder, max_steps=8, learning_rate=1.0, optim="sgd", lr_scheduler_type="constant",
                             max_grad_norm=0.0, **options)  # fmt: skip
        Trainer(model=model, args=settings, train_dataset=rows(), callbacks=[StopAt(1)], compute_loss_func=loss).train()
        ends.append([p.detach() for p in parts])
    return [one - other for one, other in zip(*ends, strict=True)], list(expected)


@pytest.mark.parametrize("place", ["after_clipping", "before_clipping"])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_the_trainers_accumulation_does_not_multiply_the_penalty(accumulation: int, place: str, tmp_path: Path) -> None:
    moved, expected = moved_by_the_penalty(
        tmp_path, place=place, gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=BATCH // accumulation,
    )  # fmt: skip
    torch.testing.assert_close(moved, expected, rtol=1e-9, atol=1e-12)


def own_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return outputs["logits"].square().mean()


@pytest.mark.parametrize("options", [
    {"label_smoothing_factor": 0.1}, {"loss": own_loss}, {"output": dict},
], ids=["label smoothing", "own loss", "dicts"])  # fmt: skip
def test_the_penalty_does_not_need_a_loss_in_the_models_output(options: dict[str, Any], tmp_path: Path) -> None:
    moved, expected = moved_by_the_penalty(tmp_path, **options)
    torch.testing.assert_close(moved, expected, rtol=1e-9, atol=1e-12)


# -- adapters that nobody calls ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["inject_adapter_in_model", "add_adapter"])
def test_adapters_without_a_peft_model_are_pruned_too(how: str) -> None:
    if how == "add_adapter":
        kind, model = "llama", BUILDERS["llama"]()
        model.add_adapter(AdaLoraConfig(**SCHEDULE, target_modules=["q_proj", "up_proj"]))
    else:
        kind = "mlp"
        model = inject_adapter_in_model(AdaLoraConfig(**SCHEDULE, target_modules=["up", "down"]), BUILDERS[kind]())
    train(model, kind)
    ranks = rank_summary(model)
    assert ranks.active == 2 * len(ranks.modules) and controller_of(model).rules[0].done


def test_two_adapters_are_trained_and_pruned_at_once() -> None:
    model = get_peft_model(BUILDERS["mlp"](), AdaLoraConfig(**SCHEDULE, target_modules=["up", "down"]))
    model.add_adapter("other", AdaLoraConfig(**SCHEDULE | {"r": 1, "seed": 3}, target_modules=["up", "down", "head"]))
    model.base_model.set_adapter(["default", "other"])
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    train(model, "mlp")
    assert (rank_summary(model, "default").active, rank_summary(model, "other").active) == (4, 3)
    assert [c.step for c in controllers_of(model)] == [STEPS, STEPS]
    assert {n.split(".lora_delta.")[1].split(".")[0] for n in before} == {"default", "other"}
    assert not any(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


class Branches(Mlp):
    """An Mlp with a branch that its forward pass leaves out, and a head of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(8, 8)
        self.head = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3))


def test_a_branch_without_gradients_stops_nothing() -> None:
    model = get_peft_model(
        seeded(Branches), AdaLoraConfig(**SCHEDULE, total_ranks=6, target_modules=["up", "down", "unused"])
    )
    unused = model.base_model.model.unused.delta("default")
    before = {n: p.detach().clone() for n, p in unused.named_parameters() if n != "lora_E0"}
    train(model, "mlp")
    ranks = {m.module: m.active for m in rank_summary(model).modules}
    assert sum(ranks.values()) == 6 and ranks["unused"] == 0  # of no use, so its ranks are the first to go
    assert all(torch.equal(p, before[n]) for n, p in unused.named_parameters() if n in before)


def test_what_is_saved_whole_is_no_candidate() -> None:
    """Neither for the first adapter nor for a second, which finds the copies that the first has made."""
    options = SCHEDULE | {"target_modules": ["up", "down", "0"], "modules_to_save": ["head"]}
    model = get_peft_model(seeded(Branches), AdaLoraConfig(**options))
    for name in ("default", "other"):
        if name == "other":
            model.add_adapter(name, AdaLoraConfig(**options))
            model.set_adapter(name)
        train(model, "mlp")
        ranks = rank_summary(model, name)
        assert {m.module for m in ranks.modules} == {"up", "down"} and ranks.active == 4
    trained, first = model.base_model.model.head.modules_to_save["other"][0], seeded(Branches).head[0]
    assert not torch.equal(trained.weight, first.weight)


# -- state, names, merging ---------------------------------------------------------------------------------------------


def test_the_states_of_blocks_are_the_only_buffers_and_ddp_leaves_them_alone() -> None:
    """Averages in buffers would stay behind on another device, and be broadcast in every forward pass."""
    model = get_peft_model(BUILDERS["mlp"](), AdaLoraConfig(**SCHEDULE, target_modules=["up", "down"]))
    train(model, "mlp", steps=4)
    buffers = [name for name, _ in model.named_buffers()]
    assert {name.rpartition(".")[2] for name in buffers} == {"lora_state"}
    assert {*buffers} <= {*model._ddp_params_and_buffers_to_ignore}
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {
        "lora_A0", "lora_E0", "lora_B0",
    }  # fmt: skip


@pytest.mark.parametrize("steps", [5, STEPS])
def test_merging_has_an_effect_and_it_is_the_adapters(steps: int) -> None:
    model = get_peft_model(BUILDERS["mlp"](), AdaLoraConfig(**SCHEDULE, target_modules=["up", "down"]))
    train(model, "mlp", steps=steps)
    adapted, base = model.eval()(**inputs_for("mlp")).detach(), BUILDERS["mlp"]()(**inputs_for("mlp")).detach()
    merged = model.merge_and_unload()
    assert type(merged.up) is nn.Linear and not torch.allclose(adapted, base, atol=1e-2)
    torch.testing.assert_close(merged(**inputs_for("mlp")).detach(), adapted, rtol=1e-5, atol=1e-6)

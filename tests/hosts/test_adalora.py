"""AdaLoRA on real architectures: what peft's own AdaLoRA is known to get wrong about losses, files, resuming and
export, shown to be right here."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel, convert_to_lora, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import AdamW

from increlora import AdaLoraConfig, attach, export_lora, rank_summary
from increlora.errors import CheckpointError
from tests.hosts.stock import assert_exports_compute_the_same
from tests.hosts.tiny import BUILDERS, adapter_only, inputs_for, logits
from tests.hosts.training import STEPS, deltas, interrupted, train

TARGETS = {"bert": ["query", "value", "dense"], "gpt2": ["c_attn", "c_proj"], "mlp": ["up", "down"]}
LABELS = torch.tensor([0, 1])


def adapted(kind: str = "bert", **options: object) -> PeftModel:
    """2 ranks of 3 are left after the cuts at 3, 6 and 9."""
    chosen = {"r": 2, "warmup_steps": 2, "interval_steps": 3, "settle_steps": 5, "total_steps": STEPS,
              "target_modules": TARGETS[kind], "fan_in_fan_out": kind == "gpt2", "seed": 2} | options  # fmt: skip
    return get_peft_model(BUILDERS[kind](), AdaLoraConfig(**chosen))


def emptied(kind: str) -> PeftModel:
    """A trained model whose first module has lost all its ranks: e is held at 0, so nothing in it matters."""
    model = adapted(kind, total_ranks=2 * len(deltas(adapted(kind))))
    first = deltas(model)[0]
    with torch.no_grad():
        first.block(0)["E"].zero_()
    optimizer = AdamW([p for p in adapter_only(model) if p is not first.block(0)["E"]], lr=0.05)
    optimizer.add_param_group({"params": [first.block(0)["E"]], "lr": 0.0})
    train(model, kind, optimizer=optimizer)
    assert first.rank == 0 and rank_summary(model).active == rank_summary(model).budget_ranks
    return model


# -- losses ------------------------------------------------------------------------------------------------------------


def test_t12_the_loss_is_the_tasks_alone_in_training_and_evaluation() -> None:
    model = adapted(orthogonality=100.0, task_type="SEQ_CLS")
    for mode in (model.train(), model.eval()):
        output = mode(**inputs_for("bert"), labels=LABELS)
        assert torch.equal(output.loss, nn.functional.cross_entropy(output.logits, LABELS))


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
def test_the_penalty_does_not_depend_on_a_task_type(task_type: str | None) -> None:
    with_penalty = adapted(orthogonality=1.0, task_type=task_type)
    without = adapted(orthogonality=0.0, task_type=task_type)
    for model in (with_penalty, without):
        train(model, stop=2)
    moved = deltas(with_penalty)[0].lora_A0 - deltas(without)[0].lora_A0
    assert moved.abs().max() > 1e-3


def test_a_reloaded_adapter_takes_labels(tmp_path: Path) -> None:
    model = adapted(orthogonality=0.1, task_type="SEQ_CLS")
    train(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(BUILDERS["bert"](), tmp_path)
    output = loaded(**inputs_for("bert"), labels=LABELS)
    assert torch.equal(output.loss, nn.functional.cross_entropy(output.logits, LABELS))


# -- files and resuming ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [5, 8, 11])
def test_a_checkpoint_within_the_reduction_loses_nothing(stop: int, tmp_path: Path) -> None:
    """Between cuts all triplets are alive: the reloaded function is the same, and so is the rest of the run."""
    straight, first, second = interrupted(lambda: adapted(), stop, tmp_path)
    inference = PeftModel.from_pretrained(BUILDERS["bert"](), tmp_path)
    assert torch.equal(logits(inference, "bert"), logits(first, "bert"))
    assert [d.rank for d in deltas(inference)] == [d.rank for d in deltas(first)]
    assert not any(d.statistics for d in deltas(inference))
    assert torch.equal(logits(second, "bert"), logits(straight, "bert"))
    assert second.peft_config["default"].ranks == straight.peft_config["default"].ranks


def test_a_file_holds_averages_only_while_they_can_matter(tmp_path: Path) -> None:
    model = adapted()
    optimizer = train(model, stop=8)
    model.save_pretrained(tmp_path / "early")
    train(model, start=8, optimizer=optimizer)
    model.save_pretrained(tmp_path / "late")
    sizes = {
        when: max(
            len(v) for k, v in load_file(tmp_path / when / "adapter_model.safetensors").items() if "lora_stat" in k
        )
        for when in ("early", "late")
    }
    assert sizes["late"] < 28 and sizes["early"] > 2 * 3 * (16 + 16)
    again = PeftModel.from_pretrained(BUILDERS["bert"](), tmp_path / "late", is_trainable=True)
    kept = [d.state.kept for d in deltas(again)]
    train(again)  # another run on what has settled
    assert kept == [d.state.kept for d in deltas(again)] == [d.state.kept for d in deltas(model)]


def test_another_methods_file_and_a_damaged_one_are_refused(tmp_path: Path) -> None:
    model = adapted("mlp")
    train(model, "mlp", stop=5)
    model.save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    whole, key = load_file(weights), "base_model.model.up.lora_state"
    plain = torch.tensor([1.0, 0, 0, 0, 2, -1, -1], dtype=torch.float64)
    for state, message in ((whole[key][:11], "up.lora_state.*damaged"), (plain, "up.lora_state does not say which")):
        save_file(whole | {key: state.clone()}, weights, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            PeftModel.from_pretrained(BUILDERS["mlp"](), tmp_path, is_trainable=True)


# -- modules without rank, export --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_t10_an_export_computes_the_same_in_stock_peft_rank_0_included(kind: str, tmp_path: Path) -> None:
    model = emptied(kind)
    expected = logits(model, kind)
    model.save_pretrained(tmp_path / "native")
    for trainable in (True, False):
        reloaded = PeftModel.from_pretrained(BUILDERS[kind](), tmp_path / "native", is_trainable=trainable)
        assert torch.equal(logits(reloaded, kind), expected)
        assert [d.rank for d in deltas(reloaded)] == [d.rank for d in deltas(model)]
    assert_exports_compute_the_same(model, kind, tmp_path / "native", {d.name: d.rank for d in deltas(model)})


def test_an_export_between_cuts_is_that_of_the_running_model(tmp_path: Path) -> None:
    model = adapted()
    train(model, stop=5)  # all triplets are alive again
    assert all(sum(bool(e) for e in d.block(0)["E"]) == 3 for d in deltas(model))
    stock = PeftModel.from_pretrained(BUILDERS["bert"](), export_lora(model, tmp_path / "lora"))
    torch.testing.assert_close(logits(stock, "bert"), logits(model, "bert"), rtol=0, atol=1e-6)


def test_pefts_own_conversion_works_too() -> None:
    model = emptied("bert")
    config, state = convert_to_lora(model, rank=3)
    lora = get_peft_model(BUILDERS["bert"](), config)
    set_peft_model_state_dict(lora, state)
    torch.testing.assert_close(logits(lora, "bert"), logits(model, "bert"), rtol=0, atol=1e-5)


def test_nobody_has_to_call_an_allocator() -> None:
    model = adapted()
    controller = attach(model, optimizer := AdamW(adapter_only(model), lr=0.05))
    train(model, optimizer=optimizer)
    assert [event.step for event in controller.events if event.kind == "finish"] == [9] * len(controller.names)
    assert rank_summary(model).active == 2 * len(controller.names)
    assert model.peft_config["default"].ranks == controller.ranks

"""SoRA on real architectures: files, resuming as the Trainer does, modules without rank, and export."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel, convert_to_lora, get_peft_model, set_peft_model_state_dict
from torch import nn
from torch.optim import AdamW

from increlora import SoraConfig, export_lora, rank_summary
from tests.hosts.stock import assert_exports_compute_the_same
from tests.hosts.test_adalora import LABELS, TARGETS
from tests.hosts.tiny import BUILDERS, adapter_only, inputs_for, logits
from tests.hosts.training import STEPS, deltas, interrupted, train


def adapted(kind: str = "bert", **options: object) -> PeftModel:
    """2 ranks of 3 are left after the cuts at 3, 6 and 9."""
    chosen = {"r": 2, "warmup_steps": 2, "interval_steps": 3, "settle_steps": 5, "total_steps": STEPS,
              "target_modules": TARGETS[kind], "fan_in_fan_out": kind == "gpt2", "seed": 2} | options  # fmt: skip
    return get_peft_model(BUILDERS[kind](), SoraConfig(**chosen))


def emptied(kind: str) -> PeftModel:
    """A trained model whose first module has no gate left."""
    model = adapted(kind, total_ranks=2 * len(deltas(adapted(kind))), close_after=1)
    gate = deltas(model)[0].block(0)["E"]
    with torch.no_grad():
        gate.zero_()
    optimizer = AdamW([p for p in adapter_only(model) if p is not gate], lr=0.05)
    optimizer.add_param_group({"params": [gate], "lr": 0.0})
    train(model, kind, optimizer=optimizer)
    assert deltas(model)[0].rank == 0 and rank_summary(model).active == rank_summary(model).budget_ranks
    return model


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_an_export_computes_the_same_in_stock_peft_rank_0_included(kind: str, tmp_path: Path) -> None:
    model = emptied(kind)
    expected = logits(model, kind)
    model.save_pretrained(tmp_path / "native")
    for trainable in (True, False):
        reloaded = PeftModel.from_pretrained(BUILDERS[kind](), tmp_path / "native", is_trainable=trainable)
        assert torch.equal(logits(reloaded, kind), expected)
        assert [d.rank for d in deltas(reloaded)] == [d.rank for d in deltas(model)]
        assert [d.state.closed for d in deltas(reloaded)] == [d.state.closed for d in deltas(model)]
    assert_exports_compute_the_same(model, kind, tmp_path / "native", {d.name: d.rank for d in deltas(model)})


def test_an_export_between_cuts_is_that_of_the_running_model(tmp_path: Path) -> None:
    model = adapted(threshold=0.02)
    train(model, stop=5)
    stock = PeftModel.from_pretrained(BUILDERS["bert"](), export_lora(model, tmp_path / "lora"))
    torch.testing.assert_close(logits(stock, "bert"), logits(model, "bert"), rtol=0, atol=1e-6)


def test_pefts_own_conversion_works_too() -> None:
    model = emptied("bert")
    config, state = convert_to_lora(model, rank=3)
    lora = get_peft_model(BUILDERS["bert"](), config)
    set_peft_model_state_dict(lora, state)
    torch.testing.assert_close(logits(lora, "bert"), logits(model, "bert"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"threshold": 0.05, "close_after": 1}])
@pytest.mark.parametrize("stop", [5, 8, 11])
def test_a_run_resumes_as_the_trainer_does(stop: int, options: dict, tmp_path: Path) -> None:
    straight, first, second = interrupted(lambda: adapted(**options), stop, tmp_path)
    assert torch.equal(logits(second, "bert"), logits(straight, "bert"))
    assert second.peft_config["default"].ranks == straight.peft_config["default"].ranks


def test_the_penalty_is_no_part_of_the_loss_and_a_reloaded_adapter_takes_labels(tmp_path: Path) -> None:
    model = adapted(gate_penalty=100.0, task_type="SEQ_CLS")
    train(model)
    model.save_pretrained(tmp_path)
    for mode in (model.train(), model.eval(), PeftModel.from_pretrained(BUILDERS["bert"](), tmp_path)):
        output = mode(**inputs_for("bert"), labels=LABELS)
        assert torch.equal(output.loss, nn.functional.cross_entropy(output.logits, LABELS))


def test_the_penalty_pulls_every_gate_towards_zero() -> None:
    with_penalty, without = adapted(gate_penalty=50.0), adapted()
    for model in (with_penalty, without):
        train(model, stop=2)  # within the warm-up
    sizes = [sum(float(d.block(0)["E"].detach().abs().sum()) for d in deltas(m)) for m in (with_penalty, without)]
    assert sizes[0] < sizes[1] - 1e-2

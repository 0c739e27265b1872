"""PRILoRA on real architectures: ramps by the names of their modules, shared inputs, files, merging, exact exports."""

import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from increlora import PriLoraConfig, rank_summary
from increlora.deltas import BlockDelta
from increlora.errors import BudgetError
from increlora.hosts.peft.layer import AdapterLayer
from tests.hosts import training
from tests.hosts.stock import assert_exports_compute_the_same
from tests.hosts.tiny import BUILDERS, logits
from tests.hosts.training import interrupted
from tests.reference.loop import controller_of

STEPS = 9
TARGETS = {
    "bert": ["query", "key", "value", "dense"], "gpt2": ["c_attn", "c_proj"], "llama": "all-linear",
    "t5": ["q", "k", "v", "o", "wi", "wo"], "mlp": ["up", "down"],
}  # fmt: skip
KINDS = ["bert", "gpt2", "llama", "t5"]


def adapted(kind: str = "bert", **options: object) -> PeftModel:
    """Prunings after steps 3, 6 and 9."""
    chosen = {"r": 3, "first_r": 2.0, "interval_steps": 3, "total_steps": STEPS, "target_modules": TARGETS[kind],
              "fan_in_fan_out": kind == "gpt2", "seed": 2} | options  # fmt: skip
    return get_peft_model(BUILDERS[kind](), PriLoraConfig(**chosen))


train = partial(training.train, lr=0.02, stop=STEPS)


def deltas(model: nn.Module) -> dict[str, BlockDelta]:
    found = [m.delta(m.active_adapters[0]) for m in model.modules() if isinstance(m, AdapterLayer)]
    return {delta.name: delta for delta in found}


# -- ranks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "layer"), [("bert", "encoder.layer"), ("gpt2", "transformer.h"), ("llama", "layers")])
def test_ranks_rise_from_layer_to_layer(kind: str, layer: str) -> None:
    model = adapted(kind)
    for name, delta in deltas(model).items():
        assert delta.rank == (2 if f"{layer}.0." in name else 4 if f"{layer}.1." in name else 3), name
    summary = rank_summary(model)
    assert summary.active == summary.budget_ranks and summary.parameters == summary.budget_parameters


def test_each_stack_of_an_encoder_decoder_has_its_ramp() -> None:
    for name, delta in deltas(adapted("t5")).items():
        assert delta.rank == (2 if "coder.block.0." in name else 4), name


def test_one_ramp_runs_through_encoder_and_decoder() -> None:
    model = adapted("t5", r=4, ramp="whole")
    found: dict[str, set[int]] = {}
    for name, delta in deltas(model).items():
        found.setdefault(name.partition(".layer.")[0], set()).add(delta.rank)
    order = [min(found[f"{stack}.block.{i}"]) for stack in ("encoder", "decoder") for i in range(2)]
    assert order == sorted(order) and order[0] < order[-1] and all(max(r) - min(r) <= 1 for r in found.values())
    summary = rank_summary(model)
    assert summary.active == summary.budget_ranks and summary.parameters <= summary.budget_parameters


def test_layers_that_are_left_out_do_not_count() -> None:
    model = adapted("bert", layers_to_transform=[1])
    assert {delta.rank for delta in deltas(model).values()} == {3}


def test_a_budget_that_does_not_fit_leaves_the_model_as_it_was() -> None:
    base = BUILDERS["mlp"]()
    with pytest.raises(BudgetError, match=r"hold 3 to 19.*change `r` or `total_ranks`"):
        get_peft_model(base, PriLoraConfig(r=9, target_modules=["up", "down", "head"]))
    assert type(base.up) is nn.Linear


# -- inputs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_modules_that_read_one_tensor_share_a_reduction(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = adapted(kind), []
    reduce = torch.linalg.vector_norm
    monkeypatch.setattr(torch.linalg, "vector_norm", lambda *a, **k: calls.append(1) or reduce(*a, **k))
    train(model, kind, stop=1)
    inside = sum(".0." in name or ".1." in name for name in deltas(model))
    assert len(calls) == (len(deltas(model)) - inside) + 2 * 4  # attention in, out, feed-forward in, out
    query, key = (next(d for n, d in deltas(model).items() if word in n) for word in ("q", "k"))
    assert torch.equal(query.statistics[0], key.statistics[0])


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_counts_every_token_once(reentrant: bool) -> None:
    plain, saving = adapted("llama"), adapted("llama")
    saving.enable_input_require_grads()
    with warnings.catch_warnings():  # transformers 5.23 has renamed it
        warnings.simplefilter("ignore", FutureWarning)
        saving.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    train(plain.train(), "llama", stop=4), train(saving.train(), "llama", stop=4)
    for name, delta in deltas(saving).items():
        torch.testing.assert_close(delta.statistics[0], deltas(plain)[name].statistics[0], rtol=1e-4, atol=1e-5)
        assert torch.equal(delta.lora_A0 == 0, deltas(plain)[name].lora_A0 == 0)


# -- files and exports -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [2, 3, 7])
def test_a_checkpoint_resumes_bitwise(stop: int, tmp_path: Path) -> None:
    straight, first, second = interrupted(lambda: adapted(), stop, tmp_path, steps=STEPS, lr=0.02)
    inference = PeftModel.from_pretrained(BUILDERS["bert"](), tmp_path, adapter_name="other")
    assert torch.equal(logits(inference, "bert"), logits(first, "bert"))
    assert [d.rank for d in deltas(inference).values()] == [d.rank for d in deltas(first).values()]
    assert not any(d.statistics for d in deltas(inference).values())
    assert torch.equal(logits(second, "bert"), logits(straight, "bert"))
    pairs = zip(deltas(second).values(), deltas(straight).values(), strict=True)
    assert all(torch.equal(a.statistics[0], b.statistics[0]) for a, b in pairs)


def test_a_file_holds_statistics_only_while_they_can_matter(tmp_path: Path) -> None:
    model = adapted()
    optimizer = train(model, stop=8)
    model.save_pretrained(tmp_path / "early")
    train(model, start=8, optimizer=optimizer)
    model.save_pretrained(tmp_path / "late")
    longest = {
        when: max(
            len(v) for k, v in load_file(tmp_path / when / "adapter_model.safetensors").items() if "lora_stat" in k
        )
        for when in ("early", "late")
    }
    assert longest["late"] == 17 < longest["early"]
    again = PeftModel.from_pretrained(BUILDERS["bert"](), tmp_path / "late", is_trainable=True)
    train(again)
    assert any((d.lora_A0 == 0).any() for d in deltas(again).values())  # a new run prunes again


def test_the_tensors_of_a_file_say_the_ranks(tmp_path: Path) -> None:
    """Also where the config that loads them would give others, and the scale follows."""
    model = adapted()
    train(model)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace('"first_r": 2.0', '"first_r": 3.0'))
    other = PeftModel.from_pretrained(BUILDERS["bert"](), tmp_path)
    assert torch.equal(logits(other, "bert"), logits(model, "bert"))
    assert {d.rank for d in deltas(other).values()} == {2, 3, 4}


@pytest.mark.parametrize("scaling", ["per_rank", "constant"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_export_computes_the_same_in_stock_peft(kind: str, scaling: str, tmp_path: Path) -> None:
    model = adapted(kind, scaling=scaling)
    train(model, kind)
    expected = logits(model, kind)
    assert any((d.lora_A0 == 0).any() for d in deltas(model).values())
    model.save_pretrained(tmp_path / "native")
    assert_exports_compute_the_same(model, kind, tmp_path / "native", {n: d.rank for n, d in deltas(model).items()})
    torch.testing.assert_close(logits(model.merge_and_unload(), kind), expected, rtol=0, atol=1e-5)


def test_nobody_has_to_call_anything() -> None:
    model = adapted()
    train(model)
    controller = controller_of(model)
    assert controller.step == STEPS
    assert [(event.kind, event.step) for event in controller.events] == [("finish", 8)] * len(controller.names)
    assert model.peft_config["default"].ranks == controller.ranks

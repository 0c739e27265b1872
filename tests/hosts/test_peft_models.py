"""An adapter of ours in peft: the calls a LoRA user knows, on models of every kind."""

import copy
from pathlib import Path

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from torch import nn

from increlora import export_lora, rank_summary
from increlora.deltas import Status
from increlora.hosts.peft.layer import adapter_layers
from increlora.runtime import controllers_of
from tests.hosts.tiny import BUILDERS, adapter_only, grow, growing, inputs_for, logits, mid_growth

TARGETS = {
    "mlp": ["up", "down"],
    "llama": "all-linear",
    "gpt2": ["c_attn", "c_fc", "c_proj"],
    "bert": ["query", "value", "dense"],
    "t5": ["q", "v", "wo"],
}
KINDS = list(TARGETS)


def fresh(kind: str, **options: object) -> PeftModel:
    return get_peft_model(
        BUILDERS[kind](), growing(**{"target_modules": TARGETS[kind], "top_h": 1 if kind == "mlp" else 2} | options)
    )


def deltas(model: nn.Module, adapter: str = "default") -> list:
    return [layer.delta(adapter) for layer in adapter_layers(model, adapter).values()]


def same_outputs(a: nn.Module, b: nn.Module, kind: str) -> bool:
    return torch.equal(logits(a, kind), logits(b, kind))


# -- saving and loading --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_in_mid_growth_reloads_with_its_ranks(models, folders, kind: str) -> None:
    model = models[kind]
    assert mid_growth(model)
    assert (logits(model, kind) - logits(BUILDERS[kind](), kind)).abs().max() > 1e-3
    loaded = PeftModel.from_pretrained(BUILDERS[kind](), folders[kind])
    assert same_outputs(loaded, model, kind)
    assert [m.active for m in rank_summary(loaded).modules] == [m.active for m in rank_summary(model).modules]
    assert not any(p.requires_grad for p in loaded.parameters())


def test_inference_builds_no_dormant_blocks_and_training_keeps_them(models, folders) -> None:
    inference = PeftModel.from_pretrained(BUILDERS["llama"](), folders["llama"])
    trainable = PeftModel.from_pretrained(BUILDERS["llama"](), folders["llama"], is_trainable=True)
    for loaded, going_on, original in zip(deltas(inference), deltas(trainable), deltas(models["llama"]), strict=True):
        live = original.indices(Status.ACTIVE, Status.RESERVE)
        assert len(live) < len(original.sizes)
        assert [i for i in range(len(loaded.sizes)) if loaded.block(i)] == live
        assert [i for i in range(len(going_on.sizes)) if going_on.block(i)] == list(range(len(original.sizes)))
    assert not controllers_of(inference)
    assert len(controllers_of(trainable)) == 1


@pytest.mark.parametrize("trainable", [False, True])
def test_low_cpu_mem_usage_leaves_nothing_on_meta(models, folders, trainable: bool) -> None:
    loaded = PeftModel.from_pretrained(
        BUILDERS["llama"](), folders["llama"], is_trainable=trainable, low_cpu_mem_usage=True
    )
    assert not [n for n, p in loaded.named_parameters() if p.is_meta]
    assert same_outputs(loaded, models["llama"], "llama")
    if trainable:
        plain = PeftModel.from_pretrained(BUILDERS["llama"](), folders["llama"], is_trainable=True)
        expected = dict(plain.named_parameters())
        assert all(torch.equal(p, expected[n]) and p.requires_grad == expected[n].requires_grad
                   for n, p in loaded.named_parameters())  # fmt: skip
        grow(loaded, "llama", steps=4)
        grow(plain, "llama", steps=4)
        assert same_outputs(loaded, plain, "llama")


def test_auto_model_for_causal_lm(models, tmp_path: Path) -> None:
    BUILDERS["llama"]().save_pretrained(tmp_path / "base")
    from transformers import LlamaForCausalLM

    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = grow(get_peft_model(base, growing(target_modules="all-linear", task_type="CAUSAL_LM")), "llama")
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert same_outputs(loaded, model, "llama")
    assert type(loaded).__name__ == "PeftModelForCausalLM"


def test_auto_model_for_sequence_classification_brings_its_head(tmp_path: Path) -> None:
    BUILDERS["bert"]().save_pretrained(tmp_path / "base")
    from transformers import BertForSequenceClassification

    base = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    config = growing(target_modules=["query", "value"], task_type="SEQ_CLS", top_h=1)
    model = grow(get_peft_model(base, config), "bert")
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    assert same_outputs(loaded, model, "bert")
    head = loaded.base_model.model.classifier.modules_to_save["default"].weight
    assert not torch.equal(head, BUILDERS["bert"]().classifier.weight)


def test_a_state_dict_carries_ranks_by_itself(models) -> None:
    state = get_peft_model_state_dict(models["gpt2"])
    assert not [key for key in state if ".default" in key or "lora_delta" in key]
    model = fresh("gpt2")
    set_peft_model_state_dict(model, state)
    assert same_outputs(model, models["gpt2"], "gpt2")
    assert model.peft_config["default"].ranks == models["gpt2"].peft_config["default"].ranks


# -- several adapters ----------------------------------------------------------------------------------------------


def test_adapters_side_by_side_are_switched_and_deleted(models, folders) -> None:
    model = PeftModel.from_pretrained(BUILDERS["llama"](), folders["llama"], adapter_name="a")
    model.add_adapter("b", growing(target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    model.add_adapter("c", growing(r=2, target_modules=["v_proj"], init_lora_weights=False, reserve="none"))
    with_a = logits(model, "llama")
    assert torch.equal(with_a, logits(models["llama"], "llama"))
    outputs = [with_a]
    for name in ("b", "c"):
        model.set_adapter(name)
        outputs.append(logits(model, "llama"))
        assert {p.requires_grad for n, p in model.named_parameters() if f".{name}." in n} == {True}
        assert {p.requires_grad for n, p in model.named_parameters() if ".a." in n} == {False}
    assert len({o.sum().item() for o in outputs}) == 3
    model.delete_adapter("b")
    assert "b" not in model.peft_config
    assert not [n for n, _ in model.named_parameters() if ".b." in n]
    model.set_adapter("a")
    assert torch.equal(logits(model, "llama"), with_a)


def test_two_adapters_of_one_model_are_driven_one_after_the_other() -> None:
    model = fresh("mlp")
    grow(model, "mlp")
    first = {n: p.clone() for n, p in model.named_parameters() if ".default." in n}
    model.add_adapter("second", growing(target_modules=["up", "down"], top_h=1))
    model.set_adapter("second")
    grow(model, "mlp", steps=7)
    assert rank_summary(model, "second").active > rank_summary(model, "default").active
    assert all(torch.equal(p, first[n]) for n, p in model.named_parameters() if n in first)


def test_a_reference_adapter_made_from_the_live_config_has_its_ranks(models) -> None:
    """How TRL makes the reference model of DPO and GRPO."""
    model = copy.deepcopy(models["llama"])
    expected = logits(model, "llama")
    model.add_adapter("ref", model.peft_config["default"])
    parameters = dict(model.named_parameters())
    copied = 0
    for name, p in list(parameters.items()):
        if ".default." in name:
            parameters[name.replace(".default.", ".ref.")].data.copy_(p.data)
            copied += 1
    assert copied == sum(".ref." in name for name in parameters) > 0
    model.set_adapter("ref")
    assert torch.equal(logits(model, "llama"), expected)
    assert rank_summary(model, "ref").modules == rank_summary(model, "default").modules


def test_disabled_adapters_leave_the_base_model(models) -> None:
    for kind, model in models.items():
        expected = logits(model, kind)
        with model.disable_adapter():
            assert same_outputs(model, BUILDERS[kind](), kind)
        assert torch.equal(logits(model, kind), expected)


# -- merging -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_merging_in_mid_growth_is_exact(models, kind: str) -> None:
    model = copy.deepcopy(models[kind])
    expected = logits(model, kind)
    weights = {n: p.clone() for n, p in model.named_parameters() if "base_layer" in n}
    model.merge_adapter()
    torch.testing.assert_close(logits(model, kind), expected, rtol=1e-5, atol=1e-5)
    assert any(not torch.equal(p, weights[n]) for n, p in model.named_parameters() if n in weights)
    model.unmerge_adapter()
    for name, p in model.named_parameters():
        if name in weights:
            assert torch.equal(p, weights[name])
    merged = model.merge_and_unload(safe_merge=True)
    assert not adapter_layers(merged, "default")
    torch.testing.assert_close(logits(merged, kind), expected, rtol=1e-5, atol=1e-5)


def test_a_merged_layer_that_is_disabled_unmerges(models) -> None:
    model = copy.deepcopy(models["gpt2"])
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, "gpt2"), logits(BUILDERS["gpt2"](), "gpt2"), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_merging_at_every_step_does_not_wear_the_base_away(dtype: torch.dtype) -> None:
    """W + ΔW − ΔW is not W: computed so, some of these weights would move. Also when merged one by one, and moved."""
    model = fresh("mlp", init_lora_weights=False).to(dtype)
    model.add_adapter("second", growing(target_modules=["up"], init_lora_weights=False))
    weights = {n: p.clone() for n, p in model.named_parameters() if "base_layer" in n}
    for _ in range(20):
        model.merge_adapter(adapter_names=["default"])
        model.merge_adapter(adapter_names=["second"])
        model.double().to(dtype)
        model.unmerge_adapter()
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters() if n in weights)
    assert all(layer.saved_base is None and not layer.merged for layer in adapter_layers(model, "default").values())


def test_a_safe_merge_refuses_what_is_not_finite() -> None:
    model = fresh("mlp", init_lora_weights=False)
    with torch.no_grad():
        deltas(model)[0].block(0)["B"].fill_(torch.nan)
    before = model.base_model.model.up.base_layer.weight.clone()
    with pytest.raises(ValueError, match="NaNs detected in the merged weights. .* default seems to be broken in up"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(model.base_model.model.up.base_layer.weight, before)


def test_unmerging_twice_warns(models) -> None:
    model = copy.deepcopy(models["mlp"])
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


def test_bf16_base_and_adapter(tmp_path: Path) -> None:
    base = BUILDERS["llama"]().to(torch.bfloat16)
    model = get_peft_model(base, growing(target_modules="all-linear"))
    assert {p.dtype for p in adapter_only(model)} == {torch.float32}  # as peft casts LoRA
    grow(model, "llama")
    expected = logits(model, "llama")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(BUILDERS["llama"]().to(torch.bfloat16), tmp_path)
    assert torch.equal(logits(loaded, "llama"), expected)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged, "llama"), expected, rtol=0.05, atol=0.02)


# -- which modules -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["q_proj"]}, {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"}),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, {"model.layers.1.self_attn.q_proj"}),
        ({"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
         {"model.layers.0.self_attn.q_proj"}),
        ({"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj", "v_proj"]},
         {"model.layers.1.self_attn.q_proj"}),
        ({"target_modules": r".*layers\.0.*(up|gate)_proj"},
         {"model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj"}),
    ],
)  # fmt: skip
def test_module_selection_as_in_lora(options: dict, expected: set[str]) -> None:
    model = fresh("llama", **options)
    assert {m.module for m in rank_summary(model).modules} == expected
    assert rank_summary(model).budget_ranks == 3 * len(expected)


def test_all_linear_leaves_the_output_layer() -> None:
    names = {m.module for m in rank_summary(fresh("llama", target_modules="all-linear")).modules}
    assert len(names) == 14
    assert "lm_head" not in names


def test_default_targets_of_known_architectures() -> None:
    model = get_peft_model(BUILDERS["llama"](), growing(target_modules=None))
    assert {m.module.rpartition(".")[2] for m in rank_summary(model).modules} == {"q_proj", "v_proj"}


def test_modules_to_save_train_beside_the_adapter_and_outside_the_budget(tmp_path: Path) -> None:
    model = fresh("mlp", modules_to_save=["head"])
    alone = rank_summary(fresh("mlp"))
    grow(model, "mlp")
    assert rank_summary(model).budget_ranks == alone.budget_ranks
    assert rank_summary(model).budget_parameters == alone.budget_parameters
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(BUILDERS["mlp"](), tmp_path)
    assert same_outputs(loaded, model, "mlp")
    assert not torch.equal(loaded.base_model.model.head.weight, BUILDERS["mlp"]().head.weight)


# -- without PeftModel ---------------------------------------------------------------------------------------------


def test_an_injected_adapter_is_driven() -> None:
    model = inject_adapter_in_model(growing(target_modules=["up", "down"], top_h=1, total_steps=40), BUILDERS["mlp"]())
    optimizer = torch.optim.AdamW(adapter_only(model), lr=0.05)
    for _ in range(5):  # no attach: the optimizer hooks find it
        model(**inputs_for("mlp")).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert rank_summary(model).active == 4
    other = inject_adapter_in_model(growing(target_modules=["up", "down"]), BUILDERS["mlp"]())
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert same_outputs(model, other, "mlp")


def test_transformers_own_add_adapter_and_load_adapter(tmp_path: Path) -> None:
    model = BUILDERS["llama"]()
    model.add_adapter(growing(target_modules=["q_proj", "up_proj"], top_h=1))
    grow(model, "llama")
    assert mid_growth(model)
    model.save_pretrained(tmp_path / "native")
    other = PeftModel.from_pretrained(BUILDERS["llama"](), tmp_path / "native")
    assert same_outputs(other, model, "llama")
    exported = BUILDERS["llama"]()
    exported.load_adapter(str(export_lora(model, tmp_path / "lora")))
    torch.testing.assert_close(logits(exported, "llama"), logits(model, "llama"), rtol=0, atol=1e-5)
    model.disable_adapters()
    assert same_outputs(model, BUILDERS["llama"](), "llama")
    model.enable_adapters()
    assert same_outputs(other, model, "llama")
    model.delete_adapter("default")
    assert same_outputs(model, BUILDERS["llama"](), "llama")

"""MELoRA on real architectures: what the published code is known to get wrong about files, merging, second adapters and
loading, shown to be right here; export, and what it costs."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from increlora import (
    MeLoraConfig,
    PlainLoraConfig,
    allocation_to_lora_config,
    check_export,
    export_lora,
    export_merged,
    rank_summary,
    warm_start,
)
from increlora.errors import CheckpointError, ConfigError
from increlora.export.adapters import read_adapter
from tests.hosts.stock import assert_exports_compute_the_same
from tests.hosts.tiny import BUILDERS, adapter_only, inputs_for, logits
from tests.hosts.training import deltas, interrupted, train

TARGETS = {
    "bert": ["query", "value", "dense"], "gpt2": ["c_attn", "c_proj"], "mlp": ["up", "down"], "llama": "all-linear",
}  # fmt: skip


def adapted(kind: str = "bert", **options: object) -> PeftModel:
    chosen = {"r": 2, "minis": 4, "target_modules": TARGETS[kind], "fan_in_fan_out": kind == "gpt2", "seed": 2}
    return get_peft_model(BUILDERS[kind](), MeLoraConfig(**chosen | options))


def trained(kind: str = "bert", **options: object) -> PeftModel:
    model = adapted(kind, **options)
    train(model, kind)
    assert (logits(model, kind) - logits(BUILDERS[kind](), kind)).abs().max() > 1e-2
    return model


def stock(kind: str, folder: object) -> PeftModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out")
        return PeftModel.from_pretrained(BUILDERS[kind](), folder)


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


# -- files and export --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_an_export_computes_the_same_in_stock_peft(kind: str, tmp_path: Path) -> None:
    model = trained(kind)
    expected = logits(model, kind)
    model.save_pretrained(tmp_path / "native")
    for trainable in (True, False):
        reloaded = PeftModel.from_pretrained(
            BUILDERS[kind](), tmp_path / "native", adapter_name="other", is_trainable=trainable
        )
        assert torch.equal(logits(reloaded, kind), expected)
    assert_exports_compute_the_same(model, kind, tmp_path / "native", {d.name: 8 for d in deltas(model)})


def test_t12_an_export_is_block_diagonal_and_merges_to_the_same_weights(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(16, 24))
    model = get_peft_model(base, MeLoraConfig(
        r=2, minis=4, lora_alpha=16, init_lora_weights=False, target_modules=["0"]))  # fmt: skip
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    expected = model(x).detach()
    layer = model.base_model.model[0]
    merged = layer.get_base_weight() + layer.get_delta_weight("default")
    written = export_lora(model, tmp_path / "lora")
    config = json.loads((Path(written) / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (8, 8, False)
    assert (written.parameters, written.padding) == (8 * (16 + 24), 0)  # n times what was trained
    plain = nn.Sequential(nn.Linear(16, 24))
    plain.load_state_dict(model.unload().state_dict())
    lora = PeftModel.from_pretrained(plain, written)
    close(lora(x).detach(), expected, 1.6e-5)
    close(lora.merge_and_unload()[0].weight, merged, 3e-8)  # half a unit: sums with and without the zeros round apart
    tensors = load_file(Path(written) / "adapter_model.safetensors")
    A, B = (next(t for key, t in tensors.items() if f"lora_{letter}" in key) for letter in "AB")
    inside = torch.block_diag(*[torch.ones(2, 4)] * 4).bool(), torch.block_diag(*[torch.ones(6, 2)] * 4).bool()
    assert not A[~inside[0]].any() and not B[~inside[1]].any() and A[inside[0]].all() and B[inside[1]].all()


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_merged_export_needs_no_adapter(kind: str, tmp_path: Path) -> None:
    model = trained(kind)
    folder = export_merged(model, tmp_path / "merged")
    close(logits(type(BUILDERS[kind]()).from_pretrained(folder), kind), logits(model, kind))


def test_engines_are_told_the_rank_of_the_export(tmp_path: Path) -> None:
    """r = 2, n = 8 counts as LoRA of rank 16 to whoever serves it."""
    written = export_lora(adapted("llama", r=2, minis=8, init_lora_weights=False), tmp_path / "lora")
    assert check_export(written, "vllm", max_lora_rank=16).ok
    assert "16" in str(check_export(written, "vllm", max_lora_rank=8).findings[0])


def test_pefts_own_conversion_works_too() -> None:
    model = trained()
    config, state = convert_to_lora(model, rank=8)
    lora = get_peft_model(BUILDERS["bert"](), config)
    set_peft_model_state_dict(lora, state)
    close(logits(lora, "bert"), logits(model, "bert"), 1e-5)


@pytest.mark.parametrize("stop", [1, 9])
def test_a_run_resumes_as_the_trainer_does(stop: int, tmp_path: Path) -> None:
    straight, first, second = interrupted(lambda: adapted(lora_dropout=0.1), stop, tmp_path)
    assert torch.equal(logits(second, "bert"), logits(straight, "bert"))


# -- how many mini adapters: part of the config, and of every tensor's shape -------------------------------------------


def test_another_number_of_mini_adapters_is_refused_before_anything_changes(tmp_path: Path) -> None:
    trained(r=2, minis=4).save_pretrained(tmp_path)
    for options in ({"r": 2, "minis": 2}, {"r": 4, "minis": 2}, {"r": 2, "minis": 8}, {"r": 8, "minis": 1}):
        model = adapted(**options)
        before = {n: p.clone() for n, p in model.named_parameters()}
        with pytest.raises(CheckpointError, match=r"lora_A0: expected \(.*\), found \(8, 4\)"):
            model.load_adapter(tmp_path, "default", is_trainable=True)
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["minis"] == 4
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"minis": 2}))
    with pytest.raises(CheckpointError, match="lora_A0: expected"):
        PeftModel.from_pretrained(BUILDERS["bert"](), tmp_path)
    with pytest.raises(CheckpointError, match="lora_A0: expected"):
        read_adapter(tmp_path)


def test_tensors_of_another_rank_and_so_of_another_scale_than_the_config_says_are_refused(tmp_path: Path) -> None:
    trained(rank_pattern={"query": 1}, minis_pattern={"value": 8}).save_pretrained(tmp_path)
    shapes = {key: tuple(t.shape) for key, t in load_file(tmp_path / "adapter_model.safetensors").items()}
    place = "base_model.model.bert.encoder.layer.0.attention.self."
    assert [shapes[f"{place}{m}.lora_A0"] for m in ("query", "value")] == [(4, 4), (16, 2)]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"rank_pattern": {}}))
    with pytest.raises(CheckpointError, match="query.lora_state was written with the scale 8, here it is 4"):
        PeftModel.from_pretrained(BUILDERS["bert"](), tmp_path)


# -- traps of the published code ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_trap_5_merging_works_and_unmerging_restores(kind: str) -> None:
    model = trained(kind)
    expected, weights = logits(model, kind), {n: p.clone() for n, p in model.named_parameters()}
    model.merge_adapter(safe_merge=True)
    close(logits(model, kind), expected)
    model.unmerge_adapter()
    for name, p in model.named_parameters():
        close(p, weights[name])
    close(logits(model.merge_and_unload(), kind), expected)


def test_t11_merging_into_half_precision_is_undone_within_one_unit() -> None:
    base = BUILDERS["bert"]().bfloat16()
    model = get_peft_model(base, MeLoraConfig(r=2, minis=4, target_modules=TARGETS["bert"], init_lora_weights=False))
    assert deltas(model)[0].lora_A0.dtype == torch.float32  # peft keeps adapters of half-precision bases in float32
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if "base_layer.weight" in n}
    model.merge_adapter()
    merged = {n: p.detach().clone() for n, p in model.named_parameters() if n in weights}
    model.unmerge_adapter()
    for name, p in model.named_parameters():
        if name in weights:
            assert not torch.equal(merged[name], weights[name])
            unit = torch.finfo(torch.bfloat16).eps * torch.maximum(weights[name].abs(), merged[name].abs())
            assert ((p - weights[name]).abs() <= unit).all()


def test_trap_6_adapters_can_be_disabled() -> None:
    model, base = trained(), logits(BUILDERS["bert"](), "bert")
    with model.disable_adapter():
        assert torch.equal(logits(model, "bert"), base)
    assert not torch.equal(logits(model, "bert"), base)


def test_trap_8_modules_keep_their_sizes() -> None:
    model = trained()
    model.add_adapter("second", MeLoraConfig(r=1, minis=2, target_modules=TARGETS["bert"]))
    query = model.base_model.model.bert.encoder.layer[0].attention.self.query
    assert (query.in_features, query.out_features) == (16, 16)
    unloaded = model.unload().bert.encoder.layer[0].attention.self.query
    assert type(unloaded) is nn.Linear and (unloaded.in_features, unloaded.out_features) == (16, 16)


def test_trap_9_t14_adapters_of_different_n_live_side_by_side(tmp_path: Path) -> None:
    model, alone = trained(), trained(r=1, minis=8, seed=5)
    expected = {"default": logits(model, "bert"), "second": logits(alone, "bert")}
    alone.save_pretrained(tmp_path / "alone")
    model.load_adapter(tmp_path / "alone", "second")
    model.save_pretrained(tmp_path / "both")
    again = PeftModel.from_pretrained(BUILDERS["bert"](), tmp_path / "both")
    again.load_adapter(tmp_path / "both" / "second", "second")
    for each in (model, again):
        for name in ("second", "default", "second"):
            each.set_adapter(name)
            assert torch.equal(logits(each, "bert"), expected[name])
        query = each.base_model.model.bert.encoder.layer[0].attention.self.query
        assert {name: tuple(query.delta(name).lora_A0.shape) for name in expected} == {
            "default": (8, 4),
            "second": (8, 2),
        }
        assert {rank_summary(each, name).active for name in expected} == {2 * len(deltas(each)), len(deltas(each))}


def test_trap_12_t14_plain_lora_loads_as_what_it_is(tmp_path: Path) -> None:
    """The published loader asks whether the type's name is *within* "MELORA", and so drops every weight of LoRA."""
    options = {"r": 3, "target_modules": TARGETS["bert"], "init_lora_weights": False}
    for config in (LoraConfig(**options), PlainLoraConfig(**options)):
        plain = get_peft_model(BUILDERS["bert"](), config)
        plain.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(BUILDERS["bert"](), tmp_path)
        assert loaded.peft_config["default"].peft_type == config.peft_type != "INCRELORA_MELORA"
        assert torch.equal(logits(loaded, "bert"), logits(plain, "bert"))
        with pytest.raises((CheckpointError, RuntimeError, ValueError)):
            set_peft_model_state_dict(adapted(), load_file(tmp_path / "adapter_model.safetensors"))


def test_only_what_divides_is_adapted_and_a_refusal_leaves_the_model_alone() -> None:
    base = BUILDERS["mlp"]()
    with pytest.raises(ConfigError, match=r"head: minis=2 does not divide both in=8 and out=3.*'head': 1"):
        get_peft_model(base, MeLoraConfig(target_modules=["up", "head"]))
    assert type(base.up) is nn.Linear
    mended = get_peft_model(base, MeLoraConfig(r=2, target_modules=["up", "head"], minis_pattern={"head": 1}))
    assert rank_summary(mended).parameters == 2 * (20 + 11)


# -- what is counted, and what else the library does with an adapter ---------------------------------------------------


def test_parameters_are_those_that_are_trained_and_of_lora(capsys: pytest.CaptureFixture[str]) -> None:
    model, lora = adapted(r=8), get_peft_model(BUILDERS["bert"](), LoraConfig(r=8, target_modules=TARGETS["bert"]))
    summary, count = rank_summary(model), sum(p.numel() for p in adapter_only(lora))
    assert sum(p.numel() for p in adapter_only(model)) == count == summary.parameters == summary.budget_parameters
    assert summary.active == summary.budget_ranks == 8 * len(deltas(model))
    model.print_trainable_parameters()
    assert f"trainable params: {count:,}" in capsys.readouterr().out


def test_the_card_counts_what_was_trained(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path)
    count = rank_summary(model).parameters
    assert f"{count:,} parameters (budget {count:,})" in (tmp_path / "README.md").read_text()


def test_an_allocation_of_it_is_lora_of_the_same_parameters() -> None:
    config = allocation_to_lora_config(trained(rank_pattern={"query": 1}))
    model = get_peft_model(BUILDERS["bert"](), config)
    assert sum(p.numel() for p in adapter_only(model)) == rank_summary(trained(rank_pattern={"query": 1})).parameters


def test_it_starts_others_but_no_other_adapter_fits_it(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path)
    lora = get_peft_model(BUILDERS["bert"](), PlainLoraConfig(r=8, target_modules=TARGETS["bert"]))
    warm_start(lora, tmp_path)
    close(logits(lora, "bert"), logits(model, "bert"))
    fresh = adapted()
    before = logits(fresh, "bert")
    with pytest.raises(ConfigError, match="query: MeLoraConfig cannot hold"):
        warm_start(fresh, lora)
    assert torch.equal(logits(fresh, "bert"), before) and not deltas(fresh)[0].lora_B0.any()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")  # since 5.23
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    grads = []
    for checkpointed in (False, True):
        model = adapted("llama", init_lora_weights=False).train()
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**inputs_for("llama")).logits.square().mean().backward()
        grads.append([p.grad for p in adapter_only(model)])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_nothing_is_left_on_meta(tmp_path: Path) -> None:
    model = trained("llama")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(BUILDERS["llama"](), tmp_path, low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in loaded.parameters())
    assert torch.equal(logits(loaded, "llama"), logits(model, "llama"))


def test_a_damaged_file_is_refused_by_name(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(k for k in tensors if k.endswith("query.lora_B0"))
    for wrong in (tensors[key][:, :1], tensors[key][:-1], tensors[key][:, :0]):
        save_file(tensors | {key: wrong.contiguous()}, path, metadata={"format": "pt"})
        for read in (read_adapter, lambda folder: PeftModel.from_pretrained(BUILDERS["bert"](), folder)):
            with pytest.raises(
                CheckpointError, match="query(.lora_[AB]0: expected|: minis=4 .* weights do not belong)"
            ):
                read(tmp_path)

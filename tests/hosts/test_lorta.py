"""LoRTA on real architectures: training, merging, export, and the defects that the published code is known to have."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import SGD
from transformers import LlamaConfig, LlamaForCausalLM

from increlora import (
    IncreLoraConfig,
    LortaConfig,
    PlainLoraConfig,
    allocation_to_lora_config,
    export_lora,
    export_merged,
    rank_summary,
    warm_start,
)
from increlora.errors import ConfigError, ExportError
from increlora.structural.lorta.delta import TensorBank
from tests.hosts.stock import assert_exports_compute_the_same
from tests.hosts.tiny import BUILDERS, adapter_only, inputs_for, logits, seeded
from tests.hosts.training import deltas, train

KINDS = ("bert", "gpt2", "llama", "grouped", "t5")
# d, d_h, H, attention blocks, modules of "all-linear"
SIZES = {
    "bert": (16, 8, 2, 2, 8), "gpt2": (16, 8, 2, 2, 4), "llama": (16, 8, 2, 2, 8), "grouped": (16, 6, 4, 3, 12),
    "t5": (16, 8, 2, 6, 24),
}  # fmt: skip
ALPHAS = {"bert": 20}  # its logits hardly move
NAMES = [f"base_model.model.shared_factors.{name}" for name in sorted(TensorBank.names)]


def grouped() -> nn.Module:
    """Two heads for keys and values, four for queries, and 4 · 6 ≠ 16."""
    return seeded(lambda: LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4, head_dim=6,
        num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )))  # fmt: skip


BUILDERS = BUILDERS | {"grouped": grouped}


def adapted(kind: str = "bert", **options: object) -> PeftModel:
    chosen = {"r": 3, "target_modules": "all-linear", "fan_in_fan_out": kind == "gpt2", "seed": 2}
    return get_peft_model(BUILDERS[kind](), LortaConfig(**chosen | options))


def trained(kind: str = "bert", **options: object) -> PeftModel:
    model = adapted(kind, **{"init_lora_weights": False, "lora_alpha": ALPHAS.get(kind, 4)} | options)
    train(model, kind)
    assert (logits(model, kind) - logits(BUILDERS[kind](), kind)).abs().max() > 1e-3
    return model


def bank(model: nn.Module, adapter: str = "default") -> TensorBank:
    return model.get_submodule("base_model.model.shared_factors").lora_delta[adapter]


def stock(kind: str, folder: object) -> PeftModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out")
        return PeftModel.from_pretrained(BUILDERS[kind](), folder)


def close(one: Tensor, other: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


# -- start, one step, many ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_t9_the_first_step_moves_b_alone(kind: str) -> None:
    model = adapted(kind)
    assert torch.equal(logits(model, kind), logits(BUILDERS[kind](), kind))
    before = [p.detach().clone() for p in bank(model).parameters()]
    train(model, kind, optimizer=SGD(adapter_only(model), lr=0.1), stop=1)
    moved = [not torch.equal(p, q) for p, q in zip(bank(model).parameters(), before, strict=True)]
    assert moved == [False, True, False, False, False]


@pytest.mark.parametrize("kind", KINDS)
def test_t8_the_optimizer_sees_every_factor_once(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    model, (d, d_h, H, L, _) = adapted(kind), SIZES[kind]
    count = 3 * (d + d_h + H + L + 4)
    assert [id(p) for p in adapter_only(model)] == [id(p) for p in bank(model).parameters()]
    assert sum(p.numel() for p in adapter_only(model)) == count == rank_summary(model).parameters
    model.print_trainable_parameters()
    assert f"trainable params: {count:,}" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["bert", "grouped"])
def test_t12_two_micro_batches_are_one_batch(kind: str) -> None:
    inputs, grads = inputs_for(kind), []
    for parts in (1, 2):
        model = adapted(kind, init_lora_weights=False)
        for i in range(parts):
            ids = inputs["input_ids"][i::parts]
            (model(input_ids=ids).logits.square().mean() / parts).backward()
        grads.append([p.grad for p in adapter_only(model)])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-7)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")  # since 5.23
@pytest.mark.parametrize("reentrant", [True, False])
def test_t12_gradient_checkpointing_changes_nothing_on_one_process(reentrant: bool) -> None:
    grads = []
    for checkpointed in (False, True):
        model = adapted("grouped", init_lora_weights=False).train()
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**inputs_for("llama")).logits.square().mean().backward()
        grads.append([p.grad for p in adapter_only(model)])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["grouped", "gpt2"])
def test_t11_generating_right_after_a_step_uses_the_new_values(kind: str) -> None:
    """Trap 4.12: the published adapter would use the dense deltas of the last forward pass, or fail without one."""
    model, prompt = adapted(kind, task_type="CAUSAL_LM", init_lora_weights=False), inputs_for(kind)["input_ids"]
    outputs = []
    for step in range(3):
        train(model, kind, start=step, stop=step + 1)
        model.eval()
        found = model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
        expected = prompt
        with torch.no_grad():
            for _ in range(6):
                following = model(input_ids=expected, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
                expected = torch.cat([expected, following], dim=1)
        assert torch.equal(found, expected)
        outputs.append(found)
    assert not torch.equal(outputs[0], outputs[-1])


def test_factors_of_a_half_precision_model_are_whole() -> None:
    """4.14."""
    model = get_peft_model(BUILDERS["bert"]().bfloat16(), LortaConfig(r=2, target_modules="all-linear"))
    assert {p.dtype for p in bank(model).parameters()} == {torch.float32}
    plain = get_peft_model(
        BUILDERS["bert"]().bfloat16(), LortaConfig(r=2, target_modules="all-linear"), autocast_adapter_dtype=False
    )
    assert {p.dtype for p in bank(plain).parameters()} == {torch.float32}


# -- merging and export ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_t11_merging_and_unmerging(kind: str) -> None:
    model = trained(kind)
    expected, weights = logits(model, kind), {n: p.clone() for n, p in model.named_parameters()}
    model.merge_adapter(safe_merge=True)
    close(logits(model, kind), expected)
    model.unmerge_adapter()
    for name, p in model.named_parameters():
        close(p, weights[name])
    merged, base = model.merge_and_unload(), BUILDERS[kind]()
    close(logits(merged, kind), expected)
    assert [(n, type(m)) for n, m in merged.named_modules()] == [(n, type(m)) for n, m in base.named_modules()]
    assert list(merged.state_dict()) == list(base.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_t13_an_export_computes_the_same_in_stock_peft(kind: str, tmp_path: Path) -> None:
    model = trained(kind)
    model.save_pretrained(tmp_path / "native")
    ranks = {d.name: 3 for d in deltas(model)}
    assert_exports_compute_the_same(model, kind, tmp_path / "native", ranks, build=BUILDERS[kind])


@pytest.mark.parametrize("orientation", ["head_aligned", "official_peft", "official_litgpt"])
def test_t13_in_double_precision_with_more_ranks_than_the_model_is_wide(orientation: str, tmp_path: Path) -> None:
    base = BUILDERS["llama"]().double()
    model = get_peft_model(copy.deepcopy(base), LortaConfig(
        r=19, target_modules="all-linear", orientation=orientation, init_lora_weights=False))  # fmt: skip
    written = export_lora(model, tmp_path / "lora")
    plain = PeftModel.from_pretrained(copy.deepcopy(base), written, autocast_adapter_dtype=False)
    close(logits(plain, "llama"), logits(model, "llama"), 1e-12)
    cut = export_lora(model, tmp_path / "cut", max_rank=16)
    assert set(cut.ranks.values()) == {16} and max(cut.errors.values()) < 1e-7  # nothing but rounding is lost
    close(logits(PeftModel.from_pretrained(copy.deepcopy(base), cut), "llama"), logits(model, "llama"), 1e-5)


def test_an_export_has_the_published_form(tmp_path: Path) -> None:
    """Section 7: q, k and v of all layers have the same A, o of all layers the same B up to its columns' scale."""
    model = trained("llama")
    tensors = load_file(Path(export_lora(model, tmp_path / "lora")) / "adapter_model.safetensors")
    A = [t for n, t in tensors.items() if "lora_A" in n and "o_proj" not in n]
    assert len(A) == 6 and all(torch.equal(a, bank(model).lora_A.T) for a in A)
    assert sum(t.numel() for t in tensors.values()) == 8 * 2 * 16 * 3


def test_a_merged_export_needs_no_adapter(tmp_path: Path) -> None:
    model = trained()
    folder = export_merged(model, tmp_path / "merged")
    close(logits(type(BUILDERS["bert"]()).from_pretrained(folder), "bert"), logits(model, "bert"))


def test_it_starts_others_but_no_other_adapter_fits_it(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path)
    targets = ["query", "key", "value", "attention.output.dense"]
    for config in (PlainLoraConfig(r=3, target_modules=targets), IncreLoraConfig(r=3, target_modules=targets)):
        other = get_peft_model(BUILDERS["bert"](), config)
        warm_start(other, tmp_path)
        close(logits(other, "bert"), logits(model, "bert"))
    fresh = adapted()
    with pytest.raises(ConfigError, match="LortaConfig cannot hold a low-rank"):
        warm_start(fresh, tmp_path)


def test_an_allocation_of_it_is_lora_of_the_same_ranks() -> None:
    config = allocation_to_lora_config(trained())
    assert isinstance(config, LoraConfig) and set(config.rank_pattern.values()) == {3}


def test_the_card_counts_what_was_trained(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path)
    assert f"{rank_summary(model).parameters:,} parameters" in (tmp_path / "README.md").read_text()


def test_pefts_conversion_refuses_and_says_so_beforehand() -> None:
    model = trained()
    assert not model.supports_lora_conversion()
    with pytest.raises(TypeError, match="SharedFactors"):
        convert_to_lora(model, rank=8)
    model.delete_adapter("default")
    assert model.base_model.supports_lora_conversion()


def test_what_is_shared_has_no_base_layer() -> None:
    owner = adapted().base_model.model.shared_factors
    assert owner.weight is None and owner.bias is None


def test_nothing_to_export_is_said(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="nothing to export"):
        export_lora(BUILDERS["bert"](), tmp_path / "lora")

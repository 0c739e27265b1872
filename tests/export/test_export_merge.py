"""The merged model: transformers alone computes what the adapter computed."""

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM

from increlora import export_merged
from increlora.errors import ExportError
from tests.export.test_export_foreign import adalora
from tests.hosts.tiny import BUILDERS, grow, growing, logits

pytestmark = [  # peft says so whenever embeddings are adapted
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]
AUTO = {"llama": AutoModelForCausalLM, "gpt2": AutoModelForCausalLM, "bert": AutoModelForSequenceClassification}
OPTIONS = {
    "llama": {"target_modules": "all-linear"},
    "gpt2": {"target_modules": ["c_attn", "c_proj"]},
    "bert": {"target_modules": ["query", "dense"], "modules_to_save": ["classifier"]},
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_the_merged_model_has_the_adapters_logits(kind: str, tmp_path: Path) -> None:
    model = grow(get_peft_model(BUILDERS[kind](), growing(**OPTIONS[kind])), kind)
    model.save_pretrained(tmp_path / "adapter")
    wanted = logits(model, kind)
    assert (wanted - logits(BUILDERS[kind](), kind)).abs().max() > 1e-3
    assert export_merged(model, tmp_path / "live") == tmp_path / "live"
    export_merged(tmp_path / "adapter", tmp_path / "folder", base=BUILDERS[kind]())
    for name in ("live", "folder"):
        merged = AUTO[kind].from_pretrained(tmp_path / name).eval()
        assert not isinstance(merged, PeftModel)
        torch.testing.assert_close(logits(merged, kind), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(model, kind), wanted, rtol=0, atol=0)  # the live model stays as it is


def test_an_adalora_is_merged(tmp_path: Path) -> None:
    model = adalora()
    merged = AutoModelForCausalLM.from_pretrained(export_merged(model, tmp_path / "out")).eval()
    torch.testing.assert_close(logits(merged, "llama"), logits(model, "llama"), rtol=0, atol=1e-5)


def tied() -> LlamaForCausalLM:
    config = copy.deepcopy(BUILDERS["llama"]().config)
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


TIED = {
    "head": {"modules_to_save": ["lm_head"]},
    "input": {"modules_to_save": ["embed_tokens"]},
    "each": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "both, still tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "low-rank head": {"target_modules": ["q_proj", "lm_head"]},
    "neither": {},
}


@pytest.mark.parametrize("kind", TIED)
def test_tied_embeddings_are_untied_where_the_adapter_changes_one(kind: str, tmp_path: Path) -> None:
    config = LoraConfig(**{"target_modules": ["q_proj"], "init_lora_weights": False} | TIED[kind])
    model = get_peft_model(tied(), config)
    with torch.no_grad():
        for i, parameter in enumerate(p for n, p in model.named_parameters() if "modules_to_save" in n):
            parameter += 0.1 * (i + 1)
    model.save_pretrained(tmp_path / "adapter")
    wanted = logits(model, "llama")
    assert (wanted - logits(tied(), "llama")).abs().max() > 1e-3
    export_merged(model, tmp_path / "live")
    export_merged(tmp_path / "adapter", tmp_path / "folder", base=tied())
    for name in ("live", "folder"):
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        torch.testing.assert_close(logits(merged, "llama"), wanted, rtol=0, atol=1e-5)
        assert merged.config.tie_word_embeddings == (kind in ("both, still tied", "neither"))


def test_a_tie_that_the_config_does_not_tell_is_undone(tmp_path: Path) -> None:
    model = get_peft_model(BUILDERS["llama"](), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight += 0.1
    model.save_pretrained(tmp_path / "adapter")
    base = BUILDERS["llama"]()
    base.lm_head.weight = base.model.embed_tokens.weight
    export_merged(tmp_path / "adapter", tmp_path / "out", base=base)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(merged, "llama"), logits(model, "llama"), rtol=0, atol=1e-5)


def test_a_tie_that_cannot_be_undone_is_named(tmp_path: Path) -> None:
    model = get_peft_model(BUILDERS["t5"](), LoraConfig(target_modules=["q"], modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight += 1
    model.save_pretrained(tmp_path / "adapter")
    for source, base in ((model, None), (tmp_path / "adapter", BUILDERS["t5"]())):
        with pytest.raises(ExportError, match=r"(?=.*shared.weight)(?=.*lm_head.weight).*are one tensor in the base"):
            export_merged(source, tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", [
    LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False),
    growing(target_modules=["q_proj", "lm_head"], init_lora_weights=False),
])  # fmt: skip
def test_an_adapted_head_that_peft_saved_whole(config: object, tmp_path: Path) -> None:
    model = get_peft_model(BUILDERS["llama"](), config)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / "adapter/adapter_model.safetensors")
    wanted = logits(model, "llama")
    export_merged(model, tmp_path / "live")
    export_merged(tmp_path / "adapter", tmp_path / "folder", base=BUILDERS["llama"]())
    for name in ("live", "folder"):
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        torch.testing.assert_close(logits(merged, "llama"), wanted, rtol=0, atol=1e-5)


def test_what_cannot_be_merged(tmp_path: Path) -> None:
    model = get_peft_model(BUILDERS["llama"](), growing(target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    out = tmp_path / "out"
    with pytest.raises(ExportError, match="give the model as `base=`"):
        export_merged(tmp_path / "adapter", out)
    with pytest.raises(ExportError, match="layers.0.self_attn.q_proj.weight is not in the base"):
        export_merged(tmp_path / "adapter", out, base=BUILDERS["bert"]())
    wide = BUILDERS["llama"]()
    kept = wide.model.layers[0].self_attn.q_proj.weight.clone()
    wide.model.layers[1].self_attn.q_proj = nn.Linear(16, 8)
    with pytest.raises(ExportError, match=r"layers.1.self_attn.q_proj.weight is \(8, 16\) in the base, \(16, 16\) in"):
        export_merged(tmp_path / "adapter", out, base=wide)
    assert torch.equal(wide.model.layers[0].self_attn.q_proj.weight, kept)  # nothing was changed before it was seen
    quantised = BUILDERS["llama"]()
    quantised.model.layers[0].self_attn.q_proj.weight = nn.Parameter(torch.zeros(16, 16).byte(), requires_grad=False)
    with pytest.raises(ExportError, match=r"q_proj.weight is quantised in the base"):
        export_merged(tmp_path / "adapter", out, base=quantised)
    mlp = get_peft_model(BUILDERS["mlp"](), LoraConfig(target_modules=["up"], init_lora_weights=False))
    with pytest.raises(ExportError, match="base is a Mlp: only transformers models can be written whole"):
        export_merged(mlp, out)
    assert not out.exists()
    (tmp_path / "adapter" / "notes").write_text("")
    with pytest.raises(ExportError, match="adapter exists: choose another folder"):
        export_merged(model, tmp_path / "adapter")

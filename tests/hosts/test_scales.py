"""peft's `set_scale`, `scale_layer` and `unscale_layer`, which diffusers' adapter weights are made of."""

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from increlora import AdaLoraConfig, IncreLoraConfig, PlainLoraConfig, export_lora, rank_summary
from tests.catalogue import CATALOGUE
from tests.hosts.test_undriven import OPTIONS, TOKENS, llama, train


def tuner_layers(model: nn.Module) -> list:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(TOKENS).logits


def trained(row) -> PeftModel:
    model = get_peft_model(llama(), row.config(init_lora_weights=False) if row.name == "lora" else row.config())
    train(model, 10)
    return model.eval()


def scaled(model: nn.Module, scale: float) -> nn.Module:
    """The base model with that much of ΔW in its weights."""
    changes = {
        m.delta("default").name: m.get_delta_weight("default") for m in tuner_layers(model) if hasattr(m, "delta")
    }
    base = llama()
    for name, change in changes.items():
        base.get_submodule(name).weight.data += scale * change
    return base


@pytest.mark.parametrize("row", CATALOGUE, ids=str)
def test_a_scale_counts_wherever_the_adapter_does(row, tmp_path: Path) -> None:
    model = trained(row)
    whole, wanted = logits(model), logits(scaled(model, 0.3))
    changes = [m.get_delta_weight("default") for m in tuner_layers(model) if hasattr(m, "delta")]
    for layer in tuner_layers(model):
        layer.set_scale("default", 0.3)
        layer.set_scale("another", 0.5)  # which is not there
    torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=1e-5)
    for layer, change in zip([m for m in tuner_layers(model) if hasattr(m, "delta")], changes, strict=True):
        torch.testing.assert_close(layer.get_delta_weight("default"), 0.3 * change)
    exported = export_lora(model, tmp_path / "lora", tolerance=1.0)
    again = logits(PeftModel.from_pretrained(llama(), exported))
    torch.testing.assert_close(again, wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(model), logits(copy.deepcopy(model)))
    model.base_model.model.model.layers[0].self_attn.q_proj.scale_layer(1)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    model.save_pretrained(tmp_path / "native")  # a scale is of the live model, as with peft's LoRA
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / "native")), whole)
    for layer in tuner_layers(model):
        layer.unscale_layer()
    assert torch.equal(logits(model), whole)


@pytest.mark.parametrize("kind", ["ours", "peft's"])
def test_the_calls_mean_what_they_mean_for_peft(kind: str) -> None:
    config_cls = PlainLoraConfig if kind == "ours" else LoraConfig
    model = get_peft_model(llama(), config_cls(r=4, target_modules=["q_proj"], init_lora_weights=False))
    (layer, *_) = tuner_layers(model)
    first = layer.get_delta_weight("default")
    steps = [("set_scale", ("default", 0.5), 0.5), ("set_scale", ("default", 3.0), 3.0), ("scale_layer", (2.0,), 6.0),
             ("unscale_layer", (4.0,), 1.5), ("scale_layer", (1,), 1.5), ("unscale_layer", (), 1.0)]  # fmt: skip
    for call, arguments, expected in steps:
        getattr(layer, call)(*arguments)
        torch.testing.assert_close(layer.get_delta_weight("default"), expected * first)


def test_sums_and_mixed_batches_take_the_scale_along() -> None:
    model = get_peft_model(llama(), PlainLoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    for layer in tuner_layers(model):
        layer.set_scale("default", 0.5)
    wanted = logits(model)
    with torch.no_grad():
        mixed = model(TOKENS, adapter_names=["default", "__base__"]).logits
    torch.testing.assert_close(mixed[0], wanted[0])
    torch.testing.assert_close(mixed[1], logits(llama())[1])
    model.add_weighted_adapter(["default"], [2.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    torch.testing.assert_close(logits(model), logits(scaled_twice(model)))
    model.delete_adapter("default")
    assert all("default" not in layer.scales for layer in tuner_layers(model))


def scaled_twice(model: PeftModel) -> nn.Module:
    base = llama()
    for name, layer in [(m.delta("default").name, m) for m in tuner_layers(model)]:
        base.get_submodule(name).weight.data += 2 * layer.get_delta_weight("default")
    return base


@pytest.mark.parametrize("config_cls", [IncreLoraConfig, AdaLoraConfig])
def test_a_scaled_adapter_trains_and_meets_its_budget(config_cls) -> None:
    model = get_peft_model(llama(), config_cls(**OPTIONS))
    for layer in tuner_layers(model):
        layer.set_scale("default", 0.5)
    train(model, 30)
    assert rank_summary(model).active == 56


@pytest.mark.parametrize("rslora", [False, True])
def test_an_export_of_pefts_lora_has_its_live_scale(rslora: bool, tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=6, use_rslora=rslora, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(llama(), config)
    for layer in tuner_layers(model):
        layer.set_scale("default", 0.3)
    exported = export_lora(model, tmp_path / "lora")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(), exported)), logits(model))

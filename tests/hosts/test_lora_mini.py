"""LoRA-Mini on real architectures: dtypes, adapters side by side, export; and what the published file cannot do."""

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import Tensor, nn

from increlora import (
    LoraMiniConfig,
    PlainLoraConfig,
    allocation_to_lora_config,
    export_lora,
    export_merged,
    rank_summary,
    warm_start,
)
from increlora.errors import ConfigError
from increlora.export.adapters import read_adapter
from increlora.structural.lora_mini.delta import FourFactorDelta
from tests.hosts.stock import assert_exports_compute_the_same
from tests.hosts.test_melora import TARGETS
from tests.hosts.tiny import BUILDERS, adapter_only, inputs_for, logits
from tests.hosts.training import deltas, train

SMALL = {"r": 1, "inner_in": 3, "inner_out": 4, "seed": 5, "lora_alpha": 20, "save_projection": False}
WEIGHTS = "adapter_model.safetensors"


def config_for(kind: str = "bert", **options: object) -> LoraMiniConfig:
    chosen = {"r": 2, "inner_in": 6, "inner_out": 5, "target_modules": TARGETS[kind], "seed": 2}
    return LoraMiniConfig(**chosen | {"fan_in_fan_out": kind == "gpt2"} | options)


def adapted(kind: str = "bert", **options: object) -> PeftModel:
    return get_peft_model(BUILDERS[kind](), config_for(kind, **options))


def trained(kind: str = "bert", **options: object) -> PeftModel:
    model = adapted(kind, **options)
    train(model, kind)
    assert (logits(model, kind) - logits(BUILDERS[kind](), kind)).abs().max() > 1e-2
    return model


def close(one: Tensor, other: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


def outer(model: nn.Module) -> list[Tensor]:
    return [t for delta in deltas(model) for t in (delta.lora_aux_A, delta.lora_aux_B)]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / WEIGHTS)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# -- one set of numbers, wherever the model goes (T8) ------------------------------------------------------------------


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("written", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_t8_every_base_gets_the_same_factors_in_its_own_dtype(
    dtype: torch.dtype, written: bool, low: bool, tmp_path: Path
) -> None:
    model = trained(save_projection=written)
    other = get_peft_model(BUILDERS["bert"]().to(dtype), config_for(save_projection=written))
    assert all(t.dtype == dtype for t in outer(other))
    assert all(p.dtype == (dtype if dtype == torch.float64 else torch.float32) for p in adapter_only(other))
    assert all(torch.equal(a.double(), b.double()) for a, b in zip(outer(other), outer(model), strict=True))
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    other.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(BUILDERS["bert"](), tmp_path, low_cpu_mem_usage=low)  # back in float32
    assert all(torch.equal(a.double(), b.double()) for a, b in zip(outer(again), outer(model), strict=True))
    assert torch.equal(logits(again, "bert"), logits(model, "bert"))
    same = PeftModel.from_pretrained(BUILDERS["bert"]().to(dtype), tmp_path, low_cpu_mem_usage=low)
    assert all(t.dtype == dtype for t in outer(same)) and logits(same, "bert").dtype == dtype
    if low and dtype != torch.float64:  # peft casts trained parameters to the base's dtype on its way
        close(logits(same, "bert"), logits(other, "bert"), 2e-3)
    else:
        assert torch.equal(logits(same, "bert"), logits(other, "bert"))


def test_t8_casting_a_model_changes_no_frozen_factor(tmp_path: Path) -> None:
    model = trained()
    before = [t.clone() for t in outer(model)]
    for cast in (copy.deepcopy(model).half(), copy.deepcopy(model).bfloat16(), copy.deepcopy(model).double()):
        assert all(torch.equal(a.float(), b) for a, b in zip(outer(cast), before, strict=True))
        cast.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(BUILDERS["bert"](), tmp_path)
        assert all(map(torch.equal, outer(loaded), before))


def test_copies_are_their_own() -> None:
    model = trained()
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, "bert"), logits(model, "bert"))
    assert not {t.data_ptr() for t in outer(twin)} & {t.data_ptr() for t in outer(model)}
    train(twin, stop=2)
    assert all(map(torch.equal, outer(twin), outer(model)))


def test_adapters_live_side_by_side(tmp_path: Path) -> None:
    model, alone = trained(), trained(**SMALL)
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
            assert all(not t.requires_grad for t in each.buffers())
    model.add_adapter("third", config_for())
    query = model.base_model.model.bert.encoder.layer[0].attention.self.query
    assert torch.equal(query.delta("third").lora_aux_A, query.delta("default").lora_aux_A)  # same seed, same module
    model.delete_adapter("third")
    with model.disable_adapter():
        assert torch.equal(logits(model, "bert"), logits(BUILDERS["bert"](), "bert"))


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("written", [True, False])
def test_injected_models_work_alike(written: bool, low: bool, tmp_path: Path) -> None:
    model = trained(save_projection=written)
    state = get_peft_model_state_dict(model)
    base = inject_adapter_in_model(config_for(save_projection=written), BUILDERS["bert"](), low_cpu_mem_usage=low)
    bare = {key.removeprefix("base_model.model."): value for key, value in state.items()}
    set_peft_model_state_dict(base, bare, low_cpu_mem_usage=low)
    assert torch.equal(logits(base, "bert"), logits(model, "bert"))
    assert not any(t.is_meta for t in (*base.parameters(), *base.buffers()))
    assert get_peft_model_state_dict(base).keys() == bare.keys()


# -- what trains -------------------------------------------------------------------------------------------------------


def test_trap_nothing_trains_the_frozen_factors(capsys: pytest.CaptureFixture[str]) -> None:
    """The published linear class leaves gradients on; the usual rule would train everything called lora_."""
    model = adapted()
    before = [t.clone() for t in outer(model)]
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
    names = {n for n, _ in model.named_parameters() if "lora_" in n}
    assert names and all(n.endswith(("lora_A0", "lora_B0")) for n in names)
    train(model)
    assert all(map(torch.equal, outer(model), before))
    fresh = adapted()
    count = sum(p.numel() for p in adapter_only(fresh))
    assert count == rank_summary(fresh).parameters == len(deltas(fresh)) * 2 * (6 + 5)
    fresh.print_trainable_parameters()
    assert f"trainable params: {count:,}" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")  # since 5.23
@pytest.mark.parametrize("forward", ["composed", "sequential"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant: bool, forward: str) -> None:
    grads = []
    for checkpointed in (False, True):
        model = adapted("llama", init_lora_weights=False, forward=forward).train()
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**inputs_for("llama")).logits.square().mean().backward()
        grads.append([p.grad for p in adapter_only(model)])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_trap_fused_projections_are_one_map_and_other_classes_are_refused() -> None:
    """The published classes for fused projections and convolutions cannot run."""
    model = trained("gpt2")
    fused = model.base_model.model.transformer.h[0].attn.c_attn.delta("default")
    assert isinstance(fused, FourFactorDelta) and fused.lora_aux_B.shape == (48, 5) and fused.weight().any()
    for module, kind in ((nn.Conv2d(3, 4, 2), "Conv2d"), (nn.Embedding(5, 6), "Embedding")):
        base = nn.Sequential(module)
        with pytest.raises(ConfigError, match=f"nn.{kind}, which lora_mini cannot adapt"):
            get_peft_model(base, LoraMiniConfig(target_modules=["0"]))
        assert base[0] is module


def test_sizes_are_refused_and_warned_of_before_anything_is_changed() -> None:
    base = BUILDERS["mlp"]()
    with pytest.raises(ConfigError, match=r"head: inner_out=5 is above out=3; give at most 3"):
        get_peft_model(base, LoraMiniConfig(r=2, inner_in=6, inner_out=5, target_modules=["up", "head"]))
    assert type(base.up) is nn.Linear
    with pytest.warns(UserWarning, match=r"head and modules like it: r=2 with inner sizes a=4, b=3") as caught:
        get_peft_model(base, LoraMiniConfig(r=2, inner_in=4, inner_out=3, target_modules=["head"]))
    assert len(caught) == 1


def test_options_of_lora_that_mean_nothing_here_are_refused() -> None:
    for options in ({"use_dora": True}, {"init_lora_weights": "pissa"}, {"inner": 3}):
        with pytest.raises(ConfigError):
            config_for(**options)


# -- export (section 7), merging (T11), and what else the library does with an adapter ---------------------------------


@pytest.mark.parametrize("sizes", [{}, {"r": 4, "inner_in": 3}, {"r": 4, "inner_out": 2}])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_t11_an_export_computes_the_same_in_stock_peft(kind: str, sizes: dict, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* and modules like it: ", UserWarning)
        model = trained(kind, save_projection=False, **sizes)
        model.save_pretrained(tmp_path / "native")
        rank = min(v for v in ({"r": 2, "inner_in": 6, "inner_out": 5} | sizes).values())
        assert_exports_compute_the_same(model, kind, tmp_path / "native", {d.name: rank for d in deltas(model)})


def test_t11_in_double_precision_export_and_merging_are_exact(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(12, 20, dtype=torch.float64))
    model = get_peft_model(copy.deepcopy(base), LoraMiniConfig(
        r=3, inner_in=8, inner_out=7, lora_alpha=5, init_lora_weights=False, target_modules=["0"],
    ))  # fmt: skip
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected, weight = model(x).detach(), base[0].weight.detach()
    written = export_lora(model, tmp_path / "lora")
    assert (written.parameters, written.padding) == (3 * (12 + 20), 0)
    lora = PeftModel.from_pretrained(copy.deepcopy(base), written)
    close(lora(x).detach(), expected, 1e-14)
    model.merge_adapter()
    close(model(x).detach(), expected, 1e-14)
    model.unmerge_adapter()
    close(model.base_model.model[0].base_layer.weight, weight, 1e-15)
    close(model.merge_and_unload()(x).detach(), expected, 1e-14)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_merged_export_needs_no_adapter(kind: str, tmp_path: Path) -> None:
    model = trained(kind)
    folder = export_merged(model, tmp_path / "merged")
    close(logits(type(BUILDERS[kind]()).from_pretrained(folder), kind), logits(model, kind))


def test_pefts_own_conversion_works_too() -> None:
    model = trained()
    config, state = convert_to_lora(model, rank=2)
    lora = get_peft_model(BUILDERS["bert"](), config)
    set_peft_model_state_dict(lora, state)
    close(logits(lora, "bert"), logits(model, "bert"), 1e-5)


def test_it_starts_others_but_no_other_adapter_fits_it(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path)
    lora = get_peft_model(BUILDERS["bert"](), PlainLoraConfig(r=2, target_modules=TARGETS["bert"]))
    warm_start(lora, tmp_path)
    close(logits(lora, "bert"), logits(model, "bert"))
    fresh = adapted()
    before = logits(fresh, "bert")
    with pytest.raises(ConfigError, match="LoraMiniConfig cannot hold a low-rank"):
        warm_start(fresh, lora)
    assert torch.equal(logits(fresh, "bert"), before)


def test_parameters_are_counted_as_they_are_trained(tmp_path: Path) -> None:
    model = trained()
    summary = rank_summary(model)
    lora = get_peft_model(BUILDERS["bert"](), LoraConfig(r=2, target_modules=TARGETS["bert"]))
    assert summary.budget_ranks is None
    assert summary.budget_parameters == sum(p.numel() for p in adapter_only(lora)) > summary.parameters
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert f"{summary.parameters:,} parameters" in card and "`LoraMiniConfig`" in card
    assert read_adapter(tmp_path).parameters == summary.parameters
    config = allocation_to_lora_config(model)
    assert isinstance(config, LoraConfig) and config.r == 2

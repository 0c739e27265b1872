"""The trained allocation as a plain LoraConfig, and a plain LoRA as the start of an adapter of ours."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

from increlora import (
    IncreLoraConfig,
    PlainLoraConfig,
    allocation_to_lora_config,
    attach,
    export_lora,
    rank_summary,
    warm_start,
)
from increlora.errors import BudgetError, ConfigError, DriveError, ExportError
from tests.export.test_export_foreign import adalora, save
from tests.hosts.tiny import BUILDERS, adapter_only, grow, growing, inputs_for, logits
from tests.switches import departing

pytestmark = pytest.mark.filterwarnings("ignore:.* will refuse .*, which holds more:UserWarning")

LINEARS = ["q_proj", "v_proj", "down_proj"]


# ----------------------------------------------------------------------------------------------------------- allocation


def stock(config: LoraConfig, kind: str = "llama") -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*")
        return get_peft_model(BUILDERS[kind](), config)


def layers(model: PeftModel) -> dict[str, nn.Module]:
    return {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "lora_alpha")}


@pytest.fixture(scope="module")
def grown() -> PeftModel:
    config = growing(r=4, lora_alpha=6, target_modules=LINEARS, top_h=3, reserve="none", newborn="lora")
    return grow(get_peft_model(BUILDERS["llama"](), config), "llama", steps=20)


def test_a_stock_lora_gets_the_ranks_and_one_scale(grown: PeftModel, tmp_path: Path) -> None:
    ranks = {m.module: m.active for m in rank_summary(grown).modules}
    assert sum(ranks.values()) == 4 * len(ranks) and len(set(ranks.values())) > 1
    grown.save_pretrained(tmp_path / "adapter")
    for source in (grown, tmp_path / "adapter"):
        config = allocation_to_lora_config(source, lora_dropout=0.1)
        assert type(config) is LoraConfig and (config.r, config.lora_alpha, config.lora_dropout) == (4, 6, 0.1)
        found = layers(stock(config))
        assert {name: layer.r["default"] for name, layer in found.items()} == ranks
        assert {layer.scaling["default"] for layer in found.values()} == {6 / 4}  # α / mean rank, for all
        assert all(layer.lora_B["default"].weight.abs().max() == 0 for layer in found.values())  # fresh


def test_a_rank_stabilised_lora_gets_one_scale_too(grown: PeftModel, tmp_path: Path) -> None:
    """Asked for, and taken over from a LoRA that was so: s = α / √(mean rank), whatever peft divides by."""
    asked = layers(stock(allocation_to_lora_config(grown, use_rslora=True)))
    torch.testing.assert_close([x.scaling["default"] for x in asked.values()], [6 / 4**0.5] * len(asked))
    config = LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=LINEARS, init_lora_weights=False)
    stock(config).save_pretrained(tmp_path / "lora")
    found = layers(stock(allocation_to_lora_config(tmp_path / "lora")))
    torch.testing.assert_close([x.scaling["default"] for x in found.values()], [6 / 4**0.5] * len(found))


def test_alpha_is_the_adapters_own_or_given(grown: PeftModel, tmp_path: Path) -> None:
    model = stock(allocation_to_lora_config(grown, lora_alpha=8))
    assert {layer.scaling["default"] for layer in layers(model).values()} == {2.0}
    config = allocation_to_lora_config(grown)
    json.dumps(config.to_dict() | {"target_modules": sorted(config.target_modules), "runtime_config": None})


def test_modules_without_rank_are_no_targets(tmp_path: Path) -> None:
    model = adalora()
    kept = {name.rpartition(".lora_E")[0]: sum(m) for name, m in model.peft_config["default"].rank_pattern.items()}
    assert 0 in kept.values()
    save(model, tmp_path / "adalora")
    for source in (model, tmp_path / "adalora"):
        found = layers(stock(allocation_to_lora_config(source)))
        assert {name: layer.r["default"] for name, layer in found.items()} == {n: r for n, r in kept.items() if r}
        assert {layer.scaling["default"] for layer in found.values()} == {8 / 3}


def test_no_rank_is_no_allocation() -> None:
    model = get_peft_model(BUILDERS["mlp"](), LoraConfig(target_modules=["up"]))
    with pytest.raises(ExportError, match="no module has any rank"):
        allocation_to_lora_config(model)


# ----------------------------------------------------------------------------------------------------------- warm start


def lora_folder(tmp_path: Path, kind: str = "llama", **options: object) -> Path:
    torch.manual_seed(0)
    settings = {"r": 3, "lora_alpha": 4, "target_modules": LINEARS, "init_lora_weights": False} | options
    get_peft_model(BUILDERS[kind](), LoraConfig(**settings)).save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


def starting(**options: object) -> PeftModel:
    settings = {"r": 6, "total_steps": 24, "warmup_steps": 1, "interval_steps": 2, "target_modules": LINEARS} | options
    return get_peft_model(BUILDERS["llama"](), departing(IncreLoraConfig, **settings))


@pytest.mark.parametrize("options", [
    {"init_r": 3},
    {"init_r": 1, "grow_by": 2},  # 3 ranks are blocks of 1 and 2
    {"init_r": 2, "grow_by": 2},  # a block is filled in part
    {"init_r": 3, "scaling": "active_rank", "scale_epsilon": 1e-5, "start": "published", "newborn": "published"},
])  # fmt: skip
def test_an_adapter_of_ours_starts_where_a_lora_ended_and_grows_on(options: dict, tmp_path: Path) -> None:
    folder = lora_folder(tmp_path, rank_pattern={"layers.1.mlp.down_proj": 2}, use_rslora=True)
    wanted = logits(PeftModel.from_pretrained(BUILDERS["llama"](), str(folder)), "llama")
    model = starting(**options)
    warm_start(model, folder)
    assert (wanted - logits(BUILDERS["llama"](), "llama")).abs().max() > 1e-3
    torch.testing.assert_close(logits(model, "llama"), wanted, rtol=0, atol=1e-5)
    before = rank_summary(model)
    assert model.peft_config["default"].ranks == {m.module: m.active for m in before.modules}
    assert all(m.active >= 2 for m in before.modules) and before.active < before.budget_ranks
    model.save_pretrained(tmp_path / "saved")
    again = PeftModel.from_pretrained(BUILDERS["llama"](), str(tmp_path / "saved"))
    torch.testing.assert_close(logits(again, "llama"), wanted, rtol=0, atol=1e-5)
    grow(model, "llama", steps=24, total_steps=24, lr=1e-3)
    assert rank_summary(model).active == before.budget_ranks == 6 * 6


def test_training_moves_what_was_taken_over(tmp_path: Path) -> None:
    model = starting(init_r=3)
    warm_start(model, lora_folder(tmp_path))
    start, optimizer = {n: p.clone() for n, p in model.named_parameters()}, torch.optim.SGD(adapter_only(model), 0.1)
    attach(model, optimizer)
    model(**inputs_for("llama")).logits.square().mean().backward()
    optimizer.step()
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, start[n])]
    assert moved and all(n.endswith(("A0", "B0", "E0")) for n in moved)


def test_a_module_that_the_source_leaves_out_adds_nothing(tmp_path: Path) -> None:
    folder = lora_folder(tmp_path, target_modules=["q_proj"])
    wanted = logits(PeftModel.from_pretrained(BUILDERS["llama"](), str(folder)), "llama")
    for options in ({"init_lora_weights": False}, {"start": "published"}):
        model = starting(init_r=3, **options)
        warm_start(model, folder)
        torch.testing.assert_close(logits(model, "llama"), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("ranks", [{"r": 6}, {"r": 1, "rank_pattern": {".*_proj": 6}}])
def test_plain_lora_takes_over_a_live_adalora(ranks: dict) -> None:
    source = adalora()
    config = PlainLoraConfig(lora_alpha=5, target_modules=LINEARS, **ranks)
    model = inject_adapter_in_model(config, BUILDERS["llama"]())
    warm_start(model, source)
    torch.testing.assert_close(logits(model, "llama"), logits(source, "llama"), rtol=0, atol=1e-5)


def test_our_export_with_a_trained_head(tmp_path: Path) -> None:
    options = {"target_modules": ["query", "dense"], "modules_to_save": ["classifier"]}
    source = grow(get_peft_model(BUILDERS["bert"](), growing(**options)), "bert")
    export_lora(source, tmp_path / "lora")
    model = get_peft_model(BUILDERS["bert"](), IncreLoraConfig(r=6, grow_by=1, **options))
    warm_start(model, tmp_path / "lora")
    assert (logits(source, "bert") - logits(BUILDERS["bert"](), "bert")).abs().max() > 1e-3
    torch.testing.assert_close(logits(model, "bert"), logits(source, "bert"), rtol=0, atol=1e-5)
    bare = get_peft_model(BUILDERS["bert"](), IncreLoraConfig(**options | {"r": 6, "modules_to_save": None}))
    with pytest.raises(ConfigError, match=r"holds classifier.bias of shape .2,., here is nothing: .*`modules_to_save`"):
        warm_start(bare, tmp_path / "lora")


@pytest.mark.parametrize("kind", [PlainLoraConfig, IncreLoraConfig])
@pytest.mark.parametrize("given", ["q_proj", "embed_tokens"])
def test_ranks_of_an_embedding_that_the_source_does_not_fill_learn(given: str, kind: type) -> None:
    source = get_peft_model(BUILDERS["llama"](), LoraConfig(r=2, target_modules=f".*{given}", init_lora_weights=False))
    options = {"total_steps": 40, "init_r": 4} if kind is IncreLoraConfig else {}
    model = get_peft_model(BUILDERS["llama"](), kind(r=4, target_modules=["q_proj", "embed_tokens"], **options))
    warm_start(model, source)
    wanted = logits(source, "llama")
    assert (wanted - logits(BUILDERS["llama"](), "llama")).abs().max() > 1e-3
    torch.testing.assert_close(logits(model, "llama"), wanted, rtol=0, atol=1e-5)
    model.train()(**inputs_for("llama")).logits.square().mean().backward()
    A = next(p for n, p in model.named_parameters() if n.endswith("embed_tokens.lora_delta.default.lora_A0"))
    assert (A.grad.abs().amax(1) > 0).tolist() == [True] * 4


def test_an_adapted_embedding_is_taken_over_beside_its_base_weights(tmp_path: Path) -> None:
    targets = {"target_modules": ["embed_tokens", "lm_head"]}
    source = get_peft_model(BUILDERS["llama"](), PlainLoraConfig(r=2, init_lora_weights=False, **targets))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers`")
        export_lora(source, tmp_path / "lora")
        source.save_pretrained(tmp_path / "own")
    for folder in ("lora", "own"):
        model = get_peft_model(BUILDERS["llama"](), PlainLoraConfig(r=4, **targets))
        warm_start(model, tmp_path / folder)
        torch.testing.assert_close(logits(model, "llama"), logits(source, "llama"), rtol=0, atol=1e-5)
    other = BUILDERS["llama"]()
    with torch.no_grad():
        other.model.embed_tokens.weight[5, 3] += 1e-3
    with pytest.raises(
        ConfigError, match=r"holds model\.embed_tokens\.base_layer\.weight .*load the base weights that"
    ):
        warm_start(get_peft_model(other, PlainLoraConfig(r=4, **targets)), tmp_path / "lora")


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"capacity": 2, "r": 2}, ConfigError, "q_proj: the source has rank 3, this adapter has room for 2: raise `cap"),
    ({"r": 2, "grow_by": 1}, BudgetError, "budget of 12 ranks is below the start of 18"),
    ({"target_modules": ["q_proj"]}, ConfigError, "the source adapts .*down_proj.*: add it to `target_modules`"),
])  # fmt: skip
def test_what_does_not_fit_is_named_and_nothing_is_changed(
    options: dict, error: type[Exception], message: str, tmp_path: Path
) -> None:
    model = starting(**options)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(error, match=message):
        warm_start(model, lora_folder(tmp_path))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert {m.active for m in rank_summary(model).modules} == {1}


def test_a_trained_adapter_and_another_model_are_refused(tmp_path: Path) -> None:
    model = starting()
    grow(model, "llama", steps=1)
    with pytest.raises(DriveError, match="has been trained already: call warm_start on a fresh adapter"):
        warm_start(model, lora_folder(tmp_path))
    small = get_peft_model(BUILDERS["mlp"](), LoraConfig(target_modules=["up"], init_lora_weights=False))
    turned = nn.ModuleDict({"up": nn.Linear(9, 12)})
    with pytest.raises(ConfigError, match=r"up maps \(9, 12\) \(in, out\), in the source \(8, 12\)"):
        warm_start(get_peft_model(turned, PlainLoraConfig(target_modules=["up"])), small)

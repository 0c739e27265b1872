"""Rank-stabilised scaling: the field that LoRA users know, with the same meaning where the rank is fixed."""

import math
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from increlora import (
    AdaLoraConfig,
    IncreLoraConfig,
    LoraMiniConfig,
    LortaConfig,
    MeLoraConfig,
    MoraConfig,
    PlainLoraConfig,
    PriLoraConfig,
    SoraConfig,
    allocation_to_lora_config,
    rank_summary,
)
from increlora.errors import ConfigError
from tests.hosts.stock import assert_exports_compute_the_same
from tests.hosts.tiny import BUILDERS, grow
from tests.hosts.training import deltas
from tests.switches import departing

LINEARS = ["q_proj", "v_proj", "down_proj"]
ALPHA, R = 6, 4
# Options, and what α is divided by the root of; None: the module's own rank.
ROWS: list[tuple[type, dict[str, Any], float | None]] = [
    (PlainLoraConfig, {}, R),
    (PlainLoraConfig, {"rank_pattern": {"v_proj": 2}}, None),
    (IncreLoraConfig, {}, R),
    (IncreLoraConfig, {"total_ranks": 15}, 15 / 6),
    (IncreLoraConfig, {"scaling": "active_rank", "scale_epsilon": 1e-5}, 1 + 1e-5),
    (AdaLoraConfig, {}, R),
    (AdaLoraConfig, {"scaling": "initial_rank", "init_r": 5}, 5),
    (SoraConfig, {}, R),
    (SoraConfig, {"scaling": "initial_rank", "init_r": 5}, 5),
    (PriLoraConfig, {}, None),
    (PriLoraConfig, {"scaling": "constant"}, R),
    (MeLoraConfig, {"minis": 2}, R),  # the rank of one mini adapter
    (LoraMiniConfig, {"inner_in": 8, "inner_out": 8}, R),
    (LortaConfig, {"target_modules": ["q_proj", "v_proj"]}, R),
]


def config_for(config_cls: type, **options: Any) -> Any:
    chosen = {"r": R, "lora_alpha": ALPHA, "target_modules": LINEARS, "use_rslora": True, "init_lora_weights": False}
    return departing(config_cls, **chosen | options)


@pytest.mark.parametrize(("config_cls", "options", "over"), ROWS)
def test_the_scale_of_every_method(config_cls: type, options: dict, over: float | None) -> None:
    found = deltas(get_peft_model(BUILDERS["llama"](), config_for(config_cls, **options)))
    assert len(found) == len(options.get("target_modules", LINEARS)) * 2
    assert [d.scale for d in found] == pytest.approx([ALPHA / math.sqrt(over or d.rank) for d in found], rel=1e-12)
    off = get_peft_model(BUILDERS["llama"](), config_for(config_cls, **options, use_rslora=False))
    assert [d.scale for d in deltas(off)] == pytest.approx([ALPHA / (over or d.rank) for d in found], rel=1e-12)


def test_a_fixed_rank_has_the_scale_of_pefts_lora() -> None:
    ours = get_peft_model(BUILDERS["llama"](), config_for(PlainLoraConfig))
    stock = get_peft_model(BUILDERS["llama"](), config_for(LoraConfig))
    theirs = {m.scaling["default"] for m in stock.modules() if isinstance(m, LoraLayer)}
    assert theirs == {d.scale for d in deltas(ours)} == {3.0}


@pytest.mark.parametrize(("config_cls", "options"), {cls: (cls, options) for cls, options, _ in ROWS}.values())
def test_exports_fold_the_scale(config_cls: type, options: dict, tmp_path: Path) -> None:
    model = get_peft_model(BUILDERS["llama"](), config_for(config_cls, **options))
    model.save_pretrained(tmp_path / "native")
    ranks = {delta.name: len(delta.factors()[0]) for delta in deltas(model)}
    assert_exports_compute_the_same(model, "llama", tmp_path / "native", ranks)


def test_the_scale_stays_while_ranks_grow() -> None:
    model = get_peft_model(BUILDERS["llama"](), config_for(IncreLoraConfig, warmup_steps=1, interval_steps=1))
    grow(model, "llama", steps=20, total_steps=20)
    assert rank_summary(model).active == R * 6
    assert {d.scale for d in deltas(model)} == {ALPHA / math.sqrt(R)}


def test_an_allocation_keeps_the_scale() -> None:
    model = get_peft_model(BUILDERS["llama"](), config_for(IncreLoraConfig, init_r=R))
    config = allocation_to_lora_config(model)
    scales = {config.alpha_pattern[name] / rank for name, rank in config.rank_pattern.items()}
    assert scales == {ALPHA / math.sqrt(R)} and not config.use_rslora


def test_mora_has_no_scale_to_stabilise() -> None:
    with pytest.raises(ConfigError, match="MoraConfig: use_rslora=True is not supported: leave it out: MoRA"):
        MoraConfig(use_rslora=True)


def test_presets_take_the_field_as_any_other() -> None:
    model = get_peft_model(BUILDERS["llama"](), IncreLoraConfig.paper(r=2, use_rslora=True, target_modules=LINEARS))
    assert {d.scale for d in deltas(model)} == {16 / math.sqrt(1 + 1e-5)}

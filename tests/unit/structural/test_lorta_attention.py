"""LoRTA: where a module stands in attention, told from its name, and what is refused."""

import pytest
import torch

from increlora import LortaConfig
from increlora.errors import ConfigError
from increlora.methods import Site
from increlora.structural.lorta.attention import find, key_heads
from increlora.structural.lorta.delta import TensorBank, TensorDelta
from increlora.structural.lorta.method import Lorta
from tests.unit.structural.test_lorta import ORIENTATIONS, delta_of, random_bank

# ---- names


@pytest.mark.parametrize(("name", "block", "roles"), [
    ("model.layers.3.self_attn.k_proj", "model.layers.3.self_attn", "k"),
    ("model.layers.3.self_attn.o_proj", "model.layers.3.self_attn", "o"),
    ("model.layers.3.self_attn.qkv_proj", "model.layers.3.self_attn", "qkv"),
    ("bert.encoder.layer.11.attention.self.query", "bert.encoder.layer.11.attention", "q"),
    ("bert.encoder.layer.11.attention.output.dense", "bert.encoder.layer.11.attention", "o"),
    ("bert.encoder.layer.1.crossattention.output.dense", "bert.encoder.layer.1.crossattention", "o"),
    ("deberta.encoder.layer.0.attention.self.value_proj", "deberta.encoder.layer.0.attention", "v"),
    ("transformer.h.0.attn.c_attn", "transformer.h.0.attn", "qkv"),
    ("transformer.h.0.attn.c_proj", "transformer.h.0.attn", "o"),
    ("transformer.h.0.attn.attention.out_proj", "transformer.h.0.attn.attention", "o"),
    ("transformer.h.0.attn.attention.q_proj", "transformer.h.0.attn.attention", "q"),
    ("transformer.layer.0.attention.q_lin", "transformer.layer.0.attention", "q"),
    ("model.decoder.layers.0.encoder_attn.q_proj", "model.decoder.layers.0.encoder_attn", "q"),
    ("model.decoder.layers.0.encoder_attn.out_proj", "model.decoder.layers.0.encoder_attn", "o"),
    ("model.decoder.layers.0.self_attn.out_proj", "model.decoder.layers.0.self_attn", "o"),
    ("decoder.block.0.layer.1.EncDecAttention.o", "decoder.block.0.layer.1.EncDecAttention", "o"),
    ("q_proj", "", "q"),
    ("layers.0.wq", "layers.0", "q"), ("layers.0.mix.wq", "layers.0.mix", "q"),
    ("layers.0.mix.out.wo", "layers.0.mix", "o"),
    ("model.layers.0.self_attn.v_proj", "model.layers.0.self_attn", "k"),  # own entries come first
])  # fmt: skip
def test_names_tell_block_and_role(name: str, block: str, roles: str) -> None:
    own = {"wq": "q", "mix.out.wo": "o"} | ({"v_proj": "k"} if roles == "k" else {})
    assert find(name, own) == (block, roles)


@pytest.mark.parametrize("name", [
    "bert.encoder.layer.0.output.dense", "bert.encoder.layer.0.intermediate.dense", "bert.pooler.dense",
    "transformer.h.0.mlp.c_proj", "model.layers.0.mlp.up_proj", "lm_head", "classifier.out_proj", "classifier.dense",
    "backbone.layers.0.mixer.out_proj", "layers.0.mlp.Wo", "gpt_neox.layers.0.attention.query_key_value",
    "deberta.encoder.layer.0.attention.self.pos_key_proj", "transformer.h.0.attn.qkv_proj",
])  # fmt: skip
def test_other_names_mean_nothing(name: str) -> None:
    """Trap 4.13: a feed-forward `dense` or `c_proj` is no projection of attention."""
    assert find(name, {}) is None


@pytest.mark.parametrize(("roles", "out", "heads", "head_dim", "found"), [
    ("q", 8, 4, 2, 4), ("q", 6, 4, 2, None), ("q", 9, 4, 2, None), ("k", 4, 4, 2, 2), ("k", 6, 4, 2, None),
    ("k", 0, 4, 2, None), ("kv", 8, 4, 2, 2), ("qkv", 24, 4, 2, 4), ("qkv", 12, 4, 2, 1), ("qkv", 14, 4, 2, None),
    ("qkv", 8, 4, 2, None), ("qk", 12, 4, 2, 2), ("q", 16, 4, 2, None), ("k", 16, 4, 2, None),
])  # fmt: skip
def test_heads_of_keys_follow_from_the_shape(roles, out, heads, head_dim, found) -> None:
    assert key_heads(roles, out, heads, head_dim) == found


# ---- refusals


def make(name: str, shape: tuple[int, int], bank: TensorBank | None = None, **options) -> TensorDelta:
    config = Lorta(**{"r": 5, "heads": 4, "head_dim": 2} | options)
    peers = ((name, *shape), ("layers.1.self_attn.q_proj", 6, 8), ("layers.2.self_attn.q_proj", 6, 8))
    site = Site(name, *shape, 1, sum(shape), torch.float64, peers, bank or random_bank())
    return config.method(1, sum(shape)).make_delta(site)


@pytest.mark.parametrize(("name", "shape", "options", "message"), [
    ("layers.0.mlp.up", (6, 8), {}, "up: not known as a projection .*matrices={'up': 'q'}.*target_modules"),
    ("h.0.attention.query_key_value", (6, 24), {}, "in turns, head by head.*{'query_key_value': 'qkv'}"),
    ("layers.0.self_attn.q_proj", (7, 8), {}, "q_proj: width 7, but the factor that all modules share has 6"),
    ("layers.0.self_attn.o_proj", (8, 7), {}, "o_proj: width 7, but the factor"),
    ("layers.0.self_attn.q_proj", (6, 10), {}, "q_proj: 10 features are not q of 4 heads of 2: set `heads`"),
    ("layers.0.self_attn.o_proj", (10, 6), {}, "o_proj: 10 features are not o of 4 heads of 2"),
    ("layers.0.self_attn.k_proj", (6, 6), {}, "k_proj: 6 features are not k of 4 heads of 2"),
    ("layers.0.self_attn.q_proj", (6, 8), {"orientation": "official_peft"}, "head_dim = 4 · 2 to be the width 6"),
    ("layers.0.self_attn.q_proj", (6, 8), {"orientation": "official_litgpt"}, "use orientation='head_aligned'"),
    ("layers.0.self_attn.q_proj", (6, 8), {"layers": ["a", "b"]}, "self_attn is none of `layers` .*new config"),
])  # fmt: skip
def test_modules_that_are_no_slices_are_refused(name, shape, options, message) -> None:
    """4.4, 4.13, 4.9."""
    with pytest.raises(ConfigError, match=message):
        make(name, shape, **options)


@pytest.mark.parametrize("missing", ["heads", "head_dim"])
def test_heads_that_nothing_says_are_refused(missing: str) -> None:
    sites = [Site("layers.0.self_attn.q_proj", 6, 8)]
    with pytest.raises(ConfigError, match=f"q_proj: {missing} is not given, .*set `{missing}`"):
        Lorta(**{"heads": 4, "head_dim": 2, missing: None}).make_shared(sites)


def test_the_official_orientations_know_no_grouped_queries() -> None:
    """4.3."""
    for orientation in ORIENTATIONS[1:]:
        with pytest.raises(ConfigError, match="as many heads for k and v"):
            make("layers.0.self_attn.k_proj", (8, 4), random_bank(8), orientation=orientation)
        assert make("layers.0.self_attn.k_proj", (8, 8), random_bank(8), orientation=orientation).rank == 5


def test_factors_without_modules_are_refused() -> None:
    with pytest.raises(ConfigError, match="name them in `target_modules`"):
        Lorta(heads=4, head_dim=2).make_shared([])


def test_any_rank_is_allowed() -> None:
    """4.5: the rank of a tensor may exceed each of its sides."""
    assert delta_of(random_bank(r=40), "q").weight().shape == (8, 6)


@pytest.mark.parametrize(("options", "message"), [
    ({"r": 0}, "r=0: give an int of at least 1"),
    ({"heads": 0}, "heads=0"), ({"head_dim": 2.0}, "head_dim=2.0"),
    ({"lora_dropout": 1.0}, "lora_dropout=1.0"),
    ({"orientation": "official"}, "orientation='official': give one of head_aligned"),
    ({"init": "zero"}, "init='zero'"), ({"init_scale": -1.0}, "init_scale=-1.0"),
    ({"matrices": {"up": "mlp"}}, "matrices: up='mlp': give 'q'"), ({"matrices": {"up": ""}}, "matrices: up=''"),
    ({"matrices": {"up": "qq"}}, "matrices: up='qq'"), ({"matrices": {"up": "qo"}}, "matrices: up='qo'"),
    ({"layers": []}, r"layers=\[\]"), ({"layers": ["a", "a"]}, "each once"),
    ({"rank_pattern": {"query": 2}}, "rank_pattern=.*is not supported"),  # 4.6
    ({"use_dora": True}, "use_dora=True is not supported"),  # 4.10
])  # fmt: skip
def test_bad_settings_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LortaConfig(**options)


def test_alpha_by_name() -> None:
    """4.6: the scale alone may differ."""
    assert delta_of(random_bank(), "v", alpha=5, alpha_pattern={"v_proj": 20}).scale == 4
    assert delta_of(random_bank(), "q", alpha=5, alpha_pattern={"v_proj": 20}).scale == 1


def test_the_preset_is_the_published_run() -> None:
    """4.15."""
    paper = LortaConfig.paper(4, heads=2)
    assert (paper.r, paper.lora_alpha, paper.orientation, paper.lora_dropout) == (4, 1.0, "official_peft", 0.0)
    assert (paper.init, paper.init_scale, paper.heads) == ("official", 0.0, 2)
    assert LortaConfig.paper().settings() == Lorta.paper() and LortaConfig().orientation == "head_aligned"

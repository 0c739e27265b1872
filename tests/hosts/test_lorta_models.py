"""LoRTA on real architectures: heads, layers and projections are found in the model, or the model is refused."""

import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.optim import SGD
from transformers import (
    BartConfig,
    BartModel,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from increlora import LortaConfig
from increlora.errors import ConfigError
from increlora.structural.lorta.delta import TensorDelta
from tests.hosts.test_lorta import BUILDERS, KINDS, SIZES, adapted, bank, close, grouped
from tests.hosts.tiny import adapter_only, seeded
from tests.hosts.training import deltas, train
from tests.reference.attention import ARCHITECTURE, AttentionNet


@pytest.mark.parametrize("kind", KINDS)
def test_the_architecture_is_found_in_the_model(kind: str, tmp_path: Path) -> None:
    model, (d, d_h, H, L, modules) = adapted(kind), SIZES[kind]
    assert [tuple(p.shape) for p in bank(model).parameters()] == [(d, 3), (d_h, 3), (H, 3), (4, 3), (L, 3)]
    assert len(deltas(model)) == modules and all(type(delta) is TensorDelta for delta in deltas(model))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["heads"], config["head_dim"], len(config["layers"])) == (H, d_h, L)


def test_layers_count_although_nothing_in_them_is_adapted() -> None:
    """4.6: and a subset of the projections leaves four rows for them."""
    model = adapted("llama", target_modules=["q_proj", "v_proj"], layers_to_transform=[1])
    assert [d.layer for d in deltas(model)] == [1, 1] and bank(model).lora_C_layer.shape == (2, 3)
    train(model, "llama", optimizer=SGD(adapter_only(model), lr=0.1), stop=2)
    start = bank(adapted("llama"))
    assert torch.equal(bank(model).lora_C_layer[0], start.lora_C_layer[0])
    assert torch.equal(bank(model).lora_C_matrix[[1, 3]], start.lora_C_matrix[[1, 3]])
    assert not torch.equal(bank(model).lora_C_matrix[[0, 2]], start.lora_C_matrix[[0, 2]])


def test_encoder_and_decoder_are_layers_of_one_stack() -> None:
    model = adapted("t5")
    places = {d.name.rpartition(".")[0]: d.layer for d in deltas(model)}
    assert places == {
        **{f"encoder.block.{i}.layer.0.SelfAttention": i for i in (0, 1)},
        **{f"decoder.block.{i}.layer.0.SelfAttention": 2 + 2 * i for i in (0, 1)},
        **{f"decoder.block.{i}.layer.1.EncDecAttention": 3 + 2 * i for i in (0, 1)},
    }


def test_another_stack_beside_it_is_not_counted() -> None:
    """As of a vision tower, whose width is another."""
    net = seeded(lambda: nn.ModuleDict({"tower": AttentionNet(width=5), "language": AttentionNet(layers=3)}))
    config = LortaConfig(r=2, target_modules=r"language\..*_proj", **ARCHITECTURE)
    assert bank(get_peft_model(net, config)).lora_C_layer.shape == (3, 2)
    with pytest.raises(ConfigError, match="width 8, but the factor that all modules share has 5"):
        get_peft_model(
            seeded(lambda: nn.ModuleDict({"tower": AttentionNet(width=5), "language": AttentionNet()})),
            LortaConfig(r=2, target_modules="all-linear", **ARCHITECTURE),
        )


def test_bert_has_one_dense_that_is_a_projection() -> None:
    names = {d.name.partition("layer.0.")[2] for d in deltas(adapted("bert"))} - {""}
    assert names == {*(f"attention.self.{n}" for n in ("query", "key", "value")), "attention.output.dense"}
    base = BUILDERS["bert"]()
    with pytest.raises(ConfigError, match="layer.0.intermediate.dense: not known as a projection"):
        get_peft_model(base, LortaConfig(target_modules=["query", "dense"]))
    assert type(base.bert.encoder.layer[0].attention.self.query) is nn.Linear


def test_phi_3_stacks_its_projections() -> None:
    config = Phi3Config(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = get_peft_model(
        seeded(lambda: Phi3ForCausalLM(config)), LortaConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    )
    parts = {d.name.rpartition(".")[2]: d.parts for d in deltas(model)}
    assert parts == {"qkv_proj": ((0, 4), (1, 2), (2, 2)), "o_proj": ((3, 4),)}


def test_gpt_2_in_rows_of_its_own_order() -> None:
    """4.9: c_attn's outputs are q, k and v; its weight is stored as (in, out)."""
    model = adapted("gpt2", init_lora_weights=False)
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    assert layer.get_delta_weight("default").shape == layer.get_base_weight().shape == (16, 48)
    one = bank(model)
    for m in range(3):
        g = 8 / 3 * one.lora_C_matrix[m] * one.lora_C_layer[0]
        E = torch.cat([one.lora_C_head[h] * one.lora_B for h in range(2)])
        close(layer.get_delta_weight("default")[:, 16 * m : 16 * (m + 1)].T, E * g @ one.lora_A.T)


def neox() -> nn.Module:
    return GPTNeoXForCausalLM(GPTNeoXConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2))  # fmt: skip


def big_code() -> nn.Module:
    return GPTBigCodeForCausalLM(GPTBigCodeConfig(vocab_size=64, n_embd=16, n_layer=2, n_head=2, multi_query=False))


def uneven() -> nn.Module:
    return BartModel(BartConfig(
        vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=4, encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=16,
    ))  # fmt: skip


@pytest.mark.parametrize(("build", "options", "message"), [
    (neox, {}, "layers.0.attention.query_key_value: .*in turns, head by head"),
    (big_code, {}, "c_attn: q, k and v of a GPTBigCode without multi_query take turns"),
    (uneven, {}, "2 heads in the encoder and 4 in the decoder: .*set `heads` and `head_dim`"),
    (BUILDERS["mlp"], {"target_modules": ["up"]}, "up: not known as a projection"),
    (BUILDERS["mlp"], {"target_modules": ["up"], "matrices": {"up": "q"}}, "up: heads is not given"),
    (BUILDERS["llama"], {"heads": 4}, "q_proj: 16 features are not q of 4 heads of 8|head_dim"),
    (BUILDERS["llama"], {"head_dim": 4}, "q_proj: 16 features are not q of 2 heads of 4"),
    (grouped, {"orientation": "official_peft"}, r"q_proj: orientation='official_peft' wants heads · head_dim = 4 · 6"),
    (grouped, {"layers": ["other"]}, "self_attn is none of `layers`"),
])  # fmt: skip
def test_what_is_refused_leaves_the_model_as_it_was(build, options, message) -> None:
    base = build()
    before = {n: type(m) for n, m in base.named_modules()}
    with pytest.raises(ConfigError, match=message):
        get_peft_model(base, LortaConfig(**{"target_modules": "all-linear"} | options))
    assert {n: type(m) for n, m in base.named_modules()} == before


def test_a_part_of_uneven_stacks_can_be_adapted() -> None:
    model = get_peft_model(uneven(), LortaConfig(
        r=2, target_modules=r"decoder\..*(q|k|v)_proj", heads=4, head_dim=4))  # fmt: skip
    assert len(deltas(model)) == 6


def test_bart_has_a_layer_for_every_attention() -> None:
    config = BartConfig(
        vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=16,
    )  # fmt: skip
    model = get_peft_model(BartModel(config), LortaConfig(r=2, target_modules="all-linear"))
    assert len(deltas(model)) == 20 and len({d.layer for d in deltas(model)}) == 5


def test_a_net_of_ones_own_says_what_it_is() -> None:
    net = seeded(AttentionNet)
    renamed = nn.ModuleDict({"wq": net.layers[0].q_proj, "wo": net.layers[0].o_proj})
    model = get_peft_model(renamed, LortaConfig(
        r=2, target_modules=["wq", "wo"], matrices={"wq": "q", "wo": "o"}, **ARCHITECTURE))  # fmt: skip
    assert {d.name: d.heads_out for d in deltas(model)} == {"wq": True, "wo": False}

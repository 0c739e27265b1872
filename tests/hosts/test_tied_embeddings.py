"""Embeddings at the ends of a language model: tied weights, merging, saving; and what only looks like an embedding."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM, OPTConfig, OPTForCausalLM

from increlora import IncreLoraConfig, PlainLoraConfig, export_lora, export_merged
from increlora.errors import CheckpointError, ConfigError
from increlora.hosts.peft.layer import adapter_layers
from tests.hosts.bases import LLAMA
from tests.hosts.tiny import BUILDERS, logits, seeded
from tests.hosts.vision import TARGETS, net

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings"),  # peft, of merging: it is right here
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied"),  # the config follows
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:.*will refuse .*more than low-rank factors"),
]
ENDS = (["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"])


def llama(*, tied: bool = True) -> nn.Module:
    config = type(LLAMA)(**LLAMA.to_dict() | {"tie_word_embeddings": tied})
    return seeded(lambda: LlamaForCausalLM(config)).double()


def adapted(targets: list[str], *, tied: bool = True) -> PeftModel:
    config = PlainLoraConfig(r=2, target_modules=[*targets, "q_proj"], init_lora_weights=False)
    return get_peft_model(llama(tied=tied), config)


@pytest.mark.parametrize("targets", ENDS, ids=str)
def test_a_merge_leaves_what_is_tied_alone(targets: list[str], tmp_path: Path) -> None:
    model = adapted(targets)
    base = model.get_base_model()
    ends = base.get_input_embeddings(), base.get_output_embeddings()
    expected, weight = logits(model, "llama"), ends[0].weight.clone()
    assert (expected - logits(llama(), "llama")).abs().max() > 1e-3
    for _ in range(3):
        model.merge_adapter()
        torch.testing.assert_close(logits(model, "llama"), expected, rtol=0, atol=1e-12)
        model.unmerge_adapter()
        assert ends[0].weight is ends[1].weight and torch.equal(ends[0].weight, weight)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, "llama"), expected, rtol=0, atol=1e-12)
    merged.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(logits(again, "llama"), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("config_cls", [IncreLoraConfig, LoraConfig])
def test_a_merged_model_leaves_as_it_is(config_cls: Any, tmp_path: Path) -> None:
    """`export_merged` of a model whose adapter is merged already adds nothing twice, and does not unmerge it."""
    options = {"total_steps": 10} if config_cls is IncreLoraConfig else {}
    config = config_cls(r=2, target_modules=["q_proj"], init_lora_weights=False, **options)
    model = get_peft_model(BUILDERS["llama"](), config)
    expected = logits(model, "llama")
    model.merge_adapter()
    again = LlamaForCausalLM.from_pretrained(export_merged(model, tmp_path / "merged"))
    torch.testing.assert_close(logits(again, "llama"), expected, rtol=0, atol=1e-6)
    assert (logits(BUILDERS["llama"](), "llama") - expected).abs().max() > 1e-4
    torch.testing.assert_close(logits(model, "llama"), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("targets", ENDS[:2], ids=str)
def test_what_is_saved_beside_the_adapter_must_not_be_merged(targets: list[str], tmp_path: Path) -> None:
    model = adapted(targets, tied=False)
    expected = logits(model, "llama")
    model.merge_adapter()
    for write, name in ((model.save_pretrained, "native"), (lambda folder: export_lora(model, folder), "lora")):
        with pytest.raises(CheckpointError, match=rf"{targets[0]}.*unmerge_adapter first"):
            write(tmp_path / name)
    model.unmerge_adapter()
    model.save_pretrained(tmp_path / "native")
    for folder in (tmp_path / "native", export_lora(model, tmp_path / "lora")):
        again = PeftModel.from_pretrained(llama(tied=False), folder)
        torch.testing.assert_close(logits(again, "llama"), expected, rtol=0, atol=1e-12)


def test_pefts_conversion_is_not_promised() -> None:
    model = get_peft_model(net(), PlainLoraConfig(r=2, target_modules=TARGETS))
    layers = adapter_layers(model.base_model.model, "default")
    assert {name: layer.supports_lora_conversion() for name, layer in layers.items()} == {
        "embed": False, "conv": False, "head": True,
    }  # fmt: skip
    assert not model.base_model.supports_lora_conversion()
    assert get_peft_model(net(), PlainLoraConfig(r=2, target_modules=["head"])).base_model.supports_lora_conversion()


class Standardised(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight, self.bias)


OPT = OPTConfig(
    vocab_size=32, hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=8,
    word_embed_proj_dim=8, pad_token_id=1, bos_token_id=2, eos_token_id=2,
)  # fmt: skip


@pytest.mark.parametrize(
    ("make", "target", "message"),
    [
        (lambda: OPTForCausalLM(OPT), "embed_positions", "OPTLearnedPositionalEmbedding is not a plain nn.Embedding"),
        (lambda: nn.ModuleDict({"conv": Standardised(2, 3, 3)}), "conv", "Standardised is not a plain nn.Conv2d"),
        (lambda: nn.TransformerEncoderLayer(8, 2), "out_proj", "never called.*modules_to_save"),
    ],
)
def test_modules_that_compute_something_of_their_own_are_refused(make: Any, target: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"{target}.*{message}"):
        get_peft_model(make(), PlainLoraConfig(r=1, target_modules=[target]))


def test_all_linear_leaves_out_what_is_never_called() -> None:
    model = get_peft_model(nn.TransformerEncoderLayer(8, 2, 16), PlainLoraConfig(r=1, target_modules="all-linear"))
    assert model.peft_config["default"].target_modules == {"linear1", "linear2"}

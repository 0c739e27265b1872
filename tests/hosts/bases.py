"""Tiny models built from configs, without any download, and without increlora: strangers read them too."""

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

LLAMA = LlamaConfig(
    vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
GPT2 = GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2)
BERT = BertConfig(
    vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=32, num_labels=2,
)  # fmt: skip
T5 = T5Config(
    vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0, pad_token_id=0,
)  # fmt: skip


class Mlp(nn.Module):
    """Two residual layers of unequal width, without transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.down(torch.relu(self.up(x))))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


def build_mlp() -> nn.Module:
    return seeded(Mlp)


def build_llama() -> nn.Module:
    return seeded(lambda: LlamaForCausalLM(LLAMA))


def build_gpt2() -> nn.Module:
    return seeded(lambda: GPT2LMHeadModel(GPT2))


def build_bert() -> nn.Module:
    return seeded(lambda: BertForSequenceClassification(BERT))


def build_t5() -> nn.Module:
    return seeded(lambda: T5ForConditionalGeneration(T5))


BUILDERS = {"mlp": build_mlp, "llama": build_llama, "gpt2": build_gpt2, "bert": build_bert, "t5": build_t5}


def inputs_for(kind: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if kind == "mlp":
        return {"x": torch.randn(4, 8, generator=generator)}
    ids = torch.randint(3, 64, (2, 6), generator=generator)
    return {"input_ids": ids, "labels": ids} if kind == "t5" else {"input_ids": ids}


@torch.no_grad()
def logits(model: nn.Module, kind: str) -> Tensor:
    """Output in evaluation mode; the mode is restored."""
    was = model.training
    output = model.eval()(**inputs_for(kind))
    model.train(was)
    return output if isinstance(output, Tensor) else output.logits


def write_character_bert(folder: Path) -> None:
    """A two-layer BERT with one token per character."""
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *map(chr, range(33, 127))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=32, **size)).save_pretrained(folder)

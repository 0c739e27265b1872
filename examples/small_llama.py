"""A small decoder for the examples beside it, made on the spot: they run where no hub is in reach.

Its weights are random, so it shows how a run goes and not what a method is worth."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
LENGTH = 512
CONFIG = LlamaConfig(
    vocab_size=256 + len(SPECIAL), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=LENGTH, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def small_causal(folder: str | Path) -> str:
    """The folder with a small Llama and its tokenizer, one token per byte; written unless it is there.

    The weights are the same each time; torch's random state is left as it was."""
    if not Path(folder, "config.json").exists():
        byte_tokenizer().save_pretrained(folder)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            LlamaForCausalLM(CONFIG).save_pretrained(folder)
    return str(folder)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every text has tokens, and they spell it again."""
    words = [*SPECIAL.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=LENGTH, **SPECIAL)

"""Base models for peft's transformer suites, made from configs: a folder each, under the name that tests load."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)  # fmt: skip

LLAMA, GPT2, T5, BERT = "tiny/llama", "tiny/gpt2", "tiny/t5", "tiny/bert"
WIDTH = 64  # peft raises r to 20 in one test, and the smallest projection, Llama's v, has half of it
MADE: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    LLAMA: (LlamaForCausalLM, LlamaConfig, {
        "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}),
    GPT2: (GPT2LMHeadModel, GPT2Config, {
        "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 0}),
    T5: (T5ForConditionalGeneration, T5Config, {
        "d_model": WIDTH, "d_kv": 16, "d_ff": 32, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}),
    BERT: (BertForSequenceClassification, BertConfig, {
        "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64}),
}  # fmt: skip


def make_bases(folder: Path) -> None:
    """Write all of them below `folder`."""
    for name, (model_cls, config_cls, options) in MADE.items():
        torch.manual_seed(0)
        model_cls(config_cls(vocab_size=64, **options)).save_pretrained(folder / name)

"""What `lm` and `sft` share: tokens around a text, padding, and the loss of a causal language model."""

import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from .base import Batches

IGNORED = -100  # a label without a loss, in torch and transformers


def borders(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The token that this tokenizer puts before every text, and its end token; empty where it has none."""
    first, end = tokenizer("").input_ids[:1], tokenizer.eos_token_id
    return first if first == [tokenizer.bos_token_id] else [], [] if end is None else [end]


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text alone, without opening and ending, however long."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids


def right_padding(tokenizer: PreTrainedTokenizerBase) -> DataCollatorForSeq2Seq:
    """Pads behind the text: padding in front would shift learned positions, and some tokenizers prefer it."""
    padding = copy.copy(tokenizer)
    padding.padding_side = "right"
    return DataCollatorForSeq2Seq(padding, label_pad_token_id=IGNORED)


def causal_loss(model: nn.Module, batches: Batches) -> dict[str, float]:
    """Mean negative log-likelihood in nats over all predicted tokens of all batches, and its exponential.

        eval_loss = −1/n · Σ log p(token | tokens before it)        perplexity = exp(eval_loss)

    n counts the labels that are not −100, so a short text weighs less than a long one, and padding nothing."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        labels = batch.pop("labels")[:, 1:].flatten()
        logits = model(**batch).logits[:, :-1].flatten(0, 1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total += F.cross_entropy(logits, labels, reduction="none").cpu().double().sum()
        count += int((labels != IGNORED).sum())
    return {"eval_loss": float(total / count), "perplexity": float((total / count).exp())}

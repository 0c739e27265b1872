"""Task `lm`: causal language modelling on any text.

Each row of a table is a document, and so is a text file. Documents follow one another, each behind the tokenizer's
beginning-of-text token where it uses one, else before its end token, cut into blocks of `max_length` tokens:

    <s> Once upon a time … the end . <s> One day , a girl …        one stream
    [        block        ][        block        ][ last ]         the first token of a block is not predicted"""

import copy
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from ...errors import TaskError
from .base import VALIDATION_SEED, Batches, Example, Task, TaskOptions
from .files import HELD_OUT, Rows, draw, held_out, read_splits

IGNORED = -100  # a label without a loss, in torch and transformers
# Tokenizers slow down on very long texts (10 MB: 35 s and 1.8 GB): pieces end at a line's end where one is near.
PIECE = re.compile(r"(?s).{1,10000}(?:(?<=\n)|\Z)|.{10000}")
PIECES_AT_ONCE = 128


def lm_task(tokenizer: PreTrainedTokenizerBase, options: TaskOptions) -> Task:
    """The task, tokenized. Its limits count blocks: the training text's first ones (the rest is not even tokenized),
    and a fixed sample of all validation blocks.

    Raises: TaskError without data, without one column of text, or if the text is too short."""
    train_rows, validation_rows, source = read_splits(options.data)
    text = texts(train_rows)
    if validation_rows is not None:
        other = texts(validation_rows)
    elif len(text) >= HELD_OUT:
        text, other = held_out(text)
    else:  # the end of each of a few documents
        text, other = ([held_out(document)[part] for document in text] for part in (0, 1))
    train = list(islice(blocks(tokens(tokenizer, text), options.max_length), options.max_train_samples))
    validation = list(blocks(tokens(tokenizer, other), options.max_length))
    if not (train and validation):
        raise TaskError(f"--data {options.data}: too short for a training and a validation part; add text")
    validation = [validation[i] for i in draw(len(validation), options.max_eval_samples, VALIDATION_SEED)]
    return causal_task("lm", "perplexity", source, train, validation, tokenizer)


def texts(rows: Rows) -> list[str]:
    """The documents of a table: its only column of text, or the one called `text`."""
    columns = [name for name in rows.table.column_names if isinstance(rows.first(name), str)]
    if "text" not in columns and len(columns) != 1:
        there = ", ".join(columns) or "none"
        raise TaskError(f"{rows.origin}: its columns of text are {there}; lm reads the one called 'text': rename it")
    return [text for text in rows.text("text" if "text" in columns else columns[0]) if text.strip()]


def tokens(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str]) -> Iterator[int]:
    """The stream: every document behind the opening token or, where there is none, before the end token."""
    before, end = borders(tokenizer)
    after = [] if before else end
    pieces = (piece for document in documents for piece in PIECE.finditer(document))
    while group := list(islice(pieces, PIECES_AT_ONCE)):
        found = token_ids(tokenizer, [piece[0] for piece in group])
        for piece, ids in zip(group, found, strict=True):
            first, last = piece.start() == 0, piece.end() == len(piece.string)
            yield from chain(before if first else (), ids, after if last else ())


def blocks(stream: Iterator[int], size: int) -> Iterator[Example]:
    """The stream in blocks of `size` tokens; the last one is shorter, or left out if it predicts nothing."""
    cut = iter(lambda: list(islice(stream, size)), [])
    return ({"input_ids": block, "labels": block} for block in cut if len(block) > 1)


def causal_task(
    name: str, metric: str, source: str, train: list[Example], validation: list[Example], tokenizer: Any
) -> Task:
    """A task of a language model that is judged by its loss; `sft` is one, too."""
    collate = right_padding(tokenizer)
    return Task(name, metric, source, train, validation, collate, causal_loss, higher_is_better=False)


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

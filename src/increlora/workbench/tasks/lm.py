"""Task `lm`: causal language modelling on any text.

Each row of a table is a document, and so is a text file. Documents follow one another, each behind the tokenizer's
beginning-of-text token where it uses one, else before its end token, cut into blocks of `max_length` tokens:

    <s> Once upon a time … the end . <s> One day , a girl …        one stream
    [        block        ][        block        ][ last ]         the first token of a block is not predicted"""

import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice

from transformers import PreTrainedTokenizerBase

from ...errors import TaskError
from .base import VALIDATION_SEED, Example, Task, TaskOptions
from .causal import borders, causal_loss, right_padding, token_ids
from .files import HELD_OUT, Rows, draw, held_out, read_splits, text_columns

# Tokenizers slow down on very long texts (10 MB: 35 s and 1.8 GB): pieces end at a line's end where one is near.
PIECE = re.compile(r"(?s).{1,10000}(?:(?<=\n)|\Z)|.{10000}")
PIECES_AT_ONCE = 128


def lm_task(tokenizer: PreTrainedTokenizerBase, options: TaskOptions) -> Task:
    """The task, tokenized. Its limits count blocks: the training text's first ones (the rest is not even tokenized),
    and a fixed sample of all validation blocks.

    Raises: TaskError without data, without one column of text, or if the text is too short."""
    splits = read_splits(options.data)
    text = texts(splits.train)
    if splits.validation is not None:
        other = texts(splits.validation)
    elif len(text) >= HELD_OUT:
        text, other = held_out(text)
    else:  # the end of each of a few documents
        text, other = ([held_out(document)[part] for document in text] for part in (0, 1))
    train = list(islice(blocks(tokens(tokenizer, text), options.max_length), options.max_train_samples))
    validation = list(blocks(tokens(tokenizer, other), options.max_length))
    if not (train and validation):
        raise TaskError(f"--data {options.data}: too short for a training and a validation part; add text")
    return Task(
        name="lm",
        metric="perplexity",
        source=splits.source,
        train=train,
        validation=[validation[i] for i in draw(len(validation), options.max_eval_samples, VALIDATION_SEED)],
        collate=right_padding(tokenizer),
        measure=causal_loss,
        higher_is_better=False,
    )


def texts(rows: Rows) -> list[str]:
    """The documents of a table: its only column of text, or the one called `text`."""
    columns = text_columns(rows.table)
    if "text" not in columns and len(columns) != 1:
        there = ", ".join(columns) or "none"
        raise TaskError(f"{rows.origin}: its columns of text are {there}; lm reads the one called 'text': rename it")
    column = "text" if "text" in columns else columns[0]
    rows.check(column)
    return [text for text in rows.column(column) if text.strip()]


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

"""Task `uuid`: learn random pairs by heart. What is stored is all that counts, so rank is what is tested.

    <bos>bdd640fb-0667-4ad1-9c80-317fa3b1799d:23b8c1e9-3924-46de-beb1-3b9046685257       one of N pairs, 74 tokens
    accuracy = share of the value's 32 hex digits that greedy decoding from "key:" puts in their places
    floor    = 1/32 · Σ_positions (count of the commonest digit there) / N               the best constant guess

Keys and values are independent version-4 UUIDs: 122 bits each, and nothing to generalise. The pairs a run is measured
on are the pairs it was trained on. Accuracy below the floor means nothing.

Source: MoRA, section 3.2 (10,000 pairs, LLaMA-2-7B). Its evaluation code is not public: the digits counted follow from
the plateau of its curves at 10 %, where counting dashes would give 20 %. Differs: N, one token per character, and a
base that knows the format (see `uuid_base`)."""

import random
from collections import Counter
from collections.abc import Sequence
from uuid import UUID

import torch
from torch import Tensor, nn
from transformers import BatchEncoding

from ...errors import TaskError
from .base import Batches, Example, Task, TaskOptions
from .causal import IGNORED

PAIRS = 100  # N by default; --max-train-samples changes it
UUID_LENGTH, DIGITS = 36, 32  # characters with and without dashes
BOS, PAD = "<", ">"
VOCABULARY = "0123456789abcdef-:" + BOS + PAD
IDS = {character: i for i, character in enumerate(VOCABULARY)}
PROMPT_LENGTH = 1 + UUID_LENGTH + 1  # <bos>, key, colon

Pair = tuple[str, str]


def uuid_task(tokenizer: None, options: TaskOptions, *, value_only: bool = False) -> Task:
    """The task: `options.seed` draws N = `options.max_train_samples` pairs (100 by default).

    Args:
        value_only: the loss is on the value alone; by default, as published, on the key, too.
    Raises: TaskError for `data`."""
    name = "uuid/value" if value_only else "uuid"
    if options.data is not None:
        raise TaskError(f"--data {options.data}: {name} draws its own pairs; leave it out")
    pairs = draw_pairs(options.max_train_samples or PAIRS, options.seed)
    asked = pairs[: options.max_eval_samples]
    return Task(
        name=name,
        metric="accuracy",
        source=f"{len(pairs)} pairs of seed {options.seed}, measured on {len(asked)} of them",
        train=examples(pairs, value_only=value_only),
        validation=examples(asked),
        collate=collate,
        measure=recall,
        baseline={"accuracy": constant_guess([value for _, value in asked])},
    )


def draw_pairs(count: int, seed: int | str) -> list[Pair]:
    """Independent version-4 UUIDs, two by two; `seed` alone decides, and more pairs begin with the same ones."""
    rng = random.Random(seed)

    def draw() -> str:
        return str(UUID(int=rng.getrandbits(128), version=4))

    return [(draw(), draw()) for _ in range(count)]


def examples(pairs: Sequence[Pair], *, value_only: bool = False) -> list[Example]:
    """A token per character; with `value_only` the loss is on the value alone."""
    rows = [[IDS[character] for character in f"{BOS}{key}:{value}"] for key, value in pairs]
    unasked = [IGNORED] * PROMPT_LENGTH if value_only else []
    return [{"input_ids": row, "labels": unasked + row[len(unasked) :]} for row in rows]


def collate(batch: list[Example]) -> BatchEncoding:
    """All examples have the same length, so nothing is padded."""
    return BatchEncoding({key: torch.tensor([row[key] for row in batch]) for key in ("input_ids", "labels")})


def recall(model: nn.Module, batches: Batches) -> dict[str, float]:
    """Mean `digits_right` of the values decoded from "key:", in [0, 1]."""
    found, wanted = [], []
    for batch in batches:
        prompt, value = batch["input_ids"].split([PROMPT_LENGTH, UUID_LENGTH], dim=1)
        found += texts(greedy(model, prompt, UUID_LENGTH))
        wanted += texts(value)
    return {"accuracy": sum(map(digits_right, found, wanted)) / len(wanted)}


def greedy(model: nn.Module, prompt: Tensor, length: int) -> Tensor:
    """The `length` likeliest tokens after the prompt, one by one: (batch, prompt) → (batch, length)."""
    outputs, tokens = model(input_ids=prompt, use_cache=True), []
    while True:
        tokens.append(outputs.logits[:, -1:].argmax(-1))
        if len(tokens) == length:
            return torch.cat(tokens, dim=1)
        outputs = model(input_ids=tokens[-1], past_key_values=outputs.past_key_values, use_cache=True)


def texts(rows: Tensor) -> list[str]:
    return ["".join(VOCABULARY[token] for token in row) for row in rows.tolist()]


def digits_right(found: str, wanted: str) -> float:
    """Share of the 32 hex digits of `wanted` that `found` has in the same place; dashes are taken out of both."""
    pairs = zip(found.replace("-", ""), wanted.replace("-", ""), strict=False)  # a missing digit is a wrong one
    return sum(one == other for one, other in pairs) / DIGITS


def constant_guess(values: Sequence[str]) -> float:
    """The floor above: what the best answer that ignores the key reaches."""
    columns = zip(*(value.replace("-", "") for value in values), strict=True)
    return sum(max(Counter(column).values()) for column in columns) / (DIGITS * len(values))

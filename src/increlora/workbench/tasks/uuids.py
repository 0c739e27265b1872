"""Task `uuid`: learn random pairs by heart. What is stored is all that counts, so rank is what is tested.

    <bos>bdd640fb-0667-4ad1-9c80-317fa3b1799d:23b8c1e9-3924-46de-beb1-3b9046685257       one of N pairs, 74 tokens
    accuracy = share of the value's 32 hex digits that greedy decoding from "key:" puts in their places
    floor    = 1/32 · Σ_positions (count of the commonest digit there) / N               the best constant guess

Keys and values are independent version-4 UUIDs: 122 bits each, and nothing to generalise. The pairs a run is measured
on are the pairs it was trained on. Accuracy below the floor means nothing.

Source: MoRA, section 3.2 (10,000 pairs, LLaMA-2-7B). Its evaluation code is not public: the digits counted follow from
the plateau of its curves at 10 %, where counting dashes would give 20 %. Differs: N, one token per character, and a
base that knows the format.

That base is a small Llama, pretrained on fresh pairs, each used once: the places of dashes and colon, the version
digit, the four variant digits. Its loss ends at what the format leaves open, (60 · ln 16 + 2 · ln 4) / 73 = 2.317 nats
per token. It is made once per process (some ten seconds), the same for every seed of the task. Its weights start with
the variance 1 / width: from transformers' 0.02 the frozen net has next to no features that an adapter could combine,
and no rank stores anything in 1,000 steps."""

import random
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any
from uuid import UUID

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, default_data_collator

from .base import Batches, Example, Task, TaskOptions
from .lm import IGNORED

PAIRS = 100  # N by default; --max-train-samples changes it
UUID_LENGTH, DIGITS = 36, 32  # characters with and without dashes
BOS, PAD = "<", ">"
VOCABULARY = "0123456789abcdef-:" + BOS + PAD
IDS = {character: i for i, character in enumerate(VOCABULARY)}
PROMPT_LENGTH = 1 + UUID_LENGTH + 1  # <bos>, key, colon
FRESH = "fresh pairs"  # a word as seed: the task's seeds are numbers and never draw these pairs
WIDTH, HIDDEN, LAYERS, HEADS = 128, 256, 2, 4  # of the base
STEPS, BATCH, LR, WARMUP, CLIP = 200, 16, 4e-3, 0.1, 1.0  # its pretraining by AdamW: warm-up, then linear decay to 0

Pair = tuple[str, str]


def uuid_task(tokenizer: None, options: TaskOptions, *, value_only: bool = False) -> Task:
    """The task: `options.seed` draws N = `options.max_train_samples` pairs (100 by default).

    Args:
        value_only: the loss is on the value alone; by default, as published, on the key, too."""
    pairs = draw_pairs(options.max_train_samples or PAIRS, options.seed)
    asked = pairs[: options.max_eval_samples]
    return Task(
        name="uuid/value" if value_only else "uuid",
        metric="accuracy",
        source=f"{len(pairs)} pairs of seed {options.seed}, measured on {len(asked)} of them",
        train=examples(pairs, value_only=value_only),
        validation=examples(asked),
        collate=default_data_collator,
        measure=recall,
        baseline={"accuracy": constant_guess([value for _, value in asked])},
    )


def draw_pairs(count: int, seed: int | str) -> list[Pair]:
    """Independent version-4 UUIDs, two by two; `seed` alone decides, and more pairs begin with the same ones."""
    rng = random.Random(seed)
    drawn = (str(UUID(int=rng.getrandbits(128), version=4)) for _ in range(2 * count))
    return list(zip(drawn, drawn, strict=True))


def examples(pairs: Sequence[Pair], *, value_only: bool = False) -> list[Example]:
    """A token per character; with `value_only` the loss is on the value alone."""
    rows = [[IDS[character] for character in f"{BOS}{key}:{value}"] for key, value in pairs]
    unasked = [IGNORED] * PROMPT_LENGTH if value_only else []
    return [{"input_ids": row, "labels": unasked + row[len(unasked) :]} for row in rows]


def recall(model: nn.Module, batches: Batches) -> dict[str, float]:
    """Mean `digits_right` of the values decoded from "key:", in [0, 1]."""
    found, wanted = [], []
    for batch in batches:
        prompt, value = batch["input_ids"].split([PROMPT_LENGTH, UUID_LENGTH], dim=1)
        said: Any = model.generate(input_ids=prompt, max_new_tokens=UUID_LENGTH, do_sample=False)  # type: ignore[operator]
        found += texts(said[:, PROMPT_LENGTH:])
        wanted += texts(value)
    return {"accuracy": sum(map(digits_right, found, wanted)) / len(wanted)}


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


def uuid_decoder() -> LlamaForCausalLM:
    """The net before its pretraining; initial values follow torch's random state."""
    config = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, max_position_embeddings=PROMPT_LENGTH + UUID_LENGTH, initializer_range=WIDTH**-0.5,
        bos_token_id=IDS[BOS], pad_token_id=IDS[PAD], eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@cache
def uuid_base(steps: int = STEPS) -> LlamaForCausalLM:
    """The pretrained net, in evaluation mode; take a copy to change it. Leaves torch's random state.

    Bitwise reproducible on one machine and thread count, and up to rounding elsewhere."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = uuid_decoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    scheduler = LambdaLR(optimizer, lambda step: min((step + 1) / (WARMUP * steps), 1 - step / steps))
    rows = examples(draw_pairs(steps * BATCH, FRESH))
    for first in range(0, len(rows), BATCH):
        model(**default_data_collator(rows[first : first + BATCH])).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return model.eval()

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
per token. The weights are made once (some ten seconds), the same for every seed of the task, and kept in the cache of
the hub's client. They start with the variance 1 / width: from transformers' 0.02 the frozen net has next to no features
that an adapter could combine, and no rank stores anything in 1,000 steps."""

import hashlib
import json
import random
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import torch
from huggingface_hub.constants import HF_ASSETS_CACHE
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, default_data_collator

from ...files import whole
from .base import Batches, Example, Task, TaskOptions
from .causal import IGNORED

PAIRS = 100  # N by default; --max-train-samples changes it
UUID_LENGTH, DIGITS = 36, 32  # characters with and without dashes
BOS, PAD = "<", ">"
VOCABULARY = "0123456789abcdef-:" + BOS + PAD
IDS = {character: i for i, character in enumerate(VOCABULARY)}
PROMPT_LENGTH = 1 + UUID_LENGTH + 1  # <bos>, key, colon
FRESH = "fresh pairs"  # a word as seed: the task's seeds are numbers and never draw these pairs
WARMUP, CLIP = 0.1, 1.0  # of the pretraining

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


@dataclass(frozen=True)
class BaseSettings:
    """Size and pretraining of the base; every field counts for the name under which it is kept.

    Attributes:
        width, hidden, layers, heads: of the decoder.
        steps, batch, lr: AdamW steps, fresh pairs per step, peak learning rate (warm-up, then linear decay to 0).
        seed: of the initial weights."""

    width: int = 128
    hidden: int = 256
    layers: int = 2
    heads: int = 4
    steps: int = 200
    batch: int = 16
    lr: float = 4e-3
    seed: int = 0

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


BASE = BaseSettings()


def uuid_decoder(settings: BaseSettings = BASE) -> LlamaForCausalLM:
    """The net before its pretraining; initial values follow torch's random state."""
    config = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=settings.width, intermediate_size=settings.hidden,
        num_hidden_layers=settings.layers, num_attention_heads=settings.heads,
        max_position_embeddings=PROMPT_LENGTH + UUID_LENGTH, initializer_range=settings.width**-0.5,
        bos_token_id=IDS[BOS], pad_token_id=IDS[PAD], eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def load_uuid_base(settings: BaseSettings = BASE, folder: Path | None = None) -> LlamaForCausalLM:
    """The pretrained net, in evaluation mode: from `folder` (default: the hub client's cache), or made and kept there.

    A damaged file is made anew; where nothing can be written, a warning says so."""
    folder = folder or Path(HF_ASSETS_CACHE).expanduser() / "increlora" / "uuid"
    path = folder / f"{settings.digest()}.safetensors"
    if (weights := read(path)) is None:
        weights = pretrained(settings).state_dict()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with whole(path) as new:
                save_file(weights, new, metadata={"sha256": fingerprint(weights)})
        except OSError as error:
            warnings.warn(f"{path} cannot be written ({error}): the base is made anew in each run", stacklevel=2)
    with torch.random.fork_rng(devices=[]):
        model = uuid_decoder(settings)
    model.load_state_dict(weights)
    return model.eval()


def pretrained(settings: BaseSettings) -> LlamaForCausalLM:
    """The net after its pretraining; leaves torch's random state. Bitwise reproducible on one machine and thread
    count, and up to rounding elsewhere."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = uuid_decoder(settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0)
    scheduler = LambdaLR(optimizer, lambda step: min((step + 1) / (WARMUP * settings.steps), 1 - step / settings.steps))
    rows = examples(draw_pairs(settings.steps * settings.batch, FRESH))
    for first in range(0, len(rows), settings.batch):
        model(**default_data_collator(rows[first : first + settings.batch])).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return model


def read(path: Path) -> dict[str, Tensor] | None:
    """The saved weights; None if there are none, or if they are not what was written."""
    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
            written = (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        return None
    return weights if written == fingerprint(weights) else None


def fingerprint(weights: dict[str, Tensor]) -> str:
    """sha256 of names and values: the file's format notices a wrong length, but no flipped bit."""
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(name.encode())
        found.update(weights[name].contiguous().numpy().tobytes())
    return found.hexdigest()

"""The base of task `uuid`: a small Llama that knows how pairs are written, and none of them.

It learns from fresh pairs, each used once: the places of dashes and colon, the version digit, the four variant digits.
Its loss ends at what the format leaves open, (60 · ln 16 + 2 · ln 4) / 73 = 2.317 nats per token. The weights are made
once (some ten seconds), the same for every seed of the task, and kept in the cache of the hub's client.

Weights start with the variance 1 / width: from transformers' 0.02 the frozen net has next to no features that an
adapter could combine, and no rank stores anything in 1,000 steps."""

import hashlib
import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from huggingface_hub.constants import HF_ASSETS_CACHE
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM

from ...files import whole
from .uuids import BOS, IDS, PAD, PROMPT_LENGTH, UUID_LENGTH, VOCABULARY, collate, draw_pairs, examples

FRESH = "fresh pairs"  # a word as seed: the task's seeds are numbers and never draw these pairs
WARMUP = 0.1
CLIP = 1.0


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
        keep(weights, path)
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
        model(**collate(rows[first : first + settings.batch])).loss.backward()
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


def keep(weights: dict[str, Tensor], path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as new:
            save_file(weights, new, metadata={"sha256": fingerprint(weights)})
    except OSError as error:
        warnings.warn(f"{path} cannot be written ({error}): the base is made anew in each run", stacklevel=2)


def fingerprint(weights: dict[str, Tensor]) -> str:
    """sha256 of names and values: the file's format notices a wrong length, but no flipped bit."""
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(name.encode())
        found.update(weights[name].contiguous().numpy().tobytes())
    return found.hexdigest()

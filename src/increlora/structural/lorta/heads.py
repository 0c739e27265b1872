"""The attention of a model, as its config and the names of its modules describe it, for methods that must know it."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ...errors import ConfigError
from .attention import blocks
from .settings import LortaSettings


def completed(settings: LortaSettings, model: nn.Module, targets: Iterable[str]) -> dict[str, Any]:
    """`heads`, `head_dim` and `layers`, where they were left out. What is not known stays None.

    Raises ConfigError where encoder and decoder have different heads, or fused projections are not stacked."""
    described = text_config(model)
    check_stacked(described)
    if settings.heads is None:
        check_uniform(described)
    heads = settings.heads or getattr(described, "num_attention_heads", None)
    return {
        "heads": heads,
        "head_dim": settings.head_dim or head_dim(described, heads),
        "layers": settings.layers or stack(model, targets, settings.matrices) or None,
    }


def text_config(model: nn.Module) -> Any:
    described: Any = getattr(model, "config", None)
    return described.get_text_config() if hasattr(described, "get_text_config") else described


def head_dim(described: Any, heads: int | None) -> int | None:
    """Width of a head: as stated, else the model's width over the heads."""
    stated, width = getattr(described, "head_dim", None), getattr(described, "hidden_size", None)
    if stated or not (width and heads):
        return stated
    return width // heads if width % heads == 0 else None


def stack(model: nn.Module, targets: Iterable[str], matrices: Mapping[str, str]) -> list[str]:
    """The attention blocks of the model that differ from a targeted one by numbers alone: a vision tower is not counted
    as layers of the language model beside it."""
    families = {family(block) for block in blocks(targets, matrices)}
    every = blocks((name for name, _ in model.named_modules()), matrices)
    return [block for block in every if family(block) in families]


def family(block: str) -> str:
    return re.sub(r"\d+", "*", block)


def check_uniform(described: Any) -> None:
    encoder, decoder = (getattr(described, f"{part}_attention_heads", None) for part in ("encoder", "decoder"))
    if encoder and decoder and encoder != decoder:
        raise ConfigError(
            f"{encoder} heads in the encoder and {decoder} in the decoder: one tensor has heads of one kind; adapt one "
            f"part, and set `heads` and `head_dim` for it"
        )


def check_stacked(described: Any) -> None:
    if getattr(described, "model_type", None) == "gpt_bigcode" and not described.multi_query:
        raise ConfigError(
            "attn.c_attn: q, k and v of a GPTBigCode without multi_query take turns, head by head, which are no slices "
            "of LoRTA's tensor: use another method"
        )

"""The role of a linear map in attention, from its name: its attention block, and which projection it is; and the heads
that the model's config describes.

model.layers.3.self_attn.k_proj → ("model.layers.3.self_attn", "k")
transformer.h.3.attn.c_attn     → ("transformer.h.3.attn", "qkv"): its outputs are those of q, then of k, then of v
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ...errors import ConfigError

ROLES = "qkvo"  # o: the projection behind the heads

# Endings of names, q k v o, long enough to exclude other modules: BERT's feed-forward has a `dense`, too, and GPT-2's
# a `c_proj`.
SEPARATE = (
    "q_proj k_proj v_proj o_proj",  # Llama, Mistral, Qwen, Gemma, Phi-3's o, ViT, …
    "q_proj k_proj v_proj self_attn.out_proj",  # OPT, BART, Whisper, CLIP
    "q_proj k_proj v_proj encoder_attn.out_proj",
    "q_proj k_proj v_proj attn.out_proj",  # GPT-J
    "q_proj k_proj v_proj attention.out_proj",  # GPT-Neo, wav2vec 2.0
    "q_proj k_proj v_proj self_attn.dense",  # Phi
    "attention.self.query attention.self.key attention.self.value attention.output.dense",  # BERT, RoBERTa, ELECTRA
    "crossattention.self.query crossattention.self.key crossattention.self.value crossattention.output.dense",
    "attention.self.query_proj attention.self.key_proj attention.self.value_proj attention.output.dense",  # DeBERTa v2
    "attention.query attention.key attention.value attention.dense",  # ALBERT
    "attention.q_lin attention.k_lin attention.v_lin attention.out_lin",  # DistilBERT
    "attention.attn.q attention.attn.k attention.attn.v attention.attn.o",  # MPNet
    "SelfAttention.q SelfAttention.k SelfAttention.v SelfAttention.o",  # T5
    "EncDecAttention.q EncDecAttention.k EncDecAttention.v EncDecAttention.o",
)
FUSED = (
    "attn.c_attn attn.c_proj",  # GPT-2
    "self_attn.qkv_proj o_proj",  # Phi-3
    "attn.Wqkv attn.out_proj",  # MPT
    "attn.Wqkv attn.Wo",  # ModernBERT
)
KNOWN = {ending: role for family in SEPARATE for ending, role in zip(family.split(), ROLES, strict=True)} | {
    ending: roles for family in FUSED for ending, roles in zip(family.split(), ("qkv", "o"), strict=True)
}
# GPT-NeoX, BLOOM, Falcon; DeBERTa v1; CodeGen
INTERLEAVED = ("query_key_value", "attention.self.in_proj", "attn.qkv_proj")


def ends(name: str, ending: str) -> bool:
    return f".{name}".endswith(f".{ending}")


def find(name: str, own: Mapping[str, str]) -> tuple[str, str] | None:
    """(attention block, its roles in the order of its outputs) of a module; None if the name says nothing.

    The block's name reaches up to the first word of an ending that has several (`….attention`), else up to the ending.
    own: ending → roles, looked at before the known ones. The longest ending counts."""
    for known in (own, KNOWN):
        ending = max((e for e in known if ends(name, e)), key=len, default=None)
        if ending is not None:
            first, _, more = ending.partition(".")
            parent = name.removesuffix(ending).rstrip(".")
            return ".".join(filter(None, (parent, first if more else ""))), known[ending]
    return None


def projection(name: str, own: Mapping[str, str]) -> tuple[str, str]:
    """As `find`. Raises ConfigError where there is nothing to find, or no way to cut it into q, k and v."""
    found = find(name, own)
    if found is not None:
        return found
    last = name.rpartition(".")[2]
    if interleaved(name):
        raise ConfigError(
            f"{name}: its outputs are q, k and v in turns, head by head, which are no slices of LoRTA's tensor: leave "
            f"it out of `target_modules`; or, if they are stacked in this model, say so by matrices={{{last!r}: 'qkv'}}"
        )
    raise ConfigError(
        f"{name}: not known as a projection of attention: say what it is by matrices={{{last!r}: 'q'}} (or 'k', 'v', "
        f"'o'; 'qkv' for outputs stacked in this order), or leave it out of `target_modules`"
    )


def interleaved(name: str) -> bool:
    """Is this known to be a fused projection that alternates between q, k and v?"""
    return any(ends(name, ending) for ending in INTERLEAVED)


def blocks(names: Iterable[str], own: Mapping[str, str]) -> list[str]:
    """The attention blocks that these modules belong to, in their order."""
    return list(dict.fromkeys(found[0] for name in names if (found := find(name, own)) is not None))


def key_heads(roles: str, out_features: int, heads: int, head_dim: int) -> int | None:
    """Heads of k and of v, given that q has `heads`; None if so many outputs are not made of whole heads."""
    rest, odd = divmod(out_features, head_dim)
    rest -= heads * roles.count("q")
    others = len(roles.replace("q", ""))
    if not others:
        return heads if rest == odd == 0 else None
    count, left = divmod(rest, others)
    return count if odd == left == 0 < count and heads % count == 0 else None


# -- what the model says ---------------------------------------------------------------------------------------------


def completed(settings: Any, model: nn.Module, targets: Iterable[str]) -> dict[str, Any]:
    """`heads`, `head_dim` and `layers`, where the settings leave them out. What is not known stays None.

    Raises ConfigError where encoder and decoder have different heads, or fused projections are not stacked."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(config, "model_type", None) == "gpt_bigcode" and not config.multi_query:
        raise ConfigError(
            "attn.c_attn: q, k and v of a GPTBigCode without multi_query take turns, head by head, which are no slices "
            "of LoRTA's tensor: use another method"
        )
    encoder, decoder = (getattr(config, f"{part}_attention_heads", None) for part in ("encoder", "decoder"))
    if settings.heads is None and encoder and decoder and encoder != decoder:
        raise ConfigError(
            f"{encoder} heads in the encoder and {decoder} in the decoder: one tensor has heads of one kind; adapt one "
            f"part, and set `heads` and `head_dim` for it"
        )
    heads, width = settings.heads or getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    head_dim = settings.head_dim or getattr(config, "head_dim", None)
    if not head_dim and width and heads and width % heads == 0:
        head_dim = width // heads
    layers = settings.layers or alike(model, targets, settings.matrices) or None
    return {"heads": heads, "head_dim": head_dim, "layers": layers}


def alike(model: nn.Module, targets: Iterable[str], matrices: Mapping[str, str]) -> list[str]:
    """The attention blocks of the model that differ from a targeted one by numbers alone: a vision tower is not counted
    as layers of the language model beside it."""
    families = {family(block) for block in blocks(targets, matrices)}
    every = blocks((name for name, _ in model.named_modules()), matrices)
    return [block for block in every if family(block) in families]


def family(block: str) -> str:
    return re.sub(r"\d+", "*", block)
